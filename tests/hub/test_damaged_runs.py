"""Runs whose files are damaged: a plot, a model card and a resumed run each read them, or say one sentence."""

import errno
import json
import random
import shutil
from contextlib import suppress

import pytest
from cards import model_card
from damage import NOT_OBJECTS, edit_json, random_bytes, random_json
from refusing_disk import RefusingDisk

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.runs import figures
from modeling_gpt2repro.runs.config import diff_arguments
from modeling_gpt2repro.runs.plots import plot_runs
from modeling_gpt2repro.runs.read import parse_record, read_run

MUTATIONS = 300
JSON_FILES = ("run.json", "baselines.json")
TINY = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=1))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a real run without its checkpoints, to be damaged."""
    ignored = shutil.ignore_patterns("step-*", "model")
    return shutil.copytree(finished[0], tmp_path / "run", ignore=ignored)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("kind", NOT_OBJECTS)
def test_json_that_is_no_object_of_ours(run, name, kind, capsys):
    if (name, kind) == ("baselines.json", "empty object"):
        return  # as good as none
    (run / name).write_bytes(NOT_OBJECTS[kind])
    with pytest.raises(SystemExit) as end:
        figures.main([str(run)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run / name} is damaged (")
    assert line.endswith(".")
    if name == "run.json":
        with pytest.raises(ValueError, match=r"run\.json is damaged \(.*\): restore it, or delete it"):
            diff_arguments(run, {}, {})


VALUES = {
    "text as tokens": ("run.json", lambda c: c["arguments"].update(train_tokens="7680"), "train_tokens is '7680'"),
    "a number as data": ("run.json", lambda c: c["arguments"].update(dataset_name=3), "dataset_name is 3"),
    "arguments": ("run.json", lambda c: c.update(arguments=[]), "arguments is []"),
    "hardware": ("run.json", lambda c: c.update(hardware="x"), "hardware is 'x'"),
    "no arguments": ("run.json", lambda c: c.pop("arguments"), "it has no arguments"),
    "text as baseline": ("baselines.json", lambda c: c["loss_baselines"].update(a="x"), "'a' is 'x'"),
    "list of baselines": ("baselines.json", lambda c: c.update(loss_baselines=[]), "loss_baselines is []"),
    "other baselines": ("baselines.json", lambda c: c.update(folder={}), "it has 'folder'"),
    "published": ("baselines.json", lambda c: c["hellaswag_baselines"].update(completion=3), "it has 3"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_another_type(run, kind, one_sentence):
    name, change, sentence = VALUES[kind]
    edit_json(run / name, change)
    with pytest.raises(ValueError, match=rf"{name} is damaged") as error:
        read_run(run)
    assert f"is damaged ({sentence})" in one_sentence(error)


LINES = {
    "a list": b"[]",
    "a number": b"3",
    "no step": b'{"loss": 3.0}',
    "negative step": b'{"step": -1, "loss": 3.0}',
    "fractional step": b'{"step": 1.5, "loss": 3.0}',
    "text as step": b'{"step": "1", "loss": 3.0}',
    "NaN tokens": b'{"step": 1, "tokens": NaN, "loss": 3.0}',
    "text as loss": b'{"step": 1, "tokens": 256, "loss": "3.0"}',
    "a list as loss": b'{"step": 1, "tokens": 256, "loss": [3.0]}',
    "a huge loss": b'{"step": 1, "tokens": 256, "loss": 1' + b"0" * 500 + b"}",
    "not UTF-8": b'{"step": 1, "event": "\xff"}',
    "brackets": b"[" * 100_000,
    "zeros, after a power cut": bytes(4096),
    "a resume without pairs": b'{"step": 1, "event": "resume", "changed": {"seed": 3}}',
    "a resume with text as tokens": b'{"step": 1, "event": "resume", "changed": {"train_tokens": [3, "x"]}}',
}


@pytest.mark.parametrize("kind", LINES)
def test_a_damaged_line_costs_only_itself_and_is_counted(run, kind, capsys):
    assert parse_record(LINES[kind]) is None
    before = read_run(run)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(LINES[kind] + b"\n")
    after = read_run(run)
    assert after.records == before.records
    assert (before.unreadable_lines, after.unreadable_lines) == (0, 1)
    if kind == "not UTF-8":
        figures.main([str(run)])
        assert capsys.readouterr().err == f"{run / 'metrics.jsonl'}: 1 damaged line(s) left out.\n"


@pytest.mark.parametrize("draw", [figures.plot_loss, lambda run: model_card(TINY, run_folder=run)])
def test_whatever_the_disk_refuses_is_an_error_that_a_training_waits_for(run, monkeypatch, draw):
    """An OSError: any other ends it."""
    disk = RefusingDisk(monkeypatch, run)
    counted = disk.refuse_nth(0, n=-1, and_later=False)
    draw(run)
    total = counted()
    assert total > 5
    refused = 0
    for n in range(total):
        disk.refuse_nth(errno.EIO, n, and_later=False)
        with suppress(OSError):
            draw(run)
            refused -= 1
        refused += 1
    assert refused > total / 2


def test_shards_that_the_disk_refuses_cost_the_card_their_name_only(run, tmp_path, monkeypatch):
    """The last checkpoint of a run that has lost its data has a card, too."""
    edit_json(run / "run.json", lambda config: config["arguments"].update(shards=str(tmp_path / "shards")))
    RefusingDisk(monkeypatch, tmp_path / "shards").refuse(errno.EIO)
    assert "## Results" in model_card(TINY, run_folder=run)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_that_is_damaged_in_mid_run_costs_plot_and_card_but_not_the_training(run, name):
    (run / name).write_bytes(b"{")
    with pytest.raises(OSError, match=f"{name} is damaged"):
        figures.plot_loss(run)
    assert "## Results" not in model_card(TINY, run_folder=run)


def test_nan_of_other_programs_is_not_a_number(run):
    assert parse_record('{"step": 1, "loss": NaN, "grad_norm": 1e999}') == {"step": 1, "loss": None, "grad_norm": None}


def test_random_damage_is_read_or_one_sentence(run, tiny_model):
    draw = random.Random(20261129)
    names = ("metrics.jsonl", *JSON_FILES)
    files = {name: (run / name).read_bytes() for name in names}
    refused = 0
    for number in range(MUTATIONS):
        name = draw.choice(names)
        if name == "metrics.jsonl":
            lines = files[name].splitlines()
            index = draw.choice([0, -1, draw.randrange(len(lines))])  # the first and the last are evaluations
            lines[index] = json.dumps(random_json(draw, json.loads(lines[index]))).encode()
            data = b"\n".join(lines) if draw.random() < 0.8 else random_bytes(draw, files[name])
        elif draw.random() < 0.8:
            data = json.dumps(random_json(draw, json.loads(files[name]))).encode()
        else:
            data = random_bytes(draw, files[name])
        (run / name).write_bytes(data)
        try:
            read = read_run(run)
            assert model_card(tiny_model, run_folder=run).encode()
            read.resumed_tokens(), read.skipped_tokens(), read.uses_fineweb_edu()
            for metric in ("loss", "validation_loss", "hellaswag_completion_acc_norm"):
                read.series(metric)
            if number % 30 == 0:
                plot_runs([read])
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{run / name} is damaged ("), message
            assert message.isprintable(), message
            refused += 1
        (run / name).write_bytes(files[name])
    assert 0 < refused < MUTATIONS
