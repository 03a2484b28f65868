"""Documents to tokens, shards and batches, and the order they come in."""
