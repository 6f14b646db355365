"""The threads of a worker: between Redis and the engine."""
