"""A toy run whose disk refuses for a while: it ends as if nothing had happened, and nothing of it is missing."""

import errno
import itertools
import json
from pathlib import Path

import pytest
from refusing_disk import ERRORS, OPERATIONS, READING, RefusingDisk
from toy_runs import CPU_FP32, STEPS, WEIGHTS, logged_values, toy_flags, train_here

import train_accelerate
from modeling_gpt2repro.pretrain import checkpointing
from modeling_gpt2repro.storage import lock

WRITING = tuple(operation for operation in OPERATIONS if operation not in READING)


def between_steps(monkeypatch, actions: dict):
    """Call actions[n] before the n-th training step."""
    original = train_accelerate.train_step
    numbers = itertools.count(1)

    def act_and_step(*arguments, **limits):
        actions.get(next(numbers), lambda: None)()
        return original(*arguments, **limits)

    monkeypatch.setattr(train_accelerate, "train_step", act_and_step)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("error", "refused"), [("EROFS", WRITING), ("EIO", OPERATIONS)])
def test_a_disk_that_refuses_in_mid_run_costs_one_checkpoint(
    finished, shards, tmp_path, monkeypatch, capsys, error, refused
):
    """From step 8 to 12, with an evaluation, samples, a plot and a checkpoint at step 10."""
    run = tmp_path / "run"
    disk = RefusingDisk(monkeypatch, run)
    between_steps(monkeypatch, {8: lambda: disk.refuse(ERRORS[error], *refused), 13: disk.recover})
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)  # the lock's record cannot be written either
    assert train_here(run, shards, save_total_limit=0) == 0
    captured = capsys.readouterr()
    assert captured.err.count("cannot be written (") == 1
    assert captured.err.count("The disk takes writes again: what waited in memory is written.") == 1
    assert captured.out.count("no checkpoint (") == 1
    records = lines_of(run / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "validation_loss" in record] == [0, 10, 20, 30]
    assert [record["step"] for record in lines_of(run / "samples.jsonl")] == [0, 10, 20, 30]
    assert logged_values(run) == logged_values(finished[0])
    assert (run / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()
    assert sorted(path.name for path in run.glob("*step-*")) == ["step-000020", "step-000030"]
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [path.name for path in finished[0].iterdir() if not path.name.startswith("step-")]
        + ["step-000020", "step-000030"]
    )


def test_baselines_of_a_run_that_starts_on_a_full_disk_are_written_later(finished, shards, tmp_path, monkeypatch):
    run = tmp_path / "run"
    disk = RefusingDisk(monkeypatch, run)
    summary = train_accelerate.setup.log_run_summary

    def full_summary(*arguments):
        disk.refuse(errno.ENOSPC, *WRITING)
        summary(*arguments)

    monkeypatch.setattr(train_accelerate.setup, "log_run_summary", full_summary)
    between_steps(monkeypatch, {3: disk.recover})
    assert train_here(run, shards) == 0
    for name in ("baselines.json", "samples.jsonl"):
        assert (run / name).read_text() == (finished[0] / name).read_text()


def test_the_final_model_waits_for_disk_space(finished, shards, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    original = checkpointing.save_hub_folder
    calls = itertools.count(1)

    def full_for_a_while(model, tokenizer, folder, *others):
        if "model" in folder.name and next(calls) <= 3:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(model, tokenizer, folder, *others)

    monkeypatch.setattr(checkpointing, "save_hub_folder", full_for_a_while)
    monkeypatch.setattr(checkpointing, "SECONDS_BETWEEN_TRIES", 0)
    assert train_here(run, shards, save_steps=0) == 0
    output = capsys.readouterr().out
    assert output.count("The final model cannot be written (No space left on device).") == 3
    assert output.count("Trying again every 0 s: free some space in") == 3
    assert (run / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()
    assert not (run / ".model.partial").exists()


def test_a_final_model_that_cannot_be_written_is_written_by_the_resumed_run(
    finished, shards, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    original = checkpointing.save_hub_folder

    def full(model, tokenizer, folder, *others):
        if "model" in folder.name:
            raise OSError(errno.EROFS, "Read-only file system")
        return original(model, tokenizer, folder, *others)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_hub_folder", full)
        patch.setattr(checkpointing, "SECONDS_BETWEEN_TRIES", 0)
        assert train_here(run, shards) == 1
    captured = capsys.readouterr()
    assert captured.out.count("The final model cannot be written (Read-only file system).") == 20
    assert captured.err.strip().splitlines()[-1] == (
        f"the final model cannot be written to {run} (Read-only file system): free some space there, or make it "
        "writable, then give the same command with --resume_from_checkpoint latest, which writes it from the last "
        "checkpoint."
    )
    assert not (run / "model").exists()
    assert train_here(run, shards, resume_from_checkpoint="latest") == 0
    assert (run / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()
    assert logged_values(run) == logged_values(finished[0])


FULL_AT_THE_END = """
import sys
from pathlib import Path
from modeling_gpt2repro.pretrain import checkpointing

original = checkpointing.save_hub_folder

def full(model, tokenizer, folder, *others):
    if "model" in folder.name:
        raise OSError(28, "No space left on device")
    return original(model, tokenizer, folder, *others)

checkpointing.save_hub_folder = full
checkpointing.FINAL_SAVE_TRIES = 2
checkpointing.SECONDS_BETWEEN_TRIES = 0
import train_accelerate
train_accelerate.main(sys.argv[1:])
"""


def test_all_processes_end_where_the_final_model_cannot_be_written(shards, tmp_path, warm_python):
    (tmp_path / "full.py").write_text(FULL_AT_THE_END)
    flags = toy_flags(tmp_path / "run", shards, eval_steps=0, num_samples=0, hellaswag="none")
    # Without a launcher, which would end a process that waits for the other: here the test would find it waiting.
    main, other = warm_python.run_together(2, tmp_path / "full.py", *flags, check=False, **CPU_FP32)
    assert (main.returncode, other.returncode) == (1, 1)
    assert main.stdout.count("The final model cannot be written (No space left on device).") == 2
    assert "the final model cannot be written to" in main.stderr
    assert (tmp_path / "run/step-000030").exists()
