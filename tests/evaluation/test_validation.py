"""The validation command: equal to the training loop, and on the same text for models with other tokenizers."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_runs import ROOT
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_gpt2repro.data.batches.sequences import TokenSequences, validation_batches
from modeling_gpt2repro.data.prepare.arguments import PrepareArguments
from modeling_gpt2repro.data.tokenizer import train_tokenizer
from modeling_gpt2repro.evaluation.validation import main, resolve_block_size, validation_loss
from modeling_gpt2repro.evaluation.validation_arguments import ValidationArguments
from modeling_gpt2repro.evaluation.validation_text import (
    ValidationText,
    bytes_per_token,
    decode_documents,
    encode_documents,
    load_validation_text,
    text_batches,
)

T = 64  # context of `make_model`


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    PartialState._reset_state()


@pytest.fixture
def save(make_model, tmp_path):
    """save(tokenizer) -> the folder of a stock model with wide weights and this tokenizer."""

    def saved(tokenizer):
        make_model("stock", len(tokenizer)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return saved


@pytest.fixture
def validate(token_shards, tmp_path):
    """validate(model, *flags) -> the report of the command on the tiny shards."""

    def validated(model, *flags, shards=token_shards.folder):
        output = tmp_path / "report.json"
        main(["--model", str(model), "--shards", str(shards), "--device", "cpu", "--output", str(output), *flags])
        return json.loads(output.read_text())

    return validated


def nats_by_hand(folder, ids):
    """Each row of T by itself, in fp64: the sum over all ids but the first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    total = 0.0
    for start in range(0, len(ids) - 1, T):
        row = torch.tensor(ids[start : start + T + 1])
        with torch.no_grad():
            log_probs = model(row[None, :-1]).logits[0].log_softmax(-1)
        total -= sum(log_probs[place, token].item() for place, token in enumerate(row[1:].tolist()))
    return total


def test_the_command_gives_the_number_that_the_training_loop_logged(finished, shards, validate):
    logged = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in logged if "validation_loss" in row][-1]
    found = validate(finished[0] / "model", "--eval_tokens", str(last["validation_tokens"]), shards=shards)["results"]
    assert found["validation_tokens"] == last["validation_tokens"] == 320
    assert found["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert found["validation_bits_per_byte"] == pytest.approx(last["validation_bits_per_byte"], rel=1e-6)


def test_the_sequences_are_those_of_the_training_loop(token_shards):
    for tokens in (10**9, 10 * T, 1):
        split = token_shards.shards("validation")
        text = load_validation_text(split, token_shards.tokenizer, tokens, T)
        expected = list(validation_batches(TokenSequences(split, T), tokens, micro_batch_size=3))
        for ours, theirs in zip(text_batches(text, 3), expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "shift_labels"))
        assert text.split_tokens == sum(batch["shift_labels"].numel() for batch in expected)


