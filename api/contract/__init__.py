"""OpenAI's formats: the fields of requests and the JSON of answers. No module here knows about queues."""
