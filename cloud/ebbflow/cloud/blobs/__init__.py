"""Content-addressed storage of files: weights, corpora, checkpoints."""
