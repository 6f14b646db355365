"""Redis as both sides see it: keys, scripts, records, the registry of models."""
