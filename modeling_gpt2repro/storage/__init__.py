"""Files on disk and on the Hub: atomic writes, checksums, retry."""
