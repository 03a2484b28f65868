"""Writes of a run that wait while the disk refuses them: it may be full, read-only or unreachable for a while."""

import sys
from collections.abc import Callable
from contextlib import suppress

from tqdm import tqdm


class DeferredWrites:
    """Tries again later what the disk refuses, so that an outage costs a run nothing; says once that there is one."""

    def __init__(self):
        self._waiting: dict[str, tuple[Callable[[], None], str]] = {}  # what -> how to write it, why it was refused
        self._is_outage = False  # since a write was refused, until all that waited is written

    def write(self, what: str, attempt: Callable[[], None]):
        """Call `attempt`; if it raises an OSError, again in each `retry` until it succeeds.

        Args:
            what: The name of the file; a newer attempt for the same one replaces an older one.
        """
        has_waited = what in self._waiting
        if self._try(what, attempt) and has_waited:
            self.retry()  # the disk is back

    def is_waiting(self, *names: str) -> bool:
        """Whether one of these could not be written when it was last tried."""
        return any(name in self._waiting for name in names)

    def retry(self):
        """Try everything that waits."""
        for what, (attempt, _) in list(self._waiting.items()):
            self._try(what, attempt)
        if self._is_outage and not self._waiting:
            print_above_bar("The disk takes writes again: what waited in memory is written.")
            self._is_outage = False

    def close(self):
        """Try everything for the last time, and say what is lost."""
        self.retry()
        for what, (_, reason) in self._waiting.items():
            print_above_bar(f"{what} could not be written before the run ended ({reason}): its last part is lost.")

    def _try(self, what: str, attempt: Callable[[], None]) -> bool:
        try:
            attempt()
        except OSError as error:
            reason = error.strerror or str(error)
            if reason not in [known for _, known in self._waiting.values()]:
                print_above_bar(
                    f"{what} cannot be written ({reason}): the run continues, and keeps it in memory until it can."
                )
            self._waiting[what] = (attempt, reason)
            self._is_outage = True
            return False
        self._waiting.pop(what, None)
        return True


def print_above_bar(text: str):
    """Print to stderr; a terminal that is gone does not end the run."""
    with suppress(OSError):
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
