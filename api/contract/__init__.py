"""OpenAI's contract: what a request may say, and the form of an answer. No queue."""
