"""Preparing a folder of token shards: tokenized in parallel, resumable."""
