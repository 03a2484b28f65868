"""train_accelerate.py --preflight and --find_batch_size, as a whole."""

import shutil
import signal

import pytest
from toy_runs import CPU_FP32, at_step, logged_values, send_signal, toy_flags, train_here

from modeling_gpt2repro.pretrain import checkpointing
from modeling_gpt2repro.runtime.network import MAX_SAVE_TIME


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


# In the second of two processes a signal arrives while a step is trained.
SIGNALLED = """
import os, signal, sys
import torch
import train_accelerate
from modeling_gpt2repro.runtime.signals import StopSignal

train_step, enter = train_accelerate.train_step, StopSignal.__enter__

def signalled(*arguments, **limits):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return train_step(*arguments, **limits)

def entered(self):
    enter(self)
    print("time-out", self._group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    return self

train_accelerate.train_step, StopSignal.__enter__ = signalled, entered
train_accelerate.main(sys.argv[1:])
"""


def test_a_signal_to_one_of_two_processes_ends_the_preflight_of_both(shards, warm_python, tmp_path):
    flags = [*toy_flags(tmp_path / "run", shards), "--preflight"]
    ended = warm_python.run_together(2, "-c", SIGNALLED, *flags, check=False, **CPU_FP32)
    assert [process.returncode for process in ended] == [143, 143], ended
    assert "The preflight was stopped by SIGUSR1, and nothing of it is kept." in ended[0].stdout
    assert "tokens/s" not in ended[0].stdout
    assert [f"time-out {MAX_SAVE_TIME.total_seconds()}" in process.stdout for process in ended] == [True, True]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_preflight_ends_at_ctrl_c(shards, terminal_signals, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 2, send_signal(signal.SIGINT))
    assert train_here(tmp_path / "run", shards, preflight=True) == 143
    assert "stopped by SIGINT" in capsys.readouterr().out
    assert list((tmp_path / "run").iterdir()) == []
