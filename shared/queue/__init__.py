"""The use of Redis that both sides share: keys, scripts, records, the registry of models."""
