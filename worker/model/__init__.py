"""The code that handles tensors: model, adapters, KV cache and sampling."""
