"""Data that cannot be read any more in mid-run: tried again, then a checkpoint, one sentence, and exit code 143."""

import json
import os
import shutil
import signal
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare_from_hub import IMPATIENT
from toy_runs import CPU_FP32, WEIGHTS, at_step, logged_values, send_signal, toy_flags, train_here

from modeling_gpt2repro.pretrain import setup
from modeling_gpt2repro.pretrain.setup import REQUEUE_FILE
from modeling_gpt2repro.runs.folder import STOPPED_FILE

FILES = 9
# Trains; in the step whose number comes first, or for 0 between opening and training, the Hub's faults begin.
TRAIN = """
import itertools
import os
import sys
from pathlib import Path
import train_accelerate

first, faults, rules, *flags = sys.argv[1:]
numbers = itertools.count(1)
train_step = train_accelerate.train_step

log_run_summary = train_accelerate.setup.log_run_summary

def begin_faults(number):
    if number == int(first) and os.environ.get("RANK", "0") == "0":
        Path(faults + ".new").write_text(rules)
        Path(faults + ".new").replace(faults)

def counted_step(*arguments, **options):
    begin_faults(next(numbers))
    return train_step(*arguments, **options)

train_accelerate.train_step = counted_step
train_accelerate.setup.log_run_summary = lambda args, *others: (
    log_run_summary(args, *others), begin_faults(0), others[0].wait_for_everyone()
)
train_accelerate.main(flags)
"""
# By the real clock; stops the run while it waits for data.
STOPPED_WHILE_IT_WAITS = """
import os
import signal
from modeling_gpt2repro.runs.logger import RunLogger

show = RunLogger.show_waiting
RunLogger.show_waiting = lambda logger, problem: (show(logger, problem), os.kill(os.getpid(), signal.SIGTERM))
"""


@pytest.fixture(scope="module")
def stream(hub, warm_python, tiny_texts, tiny_tokenizer, tmp_path_factory):
    """train(run, rules, processes): a toy run that streams nine files of one row group each; the Hub fails by these
    rules from step `first` on. Returns its processes."""
    folder = hub.new_repository("datasets/ns/stream")
    draw = Random(0)
    for number in range(FILES):
        texts = draw.choices(tiny_texts, k=3)
        pq.write_table(pa.table({"text": texts}), folder / f"part-{number}.parquet")
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(tokenizer)
    options = {"dataset_name": "ns/stream", "dataset_config_name": "default", "tokenizer": tokenizer}

    def train(run, rules=(), processes=1, first=8, before=IMPATIENT, **more):
        flags = toy_flags(run, None, **options, num_samples=0, save_steps=0, **more)
        faults = hub.root / "faults.json"
        words = ["-c", before + TRAIN, first, faults, json.dumps(list(rules)), *flags]
        try:
            return warm_python.run_together(processes, *words, check=False, **CPU_FP32)
        finally:
            faults.unlink(missing_ok=True)

    return train


@pytest.fixture(scope="module")
def undisturbed(stream, tmp_path_factory):
    """The losses of the stream's run without faults."""
    run = tmp_path_factory.mktemp("undisturbed")
    (process,) = stream(run)
    assert process.returncode == 0, process.stderr
    return logged_values(run)


def test_a_stream_survives_a_few_refusals(stream, undisturbed, hub, tmp_path):
    """By the data host, as of an expired signature, and by the Hub itself; each attempt asks for a new address."""
    rules = [
        {"match": "GET /lfs/.*part", "status": 403, "times": 2},
        {"match": "GET /lfs/.*part", "status": 404, "times": 2},
        {"match": "GET /datasets/ns/stream/resolve", "status": 401, "times": 2},
    ]
    seen = len(hub.log())
    (process,) = stream(tmp_path / "run", rules)
    assert process.returncode == 0, process.stderr
    assert logged_values(tmp_path / "run") == undisturbed
    answers = [(line["origin"], line["status"]) for line in hub.log()[seen:] if "part" in line["path"]]
    assert [answers.count(("cdn", 403)), answers.count(("cdn", 404)), answers.count(("hub", 401))] == [2, 2, 2]
    assert answers.count(("hub", 302)) == sum(origin == "cdn" for origin, _ in answers)  # none was asked for twice


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_that_stays_refused_ends_with_a_checkpoint_and_resumes(stream, undisturbed, tmp_path, processes):
    """With two processes only one of them reads the file at first; both stop after the same step."""
    rules = [{"match": "GET /lfs/.*part-3", "status": 403}]
    results = stream(tmp_path / "run", rules, processes)
    assert [process.returncode for process in results] == [143] * processes, results[-1].stderr
    assert "Traceback" not in results[0].stderr
    marker = json.loads((tmp_path / "run" / STOPPED_FILE).read_text())
    step = marker["step"]
    assert 8 <= step == marker["steps_made"] < 30
    assert marker["by_signal"] is False
    assert f"Stopped after step {step}: row group 0 of hf://datasets/ns/stream@" in results[0].stdout
    assert "part-3.parquet cannot be read: localhost answered 403 Forbidden to http://" in results[0].stdout
    assert results[0].stdout.strip().endswith("--resume_from_checkpoint latest")
    assert (tmp_path / "run" / f"step-{step:06d}" / "model.safetensors").exists()
    losses = logged_values(tmp_path / "run")
    assert losses == pytest.approx(undisturbed[:step], rel=0 if processes == 1 else 1e-4)
    if processes == 1:
        (process,) = stream(tmp_path / "run", resume_from_checkpoint="latest")
        assert process.returncode == 0, process.stderr
        assert logged_values(tmp_path / "run") == undisturbed
        assert not (tmp_path / "run" / STOPPED_FILE).exists()


