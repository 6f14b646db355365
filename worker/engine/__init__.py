"""The engine: scheduling and bookkeeping in plain Python. No Redis, no tensors."""
