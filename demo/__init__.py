"""The demo: a small model, two adapters for it, and the text on which they were trained."""
