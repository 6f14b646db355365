"""Code that the API and the workers share: settings, messages, errors, and the queue in Redis."""
