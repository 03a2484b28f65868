"""prepare_data.py on local files, in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import PATIENCE_SECONDS

import prepare_data
from modeling_gpt2repro.data.shards.dataset import open_shards

REPOSITORY = Path(__file__).parents[2]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def error_of(capsys, *argv):
    """The message of a command line that fails with exit code 2 and without a traceback."""
    with pytest.raises(SystemExit) as end:
        prepare_data.main([str(word) for word in argv])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_local_text_becomes_shards_and_a_report(tmp_path, capsys, tiny_texts, monkeypatch):
    monkeypatch.setenv("GPT2REPRO_LAZY", "1")  # for the workers, as the script does
    (tmp_path / "a.txt").write_text("\n".join(tiny_texts[:100]))
    write_jsonl(tmp_path / "b.jsonl", tiny_texts[100:])
    out = tmp_path / "deep/down/out"
    files = ["--train_files", str(tmp_path / "*.txt"), str(tmp_path / "b.jsonl")]
    options = ["--tokenizer", "train", "--vocab_size", "300", "--validation_share", "0.2", "--workers", "2"]
    prepare_data.main(["--output_dir", str(out), *files, *options])
    shards = open_shards(out)
    assert len(shards.tokenizer) == 300
    assert shards.manifest["tokenizer"]["name"] == "train"
    assert shards.manifest["source"] == {"files": ["a.txt", "b.jsonl"], "text_column": "text", "line_ends": "LF"}
    assert shards.manifest["validation_share"] == 0.2
    totals = shards.manifest["splits"]
    text_bytes = len("\n".join(tiny_texts[:100]).encode()) + sum(len(text.encode()) for text in tiny_texts[100:])
    assert totals["train"]["text_bytes"] + totals["validation"]["text_bytes"] == text_bytes
    printed, progress = capsys.readouterr()
    assert f"{totals['train']['tokens']:,} tokens" in printed
    assert f"train_accelerate.py --shards {out}" in printed
    steps = ("reading text for a tokenizer", "training a tokenizer of 300 ids", "tokenizing", "writing shards")
    begins = [progress.index(step) for step in steps]
    assert begins == sorted(begins)


STARTED = """
import json, sys
from collections import Counter
import prepare_data
from modeling_gpt2repro.data import tokenizer
from modeling_gpt2repro.data.sources.resolve import Source
from transformers import PreTrainedTokenizerFast

by_transformers = {"torch"} & set(sys.modules)  # older versions import it with their tokenizers
counts = Counter()

def count(owner, name):
    function = getattr(owner, name)
    def counting(*args, **options):
        counts[name] += 1
        return function(*args, **options)
    setattr(owner, name, counting)

def stop(*args):
    heavy = {"torch", "datasets", "datatrove", "pandas", "modeling_gpt2repro.modeling_gpt2repro"}
    print(json.dumps([sorted(heavy & set(sys.modules) - by_transformers), counts]))
    raise KeyboardInterrupt

