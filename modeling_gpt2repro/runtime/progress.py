"""Progress bars, of steps, of tokens and of text; a countdown; and text that is safe to show."""

import re
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

# How a path begins that names folders of a machine: /, ~ or ~jane/, ../, C:\. Not a relative one, nor https://...
PRIVATE_PATH = r"(?<![\w.:/\\~])(?:[A-Za-z]:|~[\w.-]*|\.\.)?[/\\]"


def last_part(path: str) -> str:
    """'/home/me/tokens/' -> 'tokens'."""
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def escape_controls(text: str, kept: str = "") -> str:
    """Control characters spelled as in Python, but for those `kept`: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


class SteadyBar(tqdm):
    """A tqdm by the monotonic clock; tqdm's own, the wall clock, stops the bar for an hour if it is set back by one."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if not self.disable:
            self._time = time.monotonic  # where tqdm reads it for `update` and the rate
            self.start_t = self.last_print_t = time.monotonic()


class ProgressBar(SteadyBar):
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


class TextBar(SteadyBar):
    """Progress in bytes of text.

    Args:
        total_bytes: UTF-8 bytes that will be read, roughly; 0 if unknown.
        description: What is being done.
    """

    def __init__(self, total_bytes: int, description: str):
        options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "file": sys.stderr}
        super().__init__(total=total_bytes or None, desc=description, **options)

    def watch(self, texts: Iterable[str], then: str) -> Iterator[str]:
        """Yield the texts and count them; after the last one, show what is done `then`."""
        for text in texts:
            yield text
            self.update(len(text.encode("utf-8", "replace")))
        self.total = self.n  # the total was an estimate
        self.set_description(then)


def count_down(pause: float, left: float):
    """Sleep for `pause` of the seconds that are `left` until something is given up; a terminal shows both."""
    if not sys.stderr.isatty():
        time.sleep(pause)
        return
    for passed in range(round(pause)):
        line = f"trying again in {pause - passed:.0f} s, giving up in {left - passed:.0f} s"
        print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)
        time.sleep(1)
    print(f"\r{'':<60}\r", end="", file=sys.stderr, flush=True)
