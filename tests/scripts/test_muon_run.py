"""Whole runs with --recipe muon: they resume bit for bit, and from the checkpoints of any number of processes."""

import json
import math
import shutil
import signal

import pytest
from safetensors.torch import load_file
from toy_runs import CPU_FP32, SCRIPT, STEPS, WEIGHTS, logged_values, toy_flags, train_here

from modeling_gpt2repro.storage.checksums import write_checksums
from modeling_gpt2repro.training.checkpoint_checks import CHECKSUMS_FILE

KILLED = """
import signal
import sys
import pytest
from toy_runs import at_step, send_signal
import train_accelerate

with pytest.MonkeyPatch.context() as patch:
    at_step(patch, 17, send_signal(signal.SIGKILL))
    train_accelerate.main(sys.argv[1:])
"""


def test_the_first_loss_is_that_of_guessing_and_the_last_is_below_the_lecture_recipes(finished, finished_muon):
    losses = logged_values(finished_muon)
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert losses[0] == logged_values(finished[0])[0]
    assert losses[-1] < logged_values(finished[0])[-1]


def test_a_run_killed_with_signal_9_resumes_bit_for_bit(finished_muon, shards, warm_python, tmp_path, capsys):
    flags = toy_flags(tmp_path / "run", shards, recipe="muon")
    result = warm_python.run("-c", KILLED, *flags, check=False, **CPU_FP32)
    assert result.returncode == -signal.SIGKILL
    assert train_here(tmp_path / "run", shards, recipe="muon", resume_from_checkpoint="latest") == 0
    assert "resuming from step 10" in capsys.readouterr().out
    assert logged_values(tmp_path / "run") == logged_values(finished_muon)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished_muon / WEIGHTS).read_bytes()
    states = [
        folder / "step-000030/training_state/optimizer.safetensors" for folder in (tmp_path / "run", finished_muon)
    ]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_two_processes_continue_a_checkpoint_of_one_and_one_continues_theirs(
    finished_muon, shards, warm_python, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished_muon, run, ignore=shutil.ignore_patterns("step-000020", "step-000030", "model"))
    resumed = {"recipe": "muon", "per_device_train_batch_size": 2, "resume_from_checkpoint": "latest"}
    first, _ = warm_python.run_together(2, SCRIPT, *toy_flags(run, shards, **resumed), **CPU_FP32)
    assert "resuming from step 10" in first.stdout
    assert logged_values(run) == pytest.approx(logged_values(finished_muon), abs=1e-5)
    shutil.rmtree(run / "step-000030")
    assert train_here(run, shards, **resumed) == 0
    assert "resuming from step 20" in capsys.readouterr().out
    assert logged_values(run) == pytest.approx(logged_values(finished_muon), abs=1e-5)


def test_a_checkpoint_names_the_state_of_each_parameter(finished_muon):
    state = load_file(finished_muon / "step-000030/training_state/optimizer.safetensors")
    weights = load_file(finished_muon / "step-000030/model.safetensors")
    for name, weight in weights.items():
        kinds = {
            kind: state.pop(f"{name}.{kind}") for kind in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{kind}" in state
        }
        is_matrix = ".h." in name and weight.ndim == 2
        assert bool(kinds) != is_matrix, name
        if is_matrix:
            assert state.pop(f"{name}.momentum_buffer").shape == weight.shape
    assert not state


@pytest.mark.parametrize(("saved", "given"), [("lecture", "muon"), ("muon", "lecture")])
def test_a_checkpoint_of_another_optimizer_is_refused_in_one_sentence(
    finished, finished_muon, shards, tmp_path, capsys, saved, given
):
    run = tmp_path / "run"
    later = shutil.ignore_patterns("step-000020", "step-000030", "model")
    shutil.copytree(finished_muon if saved == "muon" else finished[0], run, ignore=later)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train_here(run, shards, recipe=given, resume_from_checkpoint="latest") == 2
    had, asked = ("muon", "adamw") if saved == "muon" else ("adamw", "muon")
    assert (
        f": {run}/step-000010 holds the state of the optimizer {had}, which {asked} cannot continue from: give the "
        f"--recipe of its run, or --optimizer {had}, or start a new run from its weights with --init_from "
        f"{run}/step-000010 and another --output_dir.\n"
    ) in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert train_here(run, shards, recipe=saved, resume_from_checkpoint="latest") == 0


def test_a_checkpoint_of_an_older_version_resumes_bit_for_bit(finished, shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("step-000020", "step-000030", "model"))
    for name in ("step-000010/training_state/state.json", "run.json"):
        saved = json.loads((run / name).read_text())
        saved.pop("optimizer", None)
        for flag in ("optimizer", "recipe"):
            saved.get("arguments", {}).pop(flag, None)
        (run / name).write_text(json.dumps(saved))
    (run / "step-000010" / CHECKSUMS_FILE).unlink()
    write_checksums(run / "step-000010", CHECKSUMS_FILE)
    assert train_here(run, shards, resume_from_checkpoint="latest") == 0
    assert (run / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_another_recipe_of_the_same_optimizer_continues_and_is_announced(finished, shards, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("step-000020", "step-000030", "model"))
    assert train_here(run, shards, recipe="fast-adamw", resume_from_checkpoint="latest") == 0
    output = capsys.readouterr().out
    assert "This run began with recipe lecture and continues with fast-adamw." in output
    assert "The learning rate jumps after step 10 from" in output


def test_the_start_shows_what_each_part_of_the_optimizer_updates(finished, shards, tmp_path, capsys):
    assert "\noptimizer    AdamW on 35," in finished[1]
    assert "\nrecipe " not in finished[1]
    assert train_here(tmp_path / "run", shards, recipe="muon", train_tokens=256) == 0
    output = capsys.readouterr().out
    matrices = 2 * 12 * 32 * 32
    rest = 300 * 32 + 32 * 32
    vectors = 2 * (4 + 9) * 32 + 2 * 32
    assert (
        f"\noptimizer    AdamW on {rest:,} parameters (2 tensors) with decay 0.1 and on {vectors:,} parameters (18 "
        f"tensors) with decay 0; Muon on {matrices:,} parameters (8 tensors) with decay 0.1\n"
    ) in output
    assert "\nrecipe       muon; no source has tried it at this size, so 3 x the usual rate is a guess\n" in output
