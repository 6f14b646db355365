"""The HTTP server of Lorelay: OpenAI's API in front of the queues. It never imports torch or transformers."""
