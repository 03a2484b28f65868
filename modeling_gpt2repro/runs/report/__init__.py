"""A page about a run, in Markdown or HTML."""
