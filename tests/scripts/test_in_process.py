"""train_accelerate.main called from Python, as in a notebook: more than once, with bad input, by several processes."""

import os
import signal
import sys
import threading

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from patience import PATIENCE_SECONDS
from toy_runs import CPU_FP32, TOKENS_PER_STEP, logged_values, toy_flags

import train_accelerate

TWO_STEPS = {
    "train_tokens": 2 * TOKENS_PER_STEP,
    "warmup_tokens": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "num_samples": 0,
    "hellaswag": "none",
}


@pytest.fixture
def notebook(monkeypatch) -> None:
    """This process as a notebook's, which has a prompt. On the CPU, in fp32."""
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):  # of an earlier test, about to end
            thread.join(PATIENCE_SECONDS)
    for state in (AcceleratorState, PartialState, GradientState):  # of an earlier test, too
        state._shared_state.clear()
    for name, value in CPU_FP32.items():
        monkeypatch.setenv(name, value)


def process_settings() -> dict:
    """What one cell of a notebook leaves to the next one."""
    return {
        "environment": dict(os.environ),
        "handlers": {number: signal.getsignal(number) for number in signal.Signals},
        "threads": {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},
        "compute threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filled memory": torch.utils.deterministic.fill_uninitialized_memory,
        "TF32": torch.get_float32_matmul_precision(),
        "progress bars": transformers.utils.logging.is_progress_bar_enabled(),
        "accelerate": [dict(state._shared_state) for state in (AcceleratorState, PartialState, GradientState)],
        "process group": torch.distributed.is_initialized(),
        "arguments": list(sys.argv),
        "folder": os.getcwd(),
    }


def test_main_runs_twice_and_leaves_the_process_as_it_was(notebook, shards, tmp_path, monkeypatch):
    transformers.utils.logging.enable_progress_bar()
    before = process_settings()
    for run in ("first", "second"):
        assert train_accelerate.main(toy_flags(tmp_path / run, shards, **TWO_STEPS)) is None
        assert process_settings() == before
    assert logged_values(tmp_path / "second") == logged_values(tmp_path / "first")


def test_bad_input_raises_with_one_sentence_and_leaves_the_process_as_it_was(notebook, shards, tmp_path, capsys):
    before = process_settings()
    for flags, sentence in (
        (["--learning_rate", "-1"], "main: learning_rate (-1.0) must be greater than 0.\n"),  # before the accelerator
        (["--shards", str(tmp_path / "no")], f"there is no folder {tmp_path / 'no'}: prepare it"),  # after it
    ):
        with pytest.raises(SystemExit) as end:
            train_accelerate.main([*toy_flags(tmp_path / "run", shards, **TWO_STEPS), *flags])
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err
        assert process_settings() == before


def test_a_run_that_an_error_ends_leaves_the_process_as_it_was(notebook, shards, tmp_path, monkeypatch):
    before = process_settings()

    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(train_accelerate, "train_step", fail)
    with pytest.raises(ZeroDivisionError):
        train_accelerate.main(toy_flags(tmp_path / "run", shards, **TWO_STEPS))
    assert process_settings() == before


NOTEBOOK_LAUNCHER = """
import sys
import torch

torch.set_num_threads(2)
a = torch.randn(500, 500, requires_grad=True)
(a @ a).sum().backward()  # starts OpenMP's threads, which the processes that are forked below do not have

from accelerate import notebook_launcher
from train_accelerate import main

notebook_launcher(main, args=(sys.argv[1:],), num_processes=2)
assert torch.get_num_threads() == 2 and not torch.are_deterministic_algorithms_enabled()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="notebook_launcher forks")
def test_the_notebook_launcher_trains_with_two_processes_as_one_does(notebook, warm_python, shards, tmp_path):
    train_accelerate.main(toy_flags(tmp_path / "one", shards, **TWO_STEPS))
    warm_python.run("-c", NOTEBOOK_LAUNCHER, *toy_flags(tmp_path / "two", shards, **TWO_STEPS), OMP_NUM_THREADS="2")
    assert '"processes": 2' in (tmp_path / "two" / "run.json").read_text()
    assert logged_values(tmp_path / "two") == pytest.approx(logged_values(tmp_path / "one"), abs=1e-5)