def test_a_first_step_that_cannot_be_read_stops_all_processes(stream, tmp_path):
    results = stream(tmp_path / "run", [{"match": "GET /lfs/.*part-3", "status": 403}], processes=2, first=0)
    assert [process.returncode for process in results] == [143, 143], results[-1].stderr
    assert "Stopped after step 0: row group 0 of hf://" in results[0].stdout
    assert json.loads((tmp_path / "run" / STOPPED_FILE).read_text())["steps_made"] == 0
    assert not list((tmp_path / "run").glob("step-*"))


def test_a_run_says_that_it_waits_for_data_and_can_be_stopped_meanwhile(stream, tmp_path):
    """The process that waits says so; and it ends though it would be asking for minutes."""
    rules = [{"match": "GET /lfs/.*part-3", "status": 403}]
    results = stream(tmp_path / "run", rules, processes=2, before=STOPPED_WHILE_IT_WAITS)
    assert [process.returncode for process in results] == [143, 143], results[-1].stderr
    output = results[0].stdout + results[1].stdout
    assert output.count("Waiting for data, for up to 5 minutes: row group 0 of hf://datasets/ns/stream@") == 1
    assert "part-3.parquet cannot be read: localhost answered 403 Forbidden to http://" in output
    marker = json.loads((tmp_path / "run" / STOPPED_FILE).read_text())
    assert marker["by_signal"] is True
    assert (tmp_path / "run" / f"step-{marker['step']:06d}" / "model.safetensors").exists()


@pytest.fixture
def own_shards(shards, tmp_path):
    """A copy of the toy shards that a test may damage."""
    shutil.copytree(shards.parent, tmp_path / "data")
    return tmp_path / "data" / shards.name


def in_step(action):
    """For `at_step`: do something to the data before the step."""

    def act(take_step, model):
        action()
        return take_step()

    return act


def truncate(shards, pattern):
    for path in shards.glob(pattern):
        os.truncate(path, 200)


def test_truncated_shards_end_a_run_with_a_checkpoint_and_not_by_a_signal(
    finished, own_shards, tmp_path, monkeypatch, capsys
):
    requeue = tmp_path / "requeue"
    monkeypatch.setenv(REQUEUE_FILE, str(requeue))
    kept = tmp_path / "kept"
    shutil.copytree(own_shards, kept)
    with monkeypatch.context() as patch:
        at_step(patch, 8, in_step(lambda: truncate(own_shards, "train_*.npy")))
        assert train_here(tmp_path / "run", own_shards) == 143
    marker = json.loads((tmp_path / "run" / STOPPED_FILE).read_text())
    assert 8 <= marker["step"] == marker["steps_made"] <= 10  # two steps were in memory
    output = capsys.readouterr().out
    assert f"Stopped after step {marker['step']}: {own_shards}/train_0000" in output
    assert ".npy cannot be read: it has become shorter since the run opened it. When it can be read again" in output
    assert requeue.read_text() in output
    shutil.copytree(kept, own_shards, dirs_exist_ok=True)
    requeue.unlink()
    assert train_here(tmp_path / "run", own_shards, resume_from_checkpoint="latest") == 0
    assert not requeue.exists()
    assert logged_values(tmp_path / "run") == logged_values(finished[0])
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished[0] / WEIGHTS).read_bytes()


def test_only_a_run_that_made_steps_and_lost_its_data_asks_to_be_queued_again(
    own_shards, tmp_path, monkeypatch, capsys
):
    requeue = tmp_path / "requeue"
    monkeypatch.setenv(REQUEUE_FILE, str(requeue))
    with monkeypatch.context() as patch:
        at_step(patch, 8, send_signal(signal.SIGTERM))
        assert train_here(tmp_path / "run", own_shards) == 143
    marker = json.loads((tmp_path / "run" / STOPPED_FILE).read_text())
    assert (marker["step"], marker["steps_made"], marker["by_signal"]) == (8, 8, True)
    assert marker["message"] in capsys.readouterr().out
    with monkeypatch.context() as patch:
        summary = setup.log_run_summary
        patch.setattr(setup, "log_run_summary", lambda *given: (summary(*given), truncate(own_shards, "train_*.npy")))
        assert train_here(tmp_path / "run", own_shards, resume_from_checkpoint="latest") == 143
    marker = json.loads((tmp_path / "run" / STOPPED_FILE).read_text())
    assert (marker["step"], marker["steps_made"], marker["by_signal"]) == (8, 0, False)
    assert not requeue.exists()


def test_a_preflight_whose_data_cannot_be_read_ends_in_a_sentence(own_shards, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 3, in_step(lambda: truncate(own_shards, "train_*.npy")))
    assert train_here(tmp_path / "run", own_shards, preflight=True) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith(".npy cannot be read: it has become shorter since the run opened it.")
    assert f": {own_shards}/train_0000" in message


@pytest.mark.parametrize("how", ["deleted", "replaced", "validation truncated"])
def test_shards_that_vanish_do_not_disturb_a_run_that_has_opened_them(finished, own_shards, tmp_path, monkeypatch, how):
    """Files stay readable for those that have opened them, and validation tokens are in memory."""

    def act():
        if how == "deleted":
            shutil.rmtree(own_shards)
        elif how == "replaced":
            for path in own_shards.glob("*.npy"):
                path.with_suffix(".new").write_bytes(bytes(path.stat().st_size))
                path.with_suffix(".new").replace(path)
        else:
            truncate(own_shards, "validation_*.npy")

    at_step(monkeypatch, 8, in_step(act))
    assert train_here(tmp_path / "run", own_shards) == 0
    assert logged_values(tmp_path / "run") == logged_values(finished[0])
    assert logged_values(tmp_path / "run", "validation_loss") == logged_values(finished[0], "validation_loss")
