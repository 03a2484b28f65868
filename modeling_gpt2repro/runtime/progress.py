"""A progress bar of tokens."""

import sys

from tqdm import tqdm


class ProgressBar(tqdm):
    """Training tokens so far, tokens/s and the time left; without `max_tokens` the total is extrapolated."""

    def __init__(self, max_tokens: int | None, description: str):
        self.max_tokens = max_tokens
        self.has_started = False
        super().__init__(
            total=max_tokens, desc=description, unit="token", unit_scale=True, dynamic_ncols=True, file=sys.stderr
        )

    def show(self, partitions: int, total_partitions: int, tokens: int):
        """Move to `tokens`, after so many of all partitions."""
        if not self.has_started:  # what an earlier run finished does not count for tokens/s
            self.initial = self.n = tokens
            self.has_started = True
        if self.max_tokens is None:
            self.total = tokens * total_partitions // max(1, partitions)
        self.set_postfix_str(f"{partitions:,} of {total_partitions:,} partitions", refresh=False)
        self.update(tokens - self.n)
