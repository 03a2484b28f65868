"""Training batches and the order they come in."""
