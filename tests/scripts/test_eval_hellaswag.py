"""eval_hellaswag.py: its table and its JSON, its error messages, and the Hub as a source."""

import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import eval_hellaswag
from modeling_gpt2repro.evaluation.hellaswag import official as hellaswag_official
from modeling_gpt2repro.evaluation.hellaswag.arguments import EvalHellaSwagArguments
from modeling_gpt2repro.evaluation.hellaswag.metrics import summarize_by_protocol
from modeling_gpt2repro.evaluation.hellaswag.samples import read_scores
from modeling_gpt2repro.evaluation.hellaswag.score import score_hellaswag, score_task
from modeling_gpt2repro.evaluation.hellaswag.tokenize import prepare_hellaswag

ROOT = Path(__file__).resolve().parents[2]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, hellaswag_tokenizer, make_model):
    folder = tmp_path_factory.mktemp("model")
    make_model("ours", len(hellaswag_tokenizer)).save_pretrained(folder)
    hellaswag_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Results go to runs/ in the current folder by default."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def expected(hellaswag_tokenizer, hellaswag_rows, make_model):
    """The scores of the model in `model_folder` for the seven examples."""
    return score_hellaswag(make_model("ours", len(hellaswag_tokenizer)), hellaswag_tokenizer, hellaswag_rows)


def assert_same_scores(results, expected):
    """The same but for rounding, which depends on what else is in a batch."""
    assert [replace(r, log_likelihoods=()) for r in results] == [replace(r, log_likelihoods=()) for r in expected]
    for one, other in zip(results, expected, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)


def as_json(value):
    return json.loads(json.dumps(value))


def test_the_script_prints_a_table_and_saves_its_numbers(tmp_path, model_folder, capsys, hellaswag_rows, expected):
    data = write_rows(tmp_path / "rows.jsonl", hellaswag_rows)
    output = tmp_path / "result.json"
    arguments = ["--model", str(model_folder), "--data", data, "--device", "cpu", "--limit", "5"]
    eval_hellaswag.main([*arguments, "--output", str(output)])
    report = json.loads(output.read_text())
    expected = [scores for scores in expected if scores.index < 5]
    assert report["results"] == as_json(summarize_by_protocol(expected))
    assert len(report["data_sha256"]) == 64
    assert report["arguments"]["limit"] == 5
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "result.jsonl", "rows.jsonl"}
    assert_same_scores([saved.scores for saved in read_scores(tmp_path / "result.jsonl")], expected)
    printed = capsys.readouterr().out
    for protocol, result in summarize_by_protocol(expected).items():
        low, high = result["acc_interval"]
        assert f"{protocol:12}{result['acc']:8.4f} [{low:.4f}, {high:.4f}]" in printed
    assert "0.3114   gpt2, lm-evaluation-harness" in printed
    assert "These 5 examples are not the official 10,042" in printed
    assert "passed" not in printed
    assert report["standings"] == {}

    eval_hellaswag.main([*arguments, "--protocol", "lm-eval", "--dtype", "bfloat16"])
    printed = capsys.readouterr().out
    assert "completion" not in printed
    assert "gpt2-xl, lm-evaluation-harness" in printed
    saved = {path.name for path in (tmp_path / "runs" / "hellaswag").iterdir()}
    model_name = str(model_folder).strip("/").replace("/", "--")
    assert saved == {f"{model_name}_lm-eval_bfloat16_rows_first-5.{kind}" for kind in ("json", "jsonl")}
    assert all(name in printed for name in saved)


def test_other_arguments_are_saved_under_another_name(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [])
    ways = ({}, {"data": data}, {"data": "official"}, {"limit": 5}, {"protocol": "lm-eval"}, {"dtype": "float16"})
    names = [EvalHellaSwagArguments(device="cpu", **way).report_file for way in ways]
    assert str(names[0]) == "runs/hellaswag/openai-community--gpt2.json"
    assert len(set(names)) == len(ways)
    assert EvalHellaSwagArguments(device="cpu", output="v1.5").rows_file.name == "v1.5.jsonl"


