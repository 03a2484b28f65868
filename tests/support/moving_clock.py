"""A wall clock that jumps, as by a time server, a person or a virtual machine that was suspended."""

import time

import tqdm.std

HOUR = 3600.0
YEAR = 365 * 24 * HOUR


class MovingClock:
    """Replaces time.time, time.time_ns and tqdm's copy of it until the test ends; `jump` sets the clock."""

    def __init__(self, monkeypatch):
        self.offset = 0.0
        wall_clock = time.time
        monkeypatch.setattr(time, "time", lambda: wall_clock() + self.offset)
        monkeypatch.setattr(time, "time_ns", lambda: int((wall_clock() + self.offset) * 1e9))
        monkeypatch.setattr(tqdm.std, "time", time.time)

    def jump(self, seconds: float):
        """Move the clock forward, or back."""
        self.offset += seconds
