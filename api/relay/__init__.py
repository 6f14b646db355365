"""Requests out to the queue, their events back to HTTP exchanges."""