def test_the_official_split_is_ranked_among_the_published_numbers(
    tmp_path, model_folder, capsys, hellaswag_rows, expected, monkeypatch
):
    data = Path(write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_rows))
    monkeypatch.setattr(hellaswag_official, "OFFICIAL_SHA256", hashlib.sha256(data.read_bytes()).hexdigest())
    monkeypatch.setattr(hellaswag_official, "OFFICIAL_EXAMPLES", len(hellaswag_rows))
    monkeypatch.setattr(hellaswag_official, "cached_assets_path", lambda *_: tmp_path)
    arguments = ["--model", str(model_folder), "--data", "official", "--device", "cpu", "--output", "all.json"]
    eval_hellaswag.main([*arguments, "--protocol", "lm-eval"])
    acc_norm = summarize_by_protocol(expected)["lm-eval"]["acc_norm"]
    passed = [figure for figure in (0.3114, 0.5089) if figure < acc_norm]
    printed = capsys.readouterr().out
    assert f"lm-eval: passed {'gpt2 (0.3114' if passed else 'none'}" in printed
    assert "These" not in printed
    report = json.loads((tmp_path / "all.json").read_text())
    assert [baseline["acc_norm"] for baseline in report["standings"]["lm-eval"]["passed"]] == passed
    eval_hellaswag.main([*arguments, "--limit", "6"])
    assert "These 6 examples are not the official" in capsys.readouterr().out


def test_two_saved_results_are_compared(
    tmp_path, model_folder, capsys, hellaswag_rows, hellaswag_tokenizer, make_model
):
    make_model("stock", len(hellaswag_tokenizer)).save_pretrained(tmp_path / "other")
    hellaswag_tokenizer.save_pretrained(tmp_path / "other")
    data = write_rows(tmp_path / "rows.jsonl", hellaswag_rows)
    for model, output in ((model_folder, "a.json"), (tmp_path / "other", "b.json")):
        eval_hellaswag.main(["--model", str(model), "--data", data, "--device", "cpu", "--output", output])
    capsys.readouterr()
    eval_hellaswag.main(["--compare", "a.jsonl", "b.jsonl", "--output", "difference.json"])
    printed = capsys.readouterr().out
    a, b = (json.loads((tmp_path / name).read_text())["results"]["lm-eval"]["acc"] for name in ("a.json", "b.json"))
    assert f"lm-eval     acc       {a:8.4f}{b:8.4f}{b - a:+10.4f} [" in printed
    assert "McNemar's test, exact (binomial)" in printed
    difference = json.loads((tmp_path / "difference.json").read_text())["results"]["lm-eval"]["acc"]
    assert difference["difference"] == pytest.approx(b - a)
    assert difference["test"] == "McNemar, exact binomial, two-sided"

    eval_hellaswag.main(
        ["--model", str(model_folder), "--data", data, "--device", "cpu", "--limit", "3", "--output", "c.json"]
    )
    assert "a.jsonl has 7 examples, c.jsonl 3: a paired difference" in problems_of(
        capsys, "--compare", "a.jsonl", "c.jsonl"
    )
    report = (tmp_path / "a.json").read_bytes()
    for output in ("a.json", "runs/../b.json"):
        assert "the comparison would replace the accuracies that belong to" in problems_of(
            capsys, "--compare", "a.jsonl", "b.jsonl", "--output", output
        )
    assert (tmp_path / "a.json").read_bytes() == report
    assert "--compare takes two .jsonl files of results, not 1" in problems_of(capsys, "--compare", "a.jsonl")
    assert "leave out --model, --limit." in problems_of(
        capsys, "--compare", "a.jsonl", "b.jsonl", "--limit", "3", "--model", "gpt2"
    )
    assert "--compare: there is no file none.jsonl." in problems_of(capsys, "--compare", "a.jsonl", "none.jsonl")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_script_scores_the_model_in_the_dtype_asked_for(tmp_path, model_folder, hellaswag_rows, monkeypatch, dtype):
    def record_dtype(model, *arguments):
        dtypes.append(model.dtype)
        return score_task(model, *arguments)

    dtypes = []
    monkeypatch.setattr(eval_hellaswag, "score_task", record_dtype)
    data = write_rows(tmp_path / "rows.jsonl", hellaswag_rows[:2])
    eval_hellaswag.main(["--model", str(model_folder), "--data", data, "--dtype", dtype, "--device", "cpu"])
    assert dtypes == [getattr(torch, dtype)]


