"""HellaSwag: both protocols against a reference that scores one ending at a time, the rows' checks, and the script."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import eval_hellaswag
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.evaluation.hellaswag import (
    EndingScores,
    count_correct,
    score_hellaswag,
    summarize,
    summarize_counts,
    tokens_of_row,
    wilson_interval,
)
from modeling_gpt2repro.evaluation.hellaswag_rows import PROTOCOLS, HellaSwagRow, load_hellaswag, texts_of_row

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
END_OF_TEXT = "<|endoftext|>"
N_POSITIONS = 64
KINDS = ("ours", "stock")


def row_of(ctx_a, ctx_b, *endings, activity="Roof work", label=1):
    ctx = f"{ctx_a} {ctx_b}".strip()
    return HellaSwagRow(24, activity, ctx_a, ctx_b, ctx, endings, label)


ROWS = [
    row_of("A man is sitting on a roof.", "he", "wraps skis.", "rips tiles off.", "holds a cube.", "pulls it up."),
    row_of("The roof is old.", "the men", "sit.", ", he pulls tiles off the roof.", "is a cube", "on — café.", label=3),
    # WikiHow: an ending that begins with a tag, and one that is nothing else.
    row_of("[header] How to roof [title] Sit. [step] Pull a  tile.", "",
           "[title] Sit down.", "Up. [substeps] Off.", "[step]", "Sit."),
    # What is left of this context ends in a space.
    row_of("Pull the tile off [title]", "", "A man sits.", "is it", "the roof", "old men", label=0),
    row_of(f"Tiles {END_OF_TEXT} are", "not", "ends.", f"{END_OF_TEXT} it", "a", "b", label=2),
    # Longer than the model's context, by its context; and by one of its endings alone.
    row_of("A man is sitting on a roof with a cube. " * 9, "he", "holds it.", "sits.", "is old.", "pulls.", label=2),
    row_of("A man", "sits", "on the old roof, " * 20, "x", "pulls.", "wraps."),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """GPT-2's kind of BPE, with few merges; its end-of-text is a special token."""
    trained = ByteLevelBPETokenizer()
    texts = [text for row in ROWS for text in (row.ctx, *row.endings)]
    trained.train_from_iterator(
        texts, vocab_size=320, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END_OF_TEXT)


def make_model(kind, vocab_size, n_positions=N_POSITIONS):
    torch.manual_seed(0)
    shape = {"vocab_size": vocab_size, "n_positions": n_positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
    options = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}  # wide, so that tokens differ much
    if kind == "ours":
        return GPT2ReproForCausalLM(GPT2ReproConfig(**shape, **options)).eval()
    return GPT2LMHeadModel(GPT2Config(**shape, **options)).eval()


@pytest.fixture(params=KINDS)
def model(request, tokenizer):
    return make_model(request.param, len(tokenizer))


