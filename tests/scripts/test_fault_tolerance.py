"""What a run survives: signals, skipped steps, full disks, dead processes. A resumed run equals one never stopped."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import pytest
import torch
from accelerate import Accelerator
from patience import PATIENCE_SECONDS, wait_until
from test_train import plain_start
from toy_runs import (
    CPU_FP32,
    RECIPE,
    SCRIPT,
    SEQUENCES_PER_STEP,
    TOKENS_PER_STEP,
    WEIGHTS,
    as_flags,
    at_step,
    logged_values,
    send_signal,
    train_here,
)

import train_accelerate
from modeling_gpt2repro.pretrain import checkpointing, setup
from modeling_gpt2repro.runs.read import read_metrics
from modeling_gpt2repro.runtime import signals
from modeling_gpt2repro.runtime.network import MAX_SAVE_TIME
from modeling_gpt2repro.runtime.signals import requested_num_processes


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    finished, shards, tmp_path, monkeypatch, capsys, terminal_signals, name
):
    with monkeypatch.context() as patch:
        at_step(patch, 17, send_signal(getattr(signal, name)))
        assert train_here(tmp_path / "run", shards) == 143
    output = capsys.readouterr().out
    assert f"Stopped by {name} after step 17. Resume with:" in output
    assert output.strip().endswith("--resume_from_checkpoint latest")
    assert (tmp_path / "run" / "step-000017" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest") == 0
    assert "resuming from step 17" in capsys.readouterr().out
    assert logged_values(tmp_path / "run") == logged_values(finished[0])
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_a_signal_at_the_last_step_or_during_an_evaluation_costs_nothing(finished, shards, tmp_path, monkeypatch):
    original = train_accelerate.validation_loss
    calls = itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 2:  # at step 10
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_accelerate, "validation_loss", interrupted)
        assert train_here(tmp_path / "run", shards) == 143
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # HellaSwag is left out, because the run has to stop soon.
    assert not [r for r in records if r["step"] == 10 and "hellaswag_completion_acc" in r]
    with monkeypatch.context() as patch:
        at_step(patch, 30 - 11, send_signal(signal.SIGTERM))
        assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest") == 0  # it was done anyway
    assert logged_values(tmp_path / "run") == logged_values(finished[0])


def make_nan(take_step, model):
    embedding = model.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, inputs, output: output * math.nan)
    try:
        return take_step()
    finally:
        hook.remove()


def test_a_step_with_a_nan_loss_is_skipped_and_logged(finished, shards, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 10, make_nan)
    assert train_here(tmp_path / "run", shards, save_total_limit=0, save_steps=5) == 0
    assert "step     10: skipped" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    event = next(record for record in records if record.get("event") == "skipped")
    assert event["step"] == 10
    _, _, order = plain_start(shards)
    assert event["rows_by_process"] == [order[9 * SEQUENCES_PER_STEP : 10 * SEQUENCES_PER_STEP]]
    losses = logged_values(tmp_path / "run")
    assert losses[9] is None  # JSON has no NaN
    assert losses[:9] == logged_values(finished[0])[:9]
    assert all(math.isfinite(loss) for loss in losses[10:])
    assert losses[10] != logged_values(finished[0])[10]
    # No checkpoint of a skipped step; the others are there.
    steps = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert steps == [f"step-{step:06d}" for step in (5, 15, 20, 25, 30)]


def test_a_skipped_step_is_logged_wherever_metrics_are_read(shards, tmp_path, monkeypatch, capsys):
    """Step 10 is followed by an evaluation and a save, which read what the log would have read at step 14."""
    at_step(monkeypatch, 10, make_nan)
    assert train_here(tmp_path / "run", shards, logging_steps=7) == 0
    assert "step     10: skipped" in capsys.readouterr().out
    assert not (tmp_path / "run" / "step-000010").exists()
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if record.get("event") == "skipped"] == [10]
    assert len(logged_values(tmp_path / "run")) == 30  # every step has its record, whenever it was read


def test_a_last_step_that_is_skipped_is_still_saved(shards, tmp_path, monkeypatch):
    at_step(monkeypatch, 30, make_nan)
    assert train_here(tmp_path / "run", shards) == 0
    assert (tmp_path / "run" / "step-000030").exists()


def test_outlier_window_random_state_and_training_time_are_restored(shards, tmp_path, monkeypatch):
    seen = []

    def record_state(take_step, model):
        seen.append((torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()))
        return take_step()

    def draw_numbers(take_step, model):
        torch.rand(7)
        return take_step()

    def state(step):
        return json.loads((tmp_path / "run" / f"step-0000{step}/training_state/state.json").read_text())

    options = {"skip_outliers": True, "save_total_limit": 0}
    with monkeypatch.context() as patch:
        at_step(patch, 8, draw_numbers)
        at_step(patch, 11, record_state)
        assert train_here(tmp_path / "run", shards, **options) == 0
    uninterrupted = state(30)
    for step in (20, 30):
        shutil.rmtree(tmp_path / "run" / f"step-0000{step}")
    with monkeypatch.context() as patch:
        at_step(patch, 1, record_state)
        assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest", **options) == 0
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] is seen[1][1] is True  # on a CPU, without a flag
    assert state(30)["guard"] == uninterrupted["guard"]
    assert state(30)["guard"]["good_steps"] == 30
    seconds = sum(logged_values(tmp_path / "run", "step_seconds"))
    assert state(30)["progress"]["train_seconds"] == pytest.approx(seconds, rel=1e-3)
    with monkeypatch.context() as patch:
        at_step(patch, 1, record_state)
        assert train_here(tmp_path / "other", shards, deterministic=False) == 0
    assert seen[2][1] is False


def test_only_consecutive_failed_saves_end_a_run(shards, tmp_path, monkeypatch):
    save = checkpointing.save_hub_folder
    calls = itertools.count(1)

    def fail_sometimes(*arguments):
        if next(calls) in (1, 2, 4, 5):
            raise OSError(28, "No space left on device")
        return save(*arguments)

    monkeypatch.setattr(checkpointing, "save_hub_folder", fail_sometimes)
    assert train_here(tmp_path / "run", shards, save_steps=5) == 0


def test_too_many_skipped_steps_end_a_run_with_advice(shards, tmp_path, capsys):
    assert train_here(tmp_path / "run", shards, learning_rate=1e20, eval_steps=0, max_skipped=4) == 1
    errors = capsys.readouterr().err
    assert "the updates of 4 steps in a row (from step " in errors
    assert "--resume_from_checkpoint latest and a lower --learning_rate than 1e+20" in errors
    assert not list((tmp_path / "run").glob("step-*"))


def full_disk(times: int) -> Callable:
    """A save_hub_folder that finds the disk full so many times, after having written half a file."""
    original = checkpointing.save_hub_folder
    calls = itertools.count(1)

    def save(model, tokenizer, folder, *others):
        if next(calls) <= times:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(model, tokenizer, folder, *others)

    return save


def test_a_full_disk_costs_one_checkpoint_and_is_reported(finished, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpointing, "save_hub_folder", full_disk(times=2))
    assert train_here(tmp_path / "run", shards, save_steps=5) == 0
    output = capsys.readouterr().out
    assert output.count("no checkpoint (No space left on device); the one before stays") == 2
    assert sorted(path.name for path in (tmp_path / "run").glob("*step-*")) == [
        "step-000020",
        "step-000025",
        "step-000030",
    ]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_last_checkpoint(shards, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 6, send_signal(signal.SIGTERM))
        assert train_here(tmp_path / "run", shards, save_steps=5) == 143
    monkeypatch.setattr(checkpointing, "save_hub_folder", full_disk(times=99))
    assert train_here(tmp_path / "run", shards, save_steps=5, resume_from_checkpoint="latest") == 1
    assert "free some space there, or make it writable, then resume from the last" in capsys.readouterr().err
    losses = logged_values(tmp_path / "run")
    assert losses[-1:] == losses[19:20]  # steps 10, 15 and 20 could not be saved
    assert sorted(path.name for path in (tmp_path / "run").glob("*step-*")) == ["step-000005", "step-000006"]


def test_the_last_checkpoint_waits_for_disk_space(finished, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpointing, "save_hub_folder", full_disk(times=4))
    monkeypatch.setattr(checkpointing, "SECONDS_BETWEEN_TRIES", 0)
    assert train_here(tmp_path / "run", shards, save_steps=0) == 0
    assert capsys.readouterr().out.count("Trying again every 0 s: free some space in") == 4
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()
    monkeypatch.setattr(checkpointing, "save_hub_folder", full_disk(times=99))
    assert train_here(tmp_path / "never", shards, save_steps=0) == 1
    assert "free some space there, or make it writable, then resume" in capsys.readouterr().err


def test_out_of_memory_names_the_batch_size_to_try(shards, tmp_path, monkeypatch, capsys):
    def exhausted(take_step, model):
        torch.empty(2**60)

    at_step(monkeypatch, 3, exhausted)
    assert train_here(tmp_path / "run", shards) == 1
    errors = capsys.readouterr().err
    assert "Memory ran out with --per_device_train_batch_size 4" in errors
    assert "--per_device_train_batch_size 2; a step then takes 4 micro-batches on each process" in errors


def start(output_dir, shards, processes: int, launcher: tuple[str, ...] = (), **overrides) -> subprocess.Popen:
    """A toy run of several processes that would take minutes."""
    if processes > 1:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    recipe = RECIPE | {
        "train_tokens": 100_000 * TOKENS_PER_STEP,
        "eval_steps": 0,
        "num_samples": 0,
        "hellaswag": "none",
    }
    flags = as_flags({"shards": shards, "output_dir": output_dir, **recipe, **overrides})
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *flags],
        env={**os.environ, **CPU_FP32},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(output_dir, step: int):
    log = output_dir / "metrics.jsonl"
    wait_until(lambda: log.exists() and f'"step": {step},' in log.read_text())


def training_processes(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The workers, by rank."""
    children = [child for child in psutil.Process(launcher.pid).children(recursive=True) if "RANK" in child.environ()]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(shards, tmp_path):
    launcher = start(tmp_path / "run", shards, processes=2)
    wait_for_step(tmp_path / "run", 20)
    training_processes(launcher)[1].send_signal(signal.SIGUSR1)
    output, errors = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert "Stopped by a signal to another process after step" in output, errors
    assert "exitcode  : 143" in errors
    newest = sorted((tmp_path / "run").glob("step-*"))[-1]
    step = int(newest.name.removeprefix("step-"))
    assert f"after step {step}." in output
    # Resumed on one process, it continues with the very next sequence.
    remaining = {"train_tokens": (step + 3) * TOKENS_PER_STEP, "eval_steps": 0, "num_samples": 0, "hellaswag": "none"}
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest", **remaining) == 0
    assert len(logged_values(tmp_path / "run")) == step + 3


