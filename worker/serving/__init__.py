"""The part of a worker between Redis and the engine, and its threads."""
