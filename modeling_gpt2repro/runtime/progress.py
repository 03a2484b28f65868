"""A progress bar of tokens."""

import sys

from tqdm import tqdm


class ProgressBar:
    """Training tokens so far, their rate and the time left, which is known by units or by `max_tokens`."""

    def __init__(self, max_tokens: int | None, doing: str):
        self.max_tokens = max_tokens
        self.bar = tqdm(
            total=max_tokens, desc=doing, unit="token", unit_scale=True, dynamic_ncols=True, file=sys.stderr
        )
        self.began = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def show(self, units: int, total_units: int, tokens: int):
        """Called now and then; the total is projected from the units where no limit is given."""
        if not self.began:  # what was there before does not count for the rate
            self.bar.initial = self.bar.n = tokens
            self.began = True
        if self.max_tokens is None:
            self.bar.total = tokens * total_units // max(1, units)
        self.bar.set_postfix_str(f"{units:,} of {total_units:,} units", refresh=False)
        self.bar.update(tokens - self.bar.n)
