"""eval_hellaswag.py: its table and its JSON, the sentences for what cannot be scored, and the Hub as a source."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import eval_hellaswag
from modeling_gpt2repro.evaluation.hellaswag import score_hellaswag, summarize
from modeling_gpt2repro.evaluation.hellaswag_rows import PROTOCOLS

ROOT = Path(__file__).resolve().parent.parent


def write_rows(path, rows):
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, hellaswag_tokenizer, make_model):
    folder = tmp_path_factory.mktemp("model")
    make_model("ours", len(hellaswag_tokenizer)).save_pretrained(folder)
    hellaswag_tokenizer.save_pretrained(folder)
    return folder


def test_the_script_prints_a_table_and_writes_json(
    tmp_path, model_folder, hellaswag_tokenizer, capsys, hellaswag_rows, make_model
):
    data, output = write_rows(tmp_path / "rows.jsonl", hellaswag_rows), tmp_path / "result.json"
    arguments = [
        "--model",
        str(model_folder),
        "--data",
        data,
        "--device",
        "cpu",
        "--limit",
        "5",
        "--output",
        str(output),
    ]
    eval_hellaswag.main(arguments)
    report = json.loads(output.read_text())
    expected = summarize(
        score_hellaswag(make_model("ours", len(hellaswag_tokenizer)), hellaswag_tokenizer, hellaswag_rows[:5])
    )
    assert report["results"] == json.loads(json.dumps(expected))
    assert len(report["data_sha256"]) == 64
    assert report["arguments"]["limit"] == 5
    assert [path.name for path in tmp_path.iterdir() if "result" in path.name] == ["result.json"]
    printed = capsys.readouterr().out
    for protocol in PROTOCOLS:
        assert f"{protocol:12}{expected[protocol]['acc']:8.4f} [" in printed
    assert "0.3114   gpt2, lm-evaluation-harness" in printed
    assert "These 5 rows are not the official 10042" in printed

    eval_hellaswag.main([*arguments[:6], "--protocol", "lm-eval", "--dtype", "bfloat16"])
    printed = capsys.readouterr().out
    assert "completion" not in printed
    assert "gpt2-xl, lm-evaluation-harness" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_script_loads_the_model_in_the_dtype_asked_for(model_folder, dtype):
    args = eval_hellaswag.EvalHellaSwagArguments(model=str(model_folder), data=__file__, dtype=dtype, device="cpu")
    model, _ = eval_hellaswag.load_model(args)
    assert model.dtype == getattr(torch, dtype)


def problems_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        eval_hellaswag.main(list(arguments))
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_the_script_tells_every_problem_of_a_command_line_at_once(tmp_path, capsys):
    error = problems_of(
        capsys,
        *("--model", str(tmp_path / "none"), "--data", "none.jsonl", "--limit", "0", "--batch_tokens", "-1"),
        *("--protocol", "other", "--dtype", "int8", "--device", "warp9", "--output", str(tmp_path / "no" / "x.json")),
    )
    assert "8 problems; nothing was started" in error
    for sentence in (
        "there is no such folder",
        "there is no file none.jsonl",
        "--limit (0) must be at least 1",
        "--batch_tokens (-1) must be at least 1",
        "--protocol takes one of completion, lm-eval, both, not 'other'",
        "--dtype takes one of float32, bfloat16, float16, not 'int8'",
        "--device warp9 cannot be used here",
        "make it first",
    ):
        assert sentence in error
    assert "has no config.json" in problems_of(capsys, "--model", str(tmp_path), "--data", __file__)
    assert "is a file" in problems_of(capsys, "--model", __file__, "--data", __file__)
    assert "is a folder: give the name of a file" in problems_of(capsys, "--data", __file__, "--output", str(tmp_path))


def test_the_script_reads_the_data_before_the_model(tmp_path, model_folder, capsys, hellaswag_rows):
    data = write_rows(tmp_path / "rows.jsonl", [replace(hellaswag_rows[0], label=7)])
    (tmp_path / "config.json").write_text("{}")
    assert "rows.jsonl, line 1: label is 7" in problems_of(capsys, "--model", str(tmp_path), "--data", data)


def broken_tokenizer(folder, tokenizer, make_model):
    (folder / "tokenizer.json").unlink()


def broken_weights(folder, tokenizer, make_model):
    (folder / "model.safetensors").write_bytes(b"no")


def other_tokenizer(folder, tokenizer, make_model):
    make_model("ours", len(tokenizer) - 1).save_pretrained(folder)


def incomplete_weights(folder, tokenizer, make_model):
    model = make_model("stock", len(tokenizer))
    model.transformer.h = model.transformer.h[:1]
    model.save_pretrained(folder)


def not_a_number(folder, tokenizer, make_model):
    model = make_model("ours", len(tokenizer))
    model.transformer.ln_f.weight.data.fill_(math.nan)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (broken_tokenizer, "its tokenizer could not be loaded: "),
        (broken_weights, "its model could not be loaded: "),
        (other_tokenizer, "its tokenizer has 320 tokens, its embedding 319"),
        (incomplete_weights, "12 of its weights are missing (transformer.h.1.attn.c_attn.bias, ...)"),
        (not_a_number, "gives NaN or infinite scores"),
    ],
)
def test_a_model_that_cannot_be_scored_is_told_in_a_sentence(
    tmp_path, hellaswag_tokenizer, capsys, spoil, sentence, hellaswag_rows, make_model
):
    make_model("ours", len(hellaswag_tokenizer)).save_pretrained(tmp_path)
    hellaswag_tokenizer.save_pretrained(tmp_path)
    spoil(tmp_path, hellaswag_tokenizer, make_model)
    data = write_rows(tmp_path / "rows.jsonl", hellaswag_rows[:2])
    error = problems_of(capsys, "--model", str(tmp_path), "--data", data, "--device", "cpu")
    assert sentence in error
    assert "Traceback" not in error


CLIENT = """
import sys
import datasets
import huggingface_hub
import eval_hellaswag
from modeling_gpt2repro.evaluation.hellaswag_rows import load_hellaswag

