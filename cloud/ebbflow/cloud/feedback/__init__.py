"""Opens rounds, checks and keeps batches, aggregates them."""
