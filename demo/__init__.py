"""The demo: a small model, two adapters trained on it, and the text they were trained on."""
