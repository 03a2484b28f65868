"""Progress bars keep moving, whatever happens to the wall clock."""

import io
import re

import pytest
from moving_clock import HOUR, YEAR, MovingClock

from modeling_gpt2repro.runtime.progress import SteadyBar


@pytest.mark.parametrize("jump", [HOUR, YEAR, -HOUR, -YEAR])
def test_a_bar_moves_on_after_the_wall_clock_was_set(monkeypatch, jump):
    clock = MovingClock(monkeypatch)
    screen = io.StringIO()
    with SteadyBar(total=1000, file=screen, mininterval=0) as bar:
        bar.update(10)
        clock.jump(jump)
        bar.update(10)
        shown = screen.getvalue().split("\r")[-1]
    assert "20/1000" in shown
    assert re.search(r"\[00:0\d<", shown)  # seconds since the start
