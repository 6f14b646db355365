"""Everything that the API and the workers must agree on: settings, messages, Redis keys and scripts."""
