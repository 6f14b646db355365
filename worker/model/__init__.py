"""Everything that handles tensors: the model, its adapters, its cache, sampling."""
