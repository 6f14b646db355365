"""OpenAI's formats: the fields of requests and the JSON of answers. Nothing here knows about queues."""
