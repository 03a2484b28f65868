"""Where text comes from: local files, Hub datasets, Python's documentation."""
