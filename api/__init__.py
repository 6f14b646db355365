"""The HTTP server of Lorelay: OpenAI's API in front of the queues. Never imports torch or transformers."""
