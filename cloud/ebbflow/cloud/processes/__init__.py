"""The cloud's processes: serve, teach, work, gate, and what starts them."""
