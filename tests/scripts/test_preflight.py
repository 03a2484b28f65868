"""train_accelerate.py --preflight and --find_batch_size, as a whole."""

import shutil

import pytest
from toy_runs import logged_values, train_here

from modeling_gpt2repro.pretrain import checkpointing


def test_a_preflight_leaves_nothing_behind_and_does_not_change_the_run(finished, shards, tmp_path, capsys):
    assert train_here(tmp_path / "run", shards, preflight=True, save_steps=5) == 0
    output = capsys.readouterr().out
    for expected in (
        "without --deterministic a step takes",
        "tokens/s",
        "whole run",
        "a checkpoint",
        "training data",
        "memory",
    ):
        assert expected in output
    assert list((tmp_path / "run").iterdir()) == []
    assert train_here(tmp_path / "run", shards, preflight=True, deterministic=False) == 0
    assert "without --deterministic" not in capsys.readouterr().out
    assert train_here(tmp_path / "run", shards, find_batch_size=True) == 0
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(finished[0]), abs=1e-5)


def test_a_preflight_of_a_resumed_run_leaves_its_checkpoints_alone(finished, shards, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("step-000030", "model"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    flags = {"preflight": True, "resume_from_checkpoint": "latest", "save_total_limit": 1}
    assert train_here(tmp_path / "run", shards, **flags) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_preflight_reports_a_loss_that_is_not_a_number(shards, tmp_path, capsys):
    assert train_here(tmp_path / "run", shards, preflight=True, learning_rate=1e20) == 1
    assert "of 26 steps was not usable: try a lower --learning_rate than 1e+20" in capsys.readouterr().out


def test_a_preflight_reports_a_disk_that_is_full(shards, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing, "save_hub_folder", full)
    assert train_here(tmp_path / "run", shards, preflight=True) == 1
    assert "(No space left on device): free some space there" in capsys.readouterr().out
