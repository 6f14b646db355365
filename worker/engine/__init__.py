"""The engine: scheduling and bookkeeping in plain Python, without Redis and without tensors."""
