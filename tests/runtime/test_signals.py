"""What a signal does to the process that receives it, and the command that resumes the run."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest

from modeling_gpt2repro.runtime import signals
from modeling_gpt2repro.runtime.signals import StopSignal, resume_command


def test_a_second_ctrl_c_interrupts_at_once(terminal_signals, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now))
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by a launcher
        assert stop.should_stop()
        now += signals.SAME_CTRL_C_SECONDS + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # afterwards Ctrl-C is Python's again
        os.kill(os.getpid(), signal.SIGINT)


def test_the_resume_command_is_the_command_of_the_run(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "train_accelerate.py", "--preset", "quickstart"])
    assert resume_command() == "python3 train_accelerate.py --preset quickstart --resume_from_checkpoint latest"
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "a/t.py", "--resume_from_checkpoint", "step-000005", "--seed", "1"]
    )
    assert resume_command() == "python a/t.py --seed 1 --resume_from_checkpoint latest"
