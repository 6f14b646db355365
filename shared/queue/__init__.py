"""Access to Redis for the API and the workers: keys, scripts, records, and the registry of models."""
