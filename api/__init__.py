"""The HTTP side of Lorelay: OpenAI's API in front of the queue. Never imports torch, transformers or peft."""
