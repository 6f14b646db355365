"""Sends requests to the queues, and brings their events back to the HTTP responses."""