count(tokenizer, "tokenizer_sha256")
count(PreTrainedTokenizerFast, "__init__")
Source.read = stop
prepare_data.main(sys.argv[1:])
"""


def test_a_worker_starts_without_torch_and_with_few_tokenizers(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text("the sea")
    command = ["--output_dir", tmp_path / "out", "--train_files", tmp_path / "a.txt", "--tokenizer", tokenizer_folder]
    result = subprocess.run(
        [sys.executable, "-c", STARTED, *map(str, command)],
        cwd=REPOSITORY,
        env={**os.environ, "GPT2REPRO_LAZY": "1"},  # as the script sets it
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 130, result.stderr
    imported, counts = json.loads(result.stdout)
    assert imported == []
    # Built from the named folder, from what is saved (to see that it gives the same ids), and in the worker.
    assert counts == {"__init__": 3, "tokenizer_sha256": 1}


def test_options_reach_the_shards(tmp_path, tokenizer_folder, tiny_texts):
    table = pa.table({"body": tiny_texts, "id": [str(i) for i in range(200)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    out = tmp_path / "out"
    files = ["--train_files", str(tmp_path / "a.parquet"), "--text_column", "body", "--tokenizer", tokenizer_folder]
    prepare_data.main(["--output_dir", str(out), *files, "--max_tokens", "3e3", "--shard_tokens", "1_000"])
    shards = open_shards(out)
    assert [entry["tokens"] for entry in shards.manifest["splits"]["train"]["shards"]] == [1_000] * 3
    assert shards.manifest["validation_share"] == 0.05


def test_all_problems_of_a_command_line_are_reported_together(tmp_path, capsys):
    (tmp_path / "file").touch()
    message = error_of(
        capsys, "--output_dir", tmp_path / "file", "--train_files", tmp_path / "no.txt", tmp_path / "nor.txt",
        "--validation_share", 1.5, "--workers", 0, "--max_tokens", -1, "--shard_tokens", "many", "--colour", "red",
    )  # fmt: skip
    for part in ("file is a file", "no.txt", "nor.txt", "validation_share (1.5)", "workers (0)", "max_tokens (-1)"):
        assert message.count(part) == 1
    assert "--shard_tokens takes a whole number, such as 12 or 1e9, not 'many'" in message
    assert "there is no flag --colour" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, tokenizer_folder):
    def error(*options):
        return error_of(capsys, "--output_dir", tmp_path / "out", *options)

    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "little.txt").write_text("the sea")
    (tmp_path / "a.pdf").write_text("a,b")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "a.parquet")
    tiny = ["--tokenizer", tokenizer_folder]
    assert "latin.txt: line 1 (byte 3) is not UTF-8 (byte 3 is 0xe9)" in error(
        "--train_files", tmp_path / "latin.txt", *tiny
    )
    assert "there is no text in the source" in error("--train_files", tmp_path / "blank.txt", *tiny)
    assert "none of the text fell to the validation" in error("--train_files", tmp_path / "little.txt", *tiny)
    assert "--text_column" in error("--train_files", tmp_path / "a.parquet", *tiny)
    write_jsonl(tmp_path / "late.jsonl", ["the sea"])
    with open(tmp_path / "late.jsonl", "a") as file:
        file.write('{"body": "the sea"}\n')
    assert f"bytes 0 to 40 of {tmp_path / 'late.jsonl'}: line 2 (byte 20) has no 'text' field; it has body" in error(
        "--train_files", tmp_path / "late.jsonl", *tiny
    )
    assert "a.pdf is not of a kind that can be read" in error("--train_files", tmp_path / "a.pdf", *tiny)
    assert "none/*.txt for --train_files" in error("--train_files", tmp_path / "none" / "*.txt", *tiny)
    assert "quick (True) is for --verify only: add that" in error("--train_files", tmp_path / "little.txt", "--quick")
    assert "vocab_size (300) is for --tokenizer train only" in error("--vocab_size", 300)
    assert "ask for fewer ids" in error("--train_files", tmp_path / "little.txt", "--tokenizer", "train")
    assert "--tokenizer train works on --train_files only" in error("--tokenizer", "train")
    assert "nor a folder or Hub id" in error("--train_files", tmp_path / "little.txt", "--tokenizer", tmp_path)


def test_a_bad_line_is_named_while_a_tokenizer_is_trained_too(tmp_path, capsys, tiny_texts):
    write_jsonl(tmp_path / "a.jsonl", tiny_texts)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": 5}\n')
    options = ["--train_files", tmp_path / "a.jsonl", "--tokenizer", "train", "--vocab_size", 300]
    message = error_of(capsys, "--output_dir", tmp_path / "out", *options)
    assert f"a.jsonl: line {len(tiny_texts) + 1} (byte " in message
    assert "has 'text' that is not text. Fix it and run the same command again, or skip all such lines by" in message
    options = [*options, "--skip_bad_lines", "--output_dir", tmp_path / "out", "--validation_share", 0.2]
    prepare_data.main([str(word) for word in options])
    assert open_shards(tmp_path / "out").manifest["bad_lines"]["counts"] == {"no text": 1}


def test_a_finished_folder_is_left_alone(tmp_path, capsys, token_shards, tokenizer_folder):
    before = (token_shards.folder / "manifest.json").read_bytes()
    message = error_of(capsys, "--output_dir", token_shards.folder, "--tokenizer", tokenizer_folder)
    assert "holds prepared shards already" in message
    assert (token_shards.folder / "manifest.json").read_bytes() == before
