"""examples/plain_loop.py, the lecture's loop without Accelerate, against train_accelerate.py."""

import importlib

import pytest
from toy_runs import ROOT, logged_values, train_here

from modeling_gpt2repro.training.presets import PRESETS

STEPS = 15


def test_the_first_losses_of_the_plain_loop_equal_those_of_the_script(shards, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    plain_loop = importlib.import_module("plain_loop")
    quickstart = {
        name: value for name, value in PRESETS["quickstart"].items() if name not in ("dataset_name", "hellaswag")
    }
    # The warm-up of 85 steps covers all of them, so that the schedules agree although this run ends earlier.
    short = {"train_tokens": STEPS * 1792, "eval_steps": 0, "save_steps": 0, "num_samples": 0, "seed": 1337}
    short |= {"recipe": "lecture"}
    flags = quickstart | short | {"attn_implementation": "sdpa", "output_dir": tmp_path / "run"}
    assert train_here(shards=shards, **flags) == 0
    losses = plain_loop.main(["--shards", str(shards), "--max_steps", str(STEPS)])
    assert len(losses) == STEPS
    assert losses == pytest.approx(logged_values(tmp_path / "run"), abs=1e-5)
    assert losses[-1] < losses[0] - 0.5