def reference(model, tokenizer, row, protocol):
    """A row's sums and lengths, each ending alone, from the protocol's definition."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        while "[" in text and "]" in text[text.index("[") :]:
            before, rest = text.split("[", 1)
            text = before + rest.split("]", 1)[1]
        return text.replace("  ", " ")

    sums, lengths = [], []
    for ending in row.endings:
        if protocol == "completion":
            context, continuation = ids(row.ctx), ids(" " + ending)
        else:
            ending = clean(ending)
            query = clean(row.activity_label + ": " + row.ctx_a + " " + row.ctx_b.capitalize())
            spaces = query[len(query.rstrip()) :]
            context = ids(query.rstrip())
            continuation = ids(query.rstrip() + (spaces + " " + ending))[len(context) :]
        kept = (context + continuation)[-(model.config.n_positions + 1) :]
        continuation = continuation[-(len(kept) - 1) :]
        with torch.no_grad():
            log_probs = model(torch.tensor([kept[:-1]])).logits[0].log_softmax(-1)
        steps = range(len(kept) - 1 - len(continuation), len(kept) - 1)
        sums.append(sum(log_probs[t, token].item() for t, token in zip(steps, continuation, strict=True)))
        lengths.append(len(continuation) if protocol == "completion" else len(ending))
    return sums, lengths


def assert_equals_reference(model, tokenizer, rows):
    results = score_hellaswag(model, tokenizer, rows, batch_tokens=600)
    assert [(result.row, result.protocol) for result in results] == [
        (i, p) for i in range(len(rows)) for p in PROTOCOLS
    ]
    for result in results:
        sums, lengths = reference(model, tokenizer, rows[result.row], result.protocol)
        assert result.log_likelihoods == pytest.approx(sums, abs=1e-4, rel=1e-6)
        assert list(result.lengths) == lengths
        norms = [a / b if b else -math.inf for a, b in zip(sums, lengths, strict=True)]
        assert result.correct == (max(range(4), key=sums.__getitem__) == result.label)
        assert result.correct_norm == (max(range(4), key=norms.__getitem__) == result.label)


def test_scores_equal_a_reference_that_takes_one_ending_at_a_time(model, tokenizer):
    assert_equals_reference(model, tokenizer, ROWS)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data: real HellaSwag rows and GPT-2's tokenizer")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_real_rows_equal_the_reference(kind):
    tokenizer = AutoTokenizer.from_pretrained(REAL_DATA / "gpt2_tokenizer")
    rows = load_hellaswag(str(REAL_DATA / "hellaswag_val_1000.jsonl"), limit=24)
    assert_equals_reference(make_model(kind, len(tokenizer), n_positions=128), tokenizer, rows)


def test_the_wording_of_a_wikihow_row():
    assert texts_of_row(ROWS[2], "completion") == (
        "[header] How to roof [title] Sit. [step] Pull a  tile.",
        ["[title] Sit down.", "Up. [substeps] Off.", "[step]", "Sit."],
    )
    # A period comes for [title]; a tag leaves two spaces, which become one; ctx_b is capitalized.
    assert texts_of_row(ROWS[2], "lm-eval") == (
        "Roof work: How to roof. Sit. Pull a tile.",
        [" Sit down.", "Up. Off.", "", "Sit."],
    )
    assert texts_of_row(ROWS[1], "lm-eval")[0] == "Roof work: The roof is old. The men"


def test_a_literal_end_of_text_is_text(tokenizer):
    assert tokenizer.eos_token_id in tokenizer(ROWS[4].ctx)["input_ids"]
    for protocol in PROTOCOLS:
        assert all(
            tokenizer.eos_token_id not in choice.tokens for choice in tokens_of_row(ROWS[4], protocol, tokenizer)
        )


def test_an_ending_without_a_token_to_score_is_refused(tokenizer):
    row = row_of("", "", "", "x", "y", "z")  # the space before the ending is the only token
    with pytest.raises(ValueError, match="row 24: the ending '' after '' has no token to score"):
        tokens_of_row(row, "completion", tokenizer)


@pytest.mark.parametrize("batch_tokens", [1, 200, 10**6])
def test_the_batch_size_changes_no_score_and_is_kept(model, tokenizer, batch_tokens):
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True)
    results = score_hellaswag(model, tokenizer, ROWS, batch_tokens=batch_tokens)
    hook.remove()
    for result in results:
        sums, _ = reference(model, tokenizer, ROWS[result.row], result.protocol)
        assert result.log_likelihoods == pytest.approx(sums, abs=1e-4, rel=1e-6)
    assert all(size == 1 or size * length <= batch_tokens for size, length in shapes)
    assert sum(size for size, _ in shapes) == len(ROWS) * len(PROTOCOLS) * 4
    assert len(shapes) == {1: 56, 10**6: 1}.get(batch_tokens, len(shapes))
    assert max(length for _, length in shapes) == N_POSITIONS


@pytest.mark.parametrize("num_processes", [3, 11])
def test_processes_together_score_what_one_does(tokenizer, num_processes):
    model = make_model("ours", len(tokenizer))
    alone = score_hellaswag(model, tokenizer, ROWS)
    shares = [
        score_hellaswag(model, tokenizer, ROWS, process_index=index, num_processes=num_processes)
        for index in range(num_processes)
    ]
    union = sorted((result for share in shares for result in share), key=lambda result: result.row)
    assert [(r.row, r.protocol, r.label, r.lengths) for r in union] == [
        (r.row, r.protocol, r.label, r.lengths) for r in alone
    ]
    for one, other in zip(union, alone, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4, rel=1e-6)
    counts = [count_correct(share) for share in shares]
    added = {p: {name: sum(count[p][name] for count in counts) for name in counts[0][p]} for p in PROTOCOLS}
    assert summarize_counts(added) == summarize(alone)
    assert added["lm-eval"]["rows"] == len(ROWS)


def test_progress_reports_every_row_once(tokenizer):
    reported = []
    model = make_model("ours", len(tokenizer))
    results = score_hellaswag(model, tokenizer, ROWS, ("lm-eval",), 100, on_progress=reported.append)
    assert len(reported) > 1
    assert sorted((result for part in reported for result in part), key=lambda result: result.row) == results


def test_dropout_is_off_while_scoring_and_the_mode_comes_back(tokenizer):
    model = make_model("stock", len(tokenizer))
    expected = score_hellaswag(model, tokenizer, ROWS)
    assert score_hellaswag(model.train(), tokenizer, ROWS) == expected
    assert model.training


class Bigrams(torch.nn.Module):
    """A model of another kind: no config, logits from a table, in bfloat16."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table.to(torch.bfloat16)[input_ids])


