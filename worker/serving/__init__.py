"""The part of a worker between Redis and the engine, and the threads that it runs in."""
