"""Whatever a document holds, its ids decode to it, and nothing but us marks where documents begin."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from modeling_gpt2repro.data.batches.sequences import TokenSequences
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.batches.streaming import StreamedBatches
from modeling_gpt2repro.data.prepare.local import prepare_shards
from modeling_gpt2repro.data.sources.resolve import local_source

END = "<|endoftext|>"

TEXTS = {
    "plain": "The sea is cold.",
    "a NUL": "before\0after\0",
    "other control characters": "\x01\x1b[31m red \x7f\x85 \x1c\x1f",
    "a literal end-of-text": f"one{END}two {END}",
    "nothing but a literal end-of-text": END,
    "CRLF": "one\r\ntwo\r\n\r\nthree\r",
    "a byte order mark": "\ufeffthe sea",
    "a byte order mark inside": "the \ufeffsea\ufeff",
    "right to left": "שלום עולם، مرحبا بالعالم \u202eabc\u202c",
    "emoji": "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿 \U0001f600\u200d\ufe0f",
    "combining characters": "e\u0301 \u1100\u1161\u11a8 Z̸͑̈́",
    "the ends of Unicode": "\ufffe\uffff\ue000\U0010ffff\ufffd",
    "blanks around": "  \n\tthe sea\u3000\u2028\n  ",
    "many blanks": "a" + " " * 100_000 + "b",
    "many letters": "a" * 100_000,
    "many line breaks": "a" + "\n" * 100_000,
    "a long document": "the sea and the land, " * 1_000,
}
SKIPPED = {"empty": "", "blank": " \n\t\r\n", "other blanks": "\u3000\u2028\x1c\u00a0", "null": None}
# JSON can spell what UTF-8 cannot: half of a pair, replaced by U+FFFD; a whole pair is its character.
SPELLED = {
    r"half \ud83d of": "half \ufffd of",
    r"\ude00": "\ufffd",
    r"\ude00\ud83d": "\ufffd\ufffd",
    r"\ud83d\ud83d\ude00": "\ufffd\U0001f600",
    r"\ud83d\ude00 \u0000": "\U0001f600 \0",
}


# What is settled before a tokenizer sees the text is tried with one of them.
before_any_tokenizer = pytest.mark.parametrize("tokenizer", ["trained"], indirect=True)


@pytest.fixture(scope="module", params=["gpt2", "trained"])
def tokenizer(request):
    """GPT-2's own, by tiktoken, and a trained one, by `tokenizers`, for where there is no GPT-2."""
    return request.getfixturevalue("tiny_tokenizer" if request.param == "trained" else "gpt2_tokenizer")


def write_parquet(path, texts):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=5)


def write_jsonl(path, texts):
    path.write_bytes("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode())


def write_escaped_jsonl(path, texts):
    path.write_bytes("".join(json.dumps({"text": t}) + "\r\n" for t in texts).encode())


WRITERS = {"a.parquet": write_parquet, "raw.jsonl": write_jsonl, "escaped.jsonl": write_escaped_jsonl}


@dataclass(frozen=True)
class Prepared:
    """Ids of a preparation, and the documents they decode to."""

    ids: np.ndarray
    documents: list[str]


@pytest.fixture
def prepare(tmp_path, tokenizer, all_ids):
    """prepare(file, shard_tokens): by the public path; what must hold for any text is checked on the way."""

    def prepared(file, shard_tokens=100_000_000):
        shards = prepare_shards(
            local_source([str(file)]), tokenizer, "any", tmp_path / "out", 0.0, shard_tokens=shard_tokens
        )
        ids = all_ids(shards)
        totals = shards.manifest["splits"]["train"]
        documents = documents_of(ids, tokenizer)
        assert totals["documents"] == len(documents)
        assert totals["tokens"] == len(ids)
        assert totals["text_bytes"] == sum(len(document.encode()) for document in documents)
        return Prepared(ids, documents)

    return prepared


def documents_of(ids, tokenizer):
    """The text after each end-of-text id; there is one before each document."""
    assert ids[0] == tokenizer.eos_token_id
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id))[1:]
    return [tokenizer.decode(part[1:]) for part in parts]


@pytest.mark.parametrize("name", WRITERS)
def test_any_text_comes_back_from_shards(tmp_path, prepare, name):
    WRITERS[name](tmp_path / name, [*SKIPPED.values(), *TEXTS.values(), *SKIPPED.values()])
    found = prepare(tmp_path / name).documents
    assert len(found) == len(TEXTS)
    assert [kind for kind, text in zip(TEXTS, found, strict=True) if text != TEXTS[kind]] == []


