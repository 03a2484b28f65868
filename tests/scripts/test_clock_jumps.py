"""A toy run in whose middle the wall clock is set: nothing depends on it."""

import itertools
import json

import pytest
from moving_clock import HOUR, YEAR, MovingClock
from test_refusing_disk import between_steps
from toy_runs import WEIGHTS, logged_values, train_here

from modeling_gpt2repro.storage import lock


def test_a_clock_that_jumps_changes_nothing_of_a_run(finished, shards, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    clock = MovingClock(monkeypatch)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    jumps = {5: HOUR, 9: -2 * HOUR, 15: YEAR, 21: -2 * YEAR}
    between_steps(monkeypatch, {step: lambda by=by: clock.jump(by) for step, by in jumps.items()})
    assert train_here(run, shards) == 0
    assert capsys.readouterr().err == ""
    assert logged_values(run) == logged_values(finished[0])
    assert (run / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in finished[0].iterdir())
    for name in ("step_seconds", "data_seconds", "save_seconds", "evaluation_seconds"):
        assert all(0 <= seconds < HOUR / 2 for seconds in logged_values(run, name)), name
    state = json.loads((run / "step-000030/training_state/state.json").read_text())
    assert state["progress"]["train_seconds"] == pytest.approx(sum(logged_values(run, "step_seconds")), rel=1e-3)
    assert list(itertools.accumulate(logged_values(run, "tokens"), max)) == logged_values(run, "tokens")
