"""`scripts/bench`: the yardstick of this machine, measured on a real deployment."""
