"""How long tests wait for what must happen: far longer than it takes, even where many programs share the cores.

A wait ends as soon as it has happened, so patience costs nothing. `test_patience.py` checks that no test has a time
limit of its own, sleeps, or reads a clock that runs while other programs have the cores.
"""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 300


def wait_until(condition: Callable[[], object], failure: Callable[[], str] = lambda: "") -> None:
    """Return as soon as `condition()` is true.

    Args:
        failure: What the error says besides, such as the output of the program that is waited for.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"it has not happened in {PATIENCE_SECONDS} seconds. {failure()}"
        time.sleep(0.01)
