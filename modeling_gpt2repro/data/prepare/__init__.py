"""Preparing a folder of shards: planned, tokenized in parallel, resumable."""