def test_a_document_longer_than_a_shard_continues_in_the_next(tmp_path, prepare, tokenizer):
    texts = [TEXTS[kind] for kind in ("plain", "a long document", "emoji", "many letters")]
    write_parquet(tmp_path / "a.parquet", texts)
    prepared = prepare(tmp_path / "a.parquet", shard_tokens=997)
    assert (prepared.documents == texts) is True  # an assertion on the texts themselves would print them
    maps = [np.load(shard, mmap_mode="r") for shard in sorted((tmp_path / "out").glob("train_*.npy"))]
    assert {len(ids) for ids in maps[:-1]} == {997}
    assert min(np.count_nonzero(ids == tokenizer.eos_token_id) for ids in maps) == 0
    sequences = TokenSequences(maps, block_size=1_500)  # each lies in two shards or three
    inputs = sequences.read(np.arange(len(sequences)))[:, :-1]
    assert np.array_equal(inputs.flatten(), prepared.ids[: len(sequences) * 1_500])


@pytest.mark.parametrize("name", ["a.parquet", "escaped.jsonl"])
def test_any_text_comes_back_from_a_stream(tmp_path, tokenizer, name):
    for part in range(3):  # a partition or more each, of which one is held out
        WRITERS[name](tmp_path / f"{part}{name}", [*TEXTS.values(), *SKIPPED.values()])
    source = local_source([str(tmp_path / f"*{name}")])
    config = BatchConfig(block_size=100, sequences_per_step=8, micro_batch_size=8, seed=1)
    batches = StreamedBatches(source, tokenizer, config, max_logical_shards=1)
    read = [document.text for partition in batches.partitions for document in source.read(partition)]
    assert not [kind for kind, text in TEXTS.items() if text not in read]
    parts = []
    num_documents = 0
    while num_documents <= len(read):  # until the next epoch has begun
        parts += [batch["input_ids"].flatten() for batch in batches.micro_batches(batches.next_step)]
        num_documents += int((parts[-1] == tokenizer.eos_token_id).sum())
    batches.close()
    found = documents_of(torch.cat(parts).numpy(), tokenizer)
    assert sorted(map(hash, found[: len(read)])) == sorted(map(hash, read))


@before_any_tokenizer
def test_json_may_spell_halves_of_characters(tmp_path, prepare):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}", "id": "{text}"}}\n' for text in SPELLED))
    assert prepare(tmp_path / "a.jsonl").documents == list(SPELLED.values())


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_halves_of_characters_in_bytes_are_no_text(tmp_path, kind, one_sentence):
    half = b"half \xed\xa0\xbd"  # U+D83D as no encoder of UTF-8 writes it
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": pa.array([half]).cast(pa.string(), safe=False)}), path)
    else:
        path.write_bytes(b'{"text": "a"}\n{"text": "' + half + b'"}\n')
    source = local_source([str(path)])
    with pytest.raises(
        ValueError, match=r"row 0 of .* that is not UTF-8|line 2 .* is not UTF-8 \(byte 29 is 0xed\)"
    ) as error:
        list(source.read(source.partitions[0]))
    one_sentence(error)


@before_any_tokenizer
def test_a_mark_at_the_start_of_a_file_is_no_text(tmp_path, prepare):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\xef\xbb\xbfthe sea"}\r\n')
    assert prepare(tmp_path / "a.jsonl").documents == ["\ufeffthe sea"]


def test_a_column_of_nulls_is_a_sentence(tmp_path, tiny_tokenizer, one_sentence):
    pq.write_table(pa.table({"text": pa.nulls(5)}), tmp_path / "untyped.parquet")
    with pytest.raises(ValueError, match=r"column 'text' of .* holds null, not text: name another") as error:
        local_source([str(tmp_path / "untyped.parquet")])
    one_sentence(error)
    write_parquet(tmp_path / "nulls.parquet", [None] * 7)
    write_jsonl(tmp_path / "nulls.jsonl", [None] * 7)
    for name in ("nulls.parquet", "nulls.jsonl"):
        with pytest.raises(ValueError, match=r"there is no text in the source") as error:
            prepare_shards(local_source([str(tmp_path / name)]), tiny_tokenizer, "any", tmp_path / f"{name}.out", 0.0)
        one_sentence(error)