def test_log_probabilities_of_bf16_logits_are_taken_in_fp32(tokenizer):
    model = Bigrams(len(tokenizer))
    table = model.table.detach().to(torch.bfloat16).double().log_softmax(-1)
    (result,) = score_hellaswag(model, tokenizer, ROWS[:1], ("completion",))
    for choice, total in zip(tokens_of_row(ROWS[0], "completion", tokenizer), result.log_likelihoods, strict=True):
        pairs = list(zip(choice.tokens, choice.tokens[1:], strict=False))[-choice.scored :]
        assert total == pytest.approx(sum(table[a, b].item() for a, b in pairs), abs=1e-4)


def test_a_summary_worked_by_hand():
    # By sum the first ending is best; by length the second (-8 / 4 = -2), then an empty one must not win.
    scores = EndingScores(0, "lm-eval", 1, (-5.0, -8.0, -9.0, -6.0), (2, 4, 3, 0))
    assert (scores.correct, scores.correct_norm) == (False, True)
    results = [scores, replace(scores, row=1, label=0), replace(scores, row=2), replace(scores, row=3, label=3)]
    summary = summarize(results)["lm-eval"]
    assert (summary["rows"], summary["acc"], summary["acc_norm"]) == (4, 0.25, 0.5)
    # Wilson's interval of 2 of 4: (2 + z²/2 ± z sqrt(1 + z²/4)) / (4 + z²), z = 1.96.
    assert summary["acc_norm_interval"] == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_of_a_file_come_back(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert load_hellaswag(path) == ROWS
    assert load_hellaswag(path, limit=2) == ROWS[:2]
    with pytest.raises(ValueError, match=r"limit \(0\) must be at least 1"):
        load_hellaswag(path, limit=0)


GOOD = asdict(ROWS[0])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (json.dumps({k: v for k, v in GOOD.items() if k not in ("ctx_b", "label")}), "ctx_b, label missing"),
        (json.dumps(GOOD | {"endings": ["a", "b", "c"]}), "found 3 endings; a row must have a list of 4"),
        (json.dumps(GOOD | {"endings": "abcd"}), "found endings 'abcd'; a row must have a list of 4"),
        (json.dumps(GOOD | {"endings": ["a", "b", "c", 4]}), r"endings\[3\] is 4; it must be text"),
        (json.dumps(GOOD | {"ctx": None}), "ctx is None; it must be text"),
        (json.dumps(GOOD | {"ctx_a": "\ud83d"}), r"ctx_a is '\\ud83d'; it must be text in UTF-8"),
        (json.dumps(GOOD | {"label": 4}), "label is 4; it must be 0, 1, 2 or 3"),
        (json.dumps(GOOD | {"label": True}), "label is True; it must be 0, 1, 2 or 3"),
        (json.dumps(GOOD | {"label": ""}), "label is ''; it must be 0, 1, 2 or 3. The test split has no labels"),
        (json.dumps([GOOD]), "not an object with the fields ind,"),
        (json.dumps(GOOD)[:50], "is not JSON"),
        (json.dumps(GOOD).encode() + b"\xff", "byte 0xff at column .* is not UTF-8"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, line, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3: .*{sentence}"):
        load_hellaswag(str(path))
    assert load_hellaswag(str(path), limit=1) == [ROWS[0]]


def test_a_source_that_holds_no_rows_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl has no rows"):
        load_hellaswag(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="is a folder: give the jsonl file in it"):
        load_hellaswag(str(tmp_path))
    for name in ("data/hellaswag_val.jsonl", "hellaswag", "../rows/x", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=f"there is no file {name}: give a local jsonl"):
            load_hellaswag(name)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    make_model("ours", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_script_prints_a_table_and_writes_json(tmp_path, model_folder, tokenizer, capsys):
    data, output = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "result.json"
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
    expected = summarize(score_hellaswag(make_model("ours", len(tokenizer)), tokenizer, ROWS[:5]))
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


def test_the_script_reads_the_data_before_the_model(tmp_path, model_folder, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [replace(ROWS[0], label=7)])
    (tmp_path / "config.json").write_text("{}")
    assert "rows.jsonl, line 1: label is 7" in problems_of(capsys, "--model", str(tmp_path), "--data", data)


def broken_tokenizer(folder, tokenizer):
    (folder / "tokenizer.json").unlink()


def broken_weights(folder, tokenizer):
    (folder / "model.safetensors").write_bytes(b"no")


def other_tokenizer(folder, tokenizer):
    make_model("ours", len(tokenizer) - 1).save_pretrained(folder)


def incomplete_weights(folder, tokenizer):
    model = make_model("stock", len(tokenizer))
    model.transformer.h = model.transformer.h[:1]
    model.save_pretrained(folder)


def not_a_number(folder, tokenizer):
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
def test_a_model_that_cannot_be_scored_is_told_in_a_sentence(tmp_path, tokenizer, capsys, spoil, sentence):
    make_model("ours", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spoil(tmp_path, tokenizer)
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
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


def test_data_and_model_may_come_from_the_hub(hub, tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, labels in (("datasets/Rowan/hellaswag", ["1", "3"]), ("datasets/ns/unlabelled", ["1", ""])):
        folder = hub.new_repository(name)
        rows = [asdict(row) | {"label": label} for row, label in zip(ROWS, labels, strict=False)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    model_repository = hub.new_repository("models/ns/tiny")
    make_model("stock", len(tokenizer)).save_pretrained(model_repository)
    tokenizer.save_pretrained(model_repository)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(tmp_path / "result.json")],
        env=hub.environment(tmp_path / "home"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = summarize(score_hellaswag(make_model("stock", len(tokenizer)), tokenizer, ROWS[:2]))
    assert json.loads((tmp_path / "result.json").read_text())["results"] == json.loads(json.dumps(expected))
    assert "These 2 rows are not the official 10042" in done.stdout
    assert "ValueError: ns/unlabelled, row 2: label is ''" in done.stdout
    assert "ConnectionError: the dataset ns/nothing could not be reached on the Hub" in done.stdout
    assert "exit code 2" in done.stdout
    assert "--data: the dataset ns/nothing could not be reached on the Hub: check the connection, or name a local" in (
        done.stderr
    )
