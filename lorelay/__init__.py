"""The `lorelay` command: serve, status, dashboard."""
