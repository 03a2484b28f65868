"""Which checkpoint a run resumes from: the newest whole one, one by its folder, one on the Hub."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from toy_runs import WEIGHTS, train_here

from modeling_gpt2repro.storage.checksums import write_checksums
from modeling_gpt2repro.storage.lock import LOCK_FILE
from modeling_gpt2repro.training.checkpoint_checks import CHECKSUMS_FILE, STATE_FILE


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(finished, shards, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with open(tmp_path / "run/step-000030/model.safetensors", "rb+") as file:
        file.truncate(1000)
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest") == 0
    output = capsys.readouterr().out
    assert "step-000030 is damaged (model.safetensors has 1,000 of" in output
    assert "resuming from step 20" in output
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


@pytest.mark.parametrize("damage", ["no listing", "state", "NaN"])
def test_latest_resumes_from_the_checkpoint_before_one_that_is_none(finished, shards, tmp_path, damage, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("model"))
    newest = run / "step-000030"
    (newest / CHECKSUMS_FILE).unlink()
    sentence = "has no training_state/files.json (an unfinished copy?) and is passed over."
    if damage == "state":
        (newest / STATE_FILE).write_text("[" * 100_000)
        write_checksums(newest, CHECKSUMS_FILE)
        sentence = "is damaged (training_state/state.json: it is nested too deeply) and is passed over."
    elif damage == "NaN":
        weights = load_file(newest / "model.safetensors")
        weights["transformer.wpe.weight"][3, 2] = float("nan")
        save_file(weights, newest / "model.safetensors", {"format": "pt"})
        write_checksums(newest, CHECKSUMS_FILE)
        sentence = "is damaged ('transformer.wpe.weight' in model.safetensors has NaN or infinity) and is passed over."
    assert train_here(run, shards, resume_from_checkpoint="latest") == 0
    output = capsys.readouterr().out
    assert f"{newest} {sentence}\n" in output
    assert "resuming from step 20" in output
    assert (run / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_a_run_whose_checkpoints_are_all_unfinished_does_not_start_anew(finished, shards, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("model"))
    for checkpoint in run.glob("step-*"):
        (checkpoint / CHECKSUMS_FILE).unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train_here(run, shards, resume_from_checkpoint="latest") == 2
    errors = capsys.readouterr().err
    assert errors.count("has no training_state/files.json (an unfinished copy?) and is passed over.") == 3
    assert "has no other checkpoint: give a new --output_dir." in errors
    assert "Traceback" not in errors
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK_FILE}
    assert after == {path: data for path, data in before.items() if path.name != LOCK_FILE}


def test_a_run_resumes_from_a_renamed_checkpoint(finished, shards, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("step-000030", "model"))
    (tmp_path / "run" / "step-000020").rename(tmp_path / "run" / "best")
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint=tmp_path / "run" / "best") == 0
    assert "resuming from step 20" in capsys.readouterr().out
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_a_finished_run_started_again_does_not_rewrite_its_checkpoint(finished, shards, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    checksums = tmp_path / "run" / "step-000030" / "training_state" / "files.json"
    written = checksums.stat().st_ino
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest") == 0
    assert checksums.stat().st_ino == written


def test_a_run_resumes_from_a_checkpoint_on_the_hub_at_a_revision(finished, shards, hub, warm_python, tmp_path):
    repository = hub.new_repository("models/toy/run")
    shutil.copytree(finished[0] / "step-000020", repository, dirs_exist_ok=True)
    program = f"""
from pathlib import Path
from toy_runs import train_here
shards = Path({str(shards)!r})
print("code", train_here(Path({str(tmp_path / "run")!r}), shards, resume_from_checkpoint="toy/run@main"))
print("code", train_here(Path({str(tmp_path / "none")!r}), shards, resume_from_checkpoint="toy/nowhere@v9"))
"""
    result = warm_python.run("-c", program)
    assert "resuming from step 20" in result.stdout, result.stderr[-2000:]
    assert result.stdout.count("code 0") == 1
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()
    assert "code 2" in result.stdout
    assert "toy/nowhere@v9 is not a folder, and the Hub does not provide it (" in result.stderr
