"""The part of a worker between Redis and the engine, with the worker's threads."""