def test_the_error_of_full_memory_says_what_to_do(hellaswag_tokenizer, hellaswag_rows, make_model, one_sentence):
    def fill_memory(*_):
        raise torch.OutOfMemoryError

    model = make_model("ours", len(hellaswag_tokenizer))
    task = prepare_hellaswag(model, hellaswag_tokenizer, hellaswag_rows, batch_tokens=300)
    model.register_forward_pre_hook(fill_memory)
    with pytest.raises(ValueError, match="--batch_tokens 300 needs more memory than there is: halve it") as error:
        eval_hellaswag.score(EvalHellaSwagArguments(device="cpu"), model, task)
    one_sentence(error)


TWO_PROCESSES = """
import json, sys
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer
import eval_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.metrics import evaluate_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.samples import write_scores
from modeling_gpt2repro.evaluation.hellaswag.examples import load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.tokenize import prepare_hellaswag
from pathlib import Path

model, data = sys.argv[1:]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
loaded = AutoModelForCausalLM.from_pretrained(model)
tokenizer, examples = AutoTokenizer.from_pretrained(model), load_hellaswag(data)
task = prepare_hellaswag(loaded, tokenizer, examples, process_index=accelerator.process_index, num_processes=2)
numbers, scores = evaluate_hellaswag(loaded, task)
write_scores(Path(f"training-{accelerator.process_index}.jsonl"), scores, task.examples)
Path(f"numbers-{accelerator.process_index}.json").write_text(json.dumps(numbers))
eval_hellaswag.main(["--model", model, "--data", data, "--device", "cpu", "--output", "script.json"])
"""


def test_two_processes_give_and_save_what_one_does(tmp_path, warm_python, model_folder, hellaswag_rows, expected):
    data = write_rows(tmp_path / "rows.jsonl", hellaswag_rows)
    both = warm_python.run_together(2, "-c", TWO_PROCESSES, model_folder, data, cwd=tmp_path)
    summary = summarize_by_protocol(expected)
    for rank in (0, 1):
        numbers = json.loads((tmp_path / f"numbers-{rank}.json").read_text())
        assert numbers["hellaswag_completion_acc_norm"] == summary["completion"]["acc_norm"]
        assert numbers["hellaswag_lm_eval_acc_high"] == summary["lm-eval"]["acc_interval"][1]
    assert json.loads((tmp_path / "script.json").read_text())["results"] == as_json(summary)
    for name in ("training-1.jsonl", "script.jsonl"):
        assert_same_scores([saved.scores for saved in read_scores(tmp_path / name)], expected)
    assert "95 % intervals" in both[0].stdout
    assert both[1].stdout == ""


def problems_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        eval_hellaswag.main(list(arguments))
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_the_script_shows_all_errors_of_a_command_line_at_once(tmp_path, capsys):
    error = problems_of(
        capsys,
        *("--model", str(tmp_path / "none"), "--data", "none.jsonl", "--limit", "0", "--batch_tokens", "-1"),
        *("--protocol", "other", "--dtype", "int8", "--device", "warp9", "--output", str(tmp_path / "no" / "x.json")),
    )
    assert "8 problems; nothing was started" in error
    for sentence in (
        "there is no such folder",
        "there is no file none.jsonl",
        "limit (0) must be at least 1",
        "batch_tokens (-1) must be at least 1",
        "protocol (other) must be one of completion, lm-eval, both",
        "dtype (int8) must be one of float32, bfloat16, float16",
        "--device warp9 cannot be used here (it is none of cuda, cuda:1, mps and cpu); leave it out or give cpu.",
        "make it first",
    ):
        assert sentence in error
    assert "has no config.json" in problems_of(capsys, "--model", str(tmp_path), "--data", __file__)
    assert "is a file" in problems_of(capsys, "--model", __file__, "--data", __file__)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert f"{tmp_path} is the folder of a run: give {tmp_path / 'model'}." in problems_of(
        capsys, "--model", str(tmp_path), "--data", __file__
    )
    assert "is a folder: give the name of a file" in problems_of(capsys, "--data", __file__, "--output", str(tmp_path))
    assert "must end in .json" in problems_of(capsys, "--data", __file__, "--output", "rows.jsonl")


