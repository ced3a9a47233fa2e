"""What cloud and edge must agree on, and nothing else."""