def test_when_one_of_two_processes_dies_the_other_does_not_wait_for_the_time_out(shards, tmp_path):
    launcher = start(tmp_path / "run", shards, processes=2)
    wait_for_step(tmp_path / "run", 12)
    training_processes(launcher)[1].kill()
    _, errors = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert MAX_SAVE_TIME.total_seconds() > 2 * PATIENCE_SECONDS  # what a collective would wait for the dead
    assert "exitcode  : -9" in errors
    assert "(local_rank: 1) of binary" in errors or "Signal 9 (SIGKILL)" in errors
    assert sorted((tmp_path / "run").glob("step-*"))  # and the last checkpoint is there


def test_one_process_where_several_were_requested_is_an_error(shards, tmp_path, monkeypatch, capsys):
    command = ["python", "/usr/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "train_accelerate.py"]
    monkeypatch.setattr(signals, "launcher_command", lambda: command)
    assert requested_num_processes() == 2
    assert train_here(tmp_path / "run", shards) == 2
    assert (
        "asked for 2 processes and started one: on CPUs launch with ACCELERATE_USE_CPU=true" in capsys.readouterr().err
    )
    monkeypatch.setattr(
        signals, "launcher_command", lambda: [*command[:3], "--num_processes=8", "--config_file", "a.yaml"]
    )
    assert requested_num_processes() == 8
    monkeypatch.setattr(signals, "launcher_command", lambda: None)
    assert requested_num_processes() is None


def test_a_folder_that_cannot_be_written_is_reported_before_the_first_step(shards, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert train_here(tmp_path / "file" / "run", shards) == 2
    assert "cannot be written (Not a directory): give another" in capsys.readouterr().err


def test_a_run_stopped_before_its_first_step_can_be_resumed(finished, shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        original = setup.log_run_summary

        def interrupted(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        patch.setattr(setup, "log_run_summary", interrupted)
        assert train_here(tmp_path / "run", shards) == 143
    assert not list((tmp_path / "run").glob("step-*"))
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest") == 0
    assert logged_values(tmp_path / "run") == logged_values(finished[0])


def test_a_closed_terminal_does_not_end_a_run(finished, shards, tmp_path, monkeypatch):
    class ClosedTerminal:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        flush = isatty = lambda self: False

    def close_terminal(take_step, model):
        patch.setattr(sys, "stdout", ClosedTerminal())
        return take_step()

    with monkeypatch.context() as patch:
        at_step(patch, 5, close_terminal)
        assert train_here(tmp_path / "run", shards) == 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_trackers_get_values_that_all_of_them_accept(shards, tmp_path, monkeypatch):
    arguments = {}
    logged = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: arguments.update(config))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append((step, values)))
    assert train_here(tmp_path / "run", shards, report_to="all") == 0
    assert arguments["sample_prompts"] == '["Hello, I\'m a language model,"]'
    assert {type(value) for value in arguments.values()} <= {bool, int, float, str}
    assert [step for step, values in logged if "loss" in values] == list(range(1, 31))
    assert all(isinstance(value, int | float) for _, values in logged for value in values.values())
    assert not any("step" in values for _, values in logged)  # which Trackio reserves


def test_an_ignored_signal_stays_ignored(shards, tmp_path, monkeypatch, terminal_signals):
    """Under nohup a terminal that closes ends nothing."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 5, send_signal(signal.SIGHUP))
    assert train_here(tmp_path / "run", shards) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_accelerate_launch_reaches_the_run(shards, tmp_path, terminal_signals, name):
    """Its launcher of one process passes nothing on; the run notices that it has died."""
    launcher = start(tmp_path / "run", shards, 1, ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"))
    wait_for_step(tmp_path / "run", 12)
    (child,) = psutil.Process(launcher.pid).children()
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(launcher.stdout))
    reader.start()
    if name == "SIGINT":  # what a terminal does
        os.killpg(launcher.pid, signal.SIGINT)
    else:
        launcher.send_signal(signal.SIGTERM)
    child.wait(timeout=PATIENCE_SECONDS)
    reader.join(timeout=PATIENCE_SECONDS)
    output = "".join(lines)
    assert "Stopped by SIG" in output
    assert "accelerate.commands.launch --cpu --num_processes 1" in output
    launcher.wait(timeout=PATIENCE_SECONDS)
