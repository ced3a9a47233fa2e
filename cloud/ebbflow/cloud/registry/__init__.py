"""The SQL registry: what the cloud remembers. Weights are never in it."""
