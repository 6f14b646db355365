"""`scripts/bench`: measures speed and latency of a real deployment on this machine."""