eval_hellaswag.main(["--model", "ns/tiny", "--device", "cpu", "--output", sys.argv[1]])
try:
    load_hellaswag("ns/unlabelled")
except ValueError as error:
    print(f"ValueError: {error}")
huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
try:
    load_hellaswag("ns/nothing")
except ConnectionError as error:
    print(f"ConnectionError: {error}")
try:
    eval_hellaswag.main(["--model", "ns/tiny", "--data", "ns/nothing"])
except SystemExit as exit:
    print("exit code", exit.code)
"""


def test_data_and_model_may_come_from_the_hub(hub, tmp_path, hellaswag_tokenizer, hellaswag_rows, make_model):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, labels in (("datasets/Rowan/hellaswag", ["1", "3"]), ("datasets/ns/unlabelled", ["1", ""])):
        folder = hub.new_repository(name)
        rows = [asdict(row) | {"label": label} for row, label in zip(hellaswag_rows, labels, strict=False)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    model_repository = hub.new_repository("models/ns/tiny")
    make_model("stock", len(hellaswag_tokenizer)).save_pretrained(model_repository)
    hellaswag_tokenizer.save_pretrained(model_repository)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(tmp_path / "result.json")],
        env=hub.environment(tmp_path / "home"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = summarize(
        score_hellaswag(make_model("stock", len(hellaswag_tokenizer)), hellaswag_tokenizer, hellaswag_rows[:2])
    )
    assert json.loads((tmp_path / "result.json").read_text())["results"] == json.loads(json.dumps(expected))
    assert "These 2 rows are not the official 10042" in done.stdout
    assert "ValueError: ns/unlabelled, row 2: label is ''" in done.stdout
    assert "ConnectionError: the dataset ns/nothing could not be reached on the Hub" in done.stdout
    assert "exit code 2" in done.stdout
    assert "--data: the dataset ns/nothing could not be reached on the Hub: check the connection, or name a local" in (
        done.stderr
    )