def test_several_processes_do_not_share_one_device(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--device cpu:0 is one device for several processes" in problems_of(
        capsys, "--data", __file__, "--device", "cpu:0"
    )


def test_the_script_reads_the_data_before_the_model(tmp_path, model_folder, capsys, hellaswag_rows):
    data = write_rows(tmp_path / "rows.jsonl", [replace(hellaswag_rows[0], label=7)])
    (tmp_path / "config.json").write_text("{}")
    assert "rows.jsonl, line 1: label is 7" in problems_of(capsys, "--model", str(tmp_path), "--data", data)


def broken_tokenizer(folder, tokenizer, make_model):
    (folder / "tokenizer.json").unlink()


def json_of_something_else(folder, tokenizer, make_model):
    (folder / "tokenizer.json").write_text("{}")


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
        (json_of_something_else, "its tokenizer could not be loaded: KeyError: "),
        (broken_weights, "its model could not be loaded: "),
        (other_tokenizer, "its tokenizer has 320 tokens, its embedding only 319"),
        (incomplete_weights, "12 of its weights are missing (transformer.h.1.attn.c_attn.bias, ...)"),
        (not_a_number, "gives NaN or infinite scores"),
    ],
)
def test_a_model_that_cannot_be_scored_gives_one_sentence(
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
from modeling_gpt2repro.evaluation.load_model import load_causal_lm
from modeling_gpt2repro.evaluation.hellaswag.examples import load_hellaswag

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
for offline in (False, True):
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    try:
        load_causal_lm("runs/nope")
    except ValueError as error:
        print(f"ValueError: {error}")
"""


def test_data_and_model_may_come_from_the_hub(
    hub, warm_python, tmp_path, hellaswag_tokenizer, hellaswag_rows, make_model
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, labels in (("datasets/Rowan/hellaswag", ["1", "3"]), ("datasets/ns/unlabelled", ["1", ""])):
        folder = hub.new_repository(name)
        rows = [asdict(row) | {"label": label} for row, label in zip(hellaswag_rows, labels, strict=False)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    model_repository = hub.new_repository("models/ns/tiny")
    make_model("stock", len(hellaswag_tokenizer)).save_pretrained(model_repository)
    hellaswag_tokenizer.save_pretrained(model_repository)
    done = warm_python.run("-c", CLIENT, tmp_path / "result.json")
    expected = summarize_by_protocol(
        score_hellaswag(make_model("stock", len(hellaswag_tokenizer)), hellaswag_tokenizer, hellaswag_rows[:2])
    )
    assert json.loads((tmp_path / "result.json").read_text())["results"] == as_json(expected)
    assert "These 2 examples are not the official 10,042" in done.stdout
    assert "ValueError: ns/unlabelled, example 2: label is ''" in done.stdout
    assert "ConnectionError: the dataset ns/nothing could not be reached on the Hub" in done.stdout
    assert "exit code 2" in done.stdout
    nowhere = "there is no folder runs/nope here, and the Hub has no such model or cannot be reached"
    assert f"--model runs/nope: {nowhere} (the Hub does not answer" in done.stdout
    assert f"--model runs/nope: {nowhere} (its files cannot be downloaded: Repository not found" in done.stdout
    assert "--data: the dataset ns/nothing could not be reached on the Hub: check the connection, or name a local" in (
        done.stderr
    )
