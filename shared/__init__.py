"""What the API and the workers agree on: settings, messages, Redis keys and scripts."""
