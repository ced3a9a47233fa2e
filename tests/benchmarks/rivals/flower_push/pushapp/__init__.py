"""Pushes weights to nodes, for the benchmark of delivery."""
