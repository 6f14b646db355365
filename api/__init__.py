"""The HTTP server of Lorelay: OpenAI's API in front of the queues.

This package imports no torch or transformers.
"""
