"""A progress bar of tokens."""

import sys

from tqdm import tqdm


class ProgressBar:
    """Training tokens so far, tokens/s and the time left, as a context manager around `tqdm`."""

    def __init__(self, max_tokens: int | None, description: str):
        self.max_tokens = max_tokens
        self.bar = tqdm(
            total=max_tokens, desc=description, unit="token", unit_scale=True, dynamic_ncols=True, file=sys.stderr
        )
        self.has_started = False

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def show(self, partitions: int, total_partitions: int, tokens: int):
        """Move to `tokens`; without max_tokens the total is extrapolated from the share of finished partitions."""
        if not self.has_started:  # what an earlier run finished does not count for tokens/s
            self.bar.initial = self.bar.n = tokens
            self.has_started = True
        if self.max_tokens is None:
            self.bar.total = tokens * total_partitions // max(1, partitions)
        self.bar.set_postfix_str(f"{partitions:,} of {total_partitions:,} partitions", refresh=False)
        self.bar.update(tokens - self.bar.n)