def test_nats_and_bytes_equal_those_counted_by_hand(token_shards, tiny_tokenizer, all_ids, save, validate, capsys):
    folder = save(tiny_tokenizer)
    report = validate(folder, "--eval_tokens", "700", "--per_device_eval_batch_size", "3")
    ids = all_ids(token_shards, "validation")[:641].tolist()  # ten rows of 64
    nats = nats_by_hand(folder, ids)
    found = report["results"]
    text_bytes = sum(len(tiny_tokenizer.convert_ids_to_tokens(i)) for i in ids if i != tiny_tokenizer.eos_token_id)
    assert (found["validation_tokens"], found["text_bytes"], report["block_size"]) == (640, text_bytes, T)
    assert found["validation_loss"] == pytest.approx(nats / 640, rel=1e-6)
    assert found["validation_perplexity"] == pytest.approx(math.exp(nats / 640), rel=1e-5)
    assert found["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    printed = capsys.readouterr().out
    assert f"nats per token   {nats / 640:.4f}\n" in printed
    assert "tokens           640 in sequences of 64\n" in printed
    assert "own tokens" not in printed


def test_a_model_with_another_tokenizer_is_scored_on_the_same_text(
    token_shards, tiny_tokenizer, tiny_texts, all_ids, save, validate, capsys
):
    other = train_tokenizer(["ship sea the water " * 9, *tiny_texts[:9]], 280)
    folder = save(other)
    report = validate(folder, "--eval_tokens", "640")
    ids = all_ids(token_shards, "validation")[:641].tolist()
    # Decoded as one text and cut at the end-of-text marks, unlike the command, which cuts the ids.
    documents = tiny_tokenizer.decode(ids).split("<|endoftext|>")[1:]
    assert sum(text in tiny_texts for text in documents) >= len(documents) - 1 > 1  # the last one is cut
    again = [i for text in documents for i in (other.eos_token_id, *other(text)["input_ids"])]
    nats = nats_by_hand(folder, again)
    text_bytes = sum(map(len, documents))
    found = report["results"]
    assert (found["validation_tokens"], found["text_bytes"]) == (len(again) - 1, text_bytes)
    assert (len(again) - 1) % T  # so the last row is a short one
    assert report["split_tokens"] == 640 != found["validation_tokens"]
    assert found["validation_loss"] == pytest.approx(nats / (len(again) - 1), rel=1e-6)
    assert found["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert "own tokens, of the text of 640 tokens of the shards" in capsys.readouterr().out


class Bigrams(torch.nn.Module):
    """Next-token logits from a table in bfloat16, with dropout; fails on id 9."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, input_ids, use_cache):
        if (input_ids == 9).any():
            raise RuntimeError("no such id")
        return SimpleNamespace(logits=self.dropout(self.table.to(torch.bfloat16)[input_ids]))


@pytest.mark.parametrize("mode", [True, False])
def test_losses_are_taken_in_fp32_without_dropout_and_the_mode_comes_back(mode):
    model = Bigrams().train(mode)
    ids = torch.arange(9).view(1, 9)
    log_probs = model.table.detach().to(torch.bfloat16).double().log_softmax(-1)
    expected = -sum(log_probs[a, a + 1].item() for a in range(8))
    batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
    assert validation_loss(model, [batch], torch.device("cpu")) == (pytest.approx(expected / 8, rel=1e-6), 8)
    assert model.training == mode
    with pytest.raises(RuntimeError, match="no such id"):
        validation_loss(model, [{"input_ids": ids + 1, "shift_labels": ids}], torch.device("cpu"))
    assert model.training == mode


def test_the_block_size_is_by_default_the_models_context_and_at_most_gpt2s():
    def model(context):
        return SimpleNamespace(config=SimpleNamespace(**({"max_position_embeddings": context} if context else {})))

    assert [resolve_block_size(model(context), None) for context in (None, 64, 1024, 8192)] == [1024, 64, 1024, 1024]
    assert [resolve_block_size(model(context), 2048) for context in (None, 8192)] == [2048, 2048]
    assert ValidationArguments(shards=".", device="cpu").eval_tokens == 10_485_760  # 20 x 2**19, as the training loop


def test_bytes_per_token_are_those_of_the_scored_text(token_shards, tiny_tokenizer, all_ids):
    ids = all_ids(token_shards, "validation")[: 10 * T + 1]
    assert len(np.flatnonzero(ids == tiny_tokenizer.eos_token_id)) > 1
    scored = [i for i in ids.tolist() if i != tiny_tokenizer.eos_token_id]
    expected = len("".join(tiny_tokenizer.convert_ids_to_tokens(scored))) / (10 * T)  # a character a byte
    assert bytes_per_token(token_shards.shards("validation"), tiny_tokenizer, 10 * T + 5, T) == expected


def test_encoding_again_gives_the_same_ids_where_the_merges_are_the_same(tiny_tokenizer):
    texts = ["The sea.", "", "Cold <|endoftext|> café ☃\n", " the  land"]
    encoded = tiny_tokenizer(texts, split_special_tokens=True)["input_ids"]
    ids = np.array([i for document in encoded for i in (0, *document)])
    [found] = decode_documents(ids, tiny_tokenizer)
    assert found == texts
    assert np.array_equal(encode_documents(found, tiny_tokenizer), ids)
    [found] = decode_documents(ids[1:], tiny_tokenizer)  # a split that begins inside of a document
    assert found == texts


def test_a_character_that_the_cut_has_halved_is_left_out(tiny_tokenizer):
    ids = np.array([0, *tiny_tokenizer("sea")["input_ids"], 0, *tiny_tokenizer("land ☃")["input_ids"]])
    assert len(tiny_tokenizer("☃")["input_ids"]) == 3  # a byte each
    for end, last in ((None, "land ☃"), (-1, "land "), (-2, "land "), (-3, "land ")):
        [found] = decode_documents(ids[:end], tiny_tokenizer)
        assert found == ["sea", last]
    text = load_validation_text([ids[:4], ids[4:-1]], tiny_tokenizer, 100, 1)  # all of it, but for one byte of the snow
    assert (text.split_tokens, text.text_bytes) == (len(ids) - 2, len("sealand "))
    text = load_validation_text([ids], tiny_tokenizer, 100, 1)
    assert text.text_bytes == len("sealand ") + 3


def test_any_number_of_processes_shares_the_sequences():
    text = ValidationText(np.arange(10 * T + 8), T, 0, 0, True)  # ten rows and one of seven
    alone = {int(row[0]): row for batch in text_batches(text, 4) for row in batch["shift_labels"]}
    assert sum(len(row) for row in alone.values()) == 10 * T + 7
    for processes in (2, 3, 12):
        shares = [batch for index in range(processes) for batch in text_batches(text, 4, index, processes)]
        together = [row for batch in shares for row in batch["shift_labels"]]
        assert {int(row[0]) for row in together} == set(alone)
        assert all(torch.equal(row, alone[int(row[0])]) for row in together)
        assert len(together) == 11
        assert all(torch.equal(batch["shift_labels"], batch["input_ids"] + 1) for batch in shares)


@pytest.mark.slow
def test_three_processes_give_what_one_gives(save, tiny_tokenizer, token_shards, validate, tmp_path):
    folder = save(tiny_tokenizer)
    output = tmp_path / "three.json"
    alone = validate(folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    flags = ["--model", str(folder), "--shards", str(token_shards.folder), "--output", str(output)]
    subprocess.run(
        [*launcher, "-m", "modeling_gpt2repro.evaluation.validation", *flags, "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert json.loads(output.read_text())["results"] == pytest.approx(alone["results"], rel=1e-6)


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as exit_:
        main(["--device", "cpu", *map(str, flags)])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_all_errors_of_the_command_line_are_shown_at_once(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = ["--model", tmp_path / "empty", "--shards", tmp_path / "none", "--eval_tokens", 0]
    message = refused(capsys, *flags, "--output", tmp_path / "none" / "x.json")
    assert "4 problems" in message
    assert "has no config.json: give a folder that save_pretrained has written." in message
    assert f"there is no folder {tmp_path / 'none'}: prepare it with prepare_data.py" in message
    assert "eval_tokens (0) must be at least 1." in message
    assert "make it first." in message


def test_what_prepare_data_writes_by_default_is_read_by_default():
    assert PrepareArguments.output_dir == ValidationArguments.shards == "data/edu"


def test_inputs_that_do_not_fit_are_refused_in_one_sentence(capsys, save, tiny_tokenizer, token_shards):
    folder = save(tiny_tokenizer)
    given = ["--model", folder, "--shards", token_shards.folder]
    assert f"--block_size ({T + 1}) must be at most the model's context ({T})." in refused(
        capsys, *given, "--block_size", T + 1
    )
    assert "is damaged" in refused(capsys, "--model", folder, "--shards", _damaged(folder.parent))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.ln_f.bias.data[0] = torch.nan
    model.save_pretrained(folder)
    assert f"--model {folder} has a loss of nan: try --dtype float32, or check its weights." in refused(capsys, *given)


def _damaged(parent):
    (parent / "damaged").mkdir()
    (parent / "damaged" / "manifest.json").write_text("{")
    return parent / "damaged"


@pytest.mark.parametrize(
    ("special", "message"),
    [({}, "no end-of-text token to put"), ({"eos_token": "[END]"}, "no tokens for part of the text")],
)
def test_a_tokenizer_that_cannot_encode_the_text_is_refused(
    special, message, tiny_tokenizer, token_shards, one_sentence
):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "[END]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)
    with pytest.raises(ValueError, match=message) as error:
        load_validation_text(token_shards.shards("validation"), tiny_tokenizer, 640, T, tokenizer)
    one_sentence(error)


def test_a_split_of_less_than_one_sequence_is_refused(tiny_tokenizer, one_sentence):
    with pytest.raises(ValueError, match="the validation split holds 8 tokens, but one sequence takes 9") as error:
        load_validation_text([np.zeros(5, np.uint16), np.zeros(3, np.uint16)], tiny_tokenizer, 100, 8)
    one_sentence(error)
