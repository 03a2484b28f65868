"""Token shards on disk: written, opened, verified."""
