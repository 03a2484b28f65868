"""Documents, tokenizers, shards, rows, their order, and streaming; all of it small and offline."""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import AutoTokenizer

from modeling_gpt2repro.data import documents, parquet, stream, text_files, tokenizer
from modeling_gpt2repro.data.documents import Document, Unit, list_units, read_unit
from modeling_gpt2repro.data.hub_files import retrying
from modeling_gpt2repro.data.prepare import prepare_shards, validates
from modeling_gpt2repro.data.rows import BatchShape, ShuffledBatches, TokenRows, validation_batches
from modeling_gpt2repro.data.shard_writer import begin_preparation, find_remains
from modeling_gpt2repro.data.shards import open_shards
from modeling_gpt2repro.data.sources import Source, local_source
from modeling_gpt2repro.data.stream import StreamedBatches
from modeling_gpt2repro.data.text_files import read_pieces
from modeling_gpt2repro.data.tokenizer import (
    GPT2_SHA256,
    load_tokenizer,
    save_tokenizer,
    text_encoder,
    tokenizer_sha256,
    train_tokenizer,
)
from modeling_gpt2repro.data.training_data import data_from_shards, data_from_stream

SHARED = Path(__file__).parents[1] / "../shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="GPT-2's vocabulary is not in ../shared/data")

END = "<|endoftext|>"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, columns, row_group_size=10):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def read_all(paths):
    return [document for unit in list_units(paths) for document in read_unit(unit)]


def all_ids(shards, split="train"):
    return np.concatenate([np.empty(0, np.uint16), *shards.shards(split)])


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


@pytest.fixture
def texts_parquet(tmp_path, tiny_texts):
    """`tiny_texts` in 20 row groups, with ids."""
    return write_parquet(
        tmp_path / "texts.parquet", {"text": tiny_texts, "id": [f"urn:{i}" for i in range(len(tiny_texts))]}
    )


def one_sentence(error) -> str:
    """The message, which must be one for a person: a single line that ends in a full stop."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# Tokenizers


@pytest.fixture
def gpt2_files(tmp_path, monkeypatch):
    """GPT-2's vocabulary where tiktoken looks for it; a copy, because tiktoken deletes what it finds damaged."""
    shutil.copytree(SHARED / "tiktoken_cache", tmp_path / "tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))


@needs_shared
def test_gpt2_from_tiktokens_files_is_the_published_tokenizer(gpt2_files):
    ours, published = load_tokenizer("gpt2"), AutoTokenizer.from_pretrained(SHARED / "gpt2_tokenizer")
    text = (SHARED / "text/wikitext2_valid.txt").read_text(encoding="utf-8")[:50_000]
    assert tokenizer_sha256(ours) == tokenizer_sha256(published) == GPT2_SHA256
    assert ours(text)["input_ids"] == published(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    assert ours("Hello, I'm a language model,")["input_ids"] == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (len(ours), ours.eos_token_id, ours.bos_token_id) == (50257, 50256, 50256)


@needs_shared
def test_the_encoder_gives_tiktokens_ids_and_marks_no_documents(gpt2_files):
    import tiktoken

    encode, reference = text_encoder(load_tokenizer("gpt2")), tiktoken.get_encoding("gpt2")
    real = (SHARED / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    for text in (real, f"before{END} {END}after", "\x1c\n 中文 \u2028 \U0001f600's  \t\r\n", real[:999] + END + real):
        assert encode(text).tolist() == reference.encode_ordinary(text)
    assert encode(real).dtype == np.uint16


@needs_shared
def test_the_encoder_survives_what_overflows_tiktoken(gpt2_files):
    gpt2, blanks = load_tokenizer("gpt2"), " " * 1_100_000 + "x"
    assert gpt2.decode(text_encoder(gpt2)(blanks)) == blanks


def test_the_encoder_gives_the_tokenizers_ids_and_spells_a_literal_end_of_text(tiny_tokenizer, tiny_texts):
    encode = text_encoder(tiny_tokenizer)
    assert encode(tiny_texts[0]).tolist() == tiny_tokenizer(tiny_texts[0])["input_ids"]
    ids = encode(f"the sea{END}the sea").tolist()
    assert tiny_tokenizer.eos_token_id not in ids
    assert tiny_tokenizer.decode(ids) == f"the sea{END}the sea"


def test_the_encoder_does_not_truncate_or_pad(tmp_path, tiny_tokenizer, tiny_texts):
    tiny_tokenizer.save_pretrained(tmp_path)
    cutting = AutoTokenizer.from_pretrained(tmp_path)
    cutting.backend_tokenizer.enable_truncation(5)
    cutting.backend_tokenizer.enable_padding(length=100_000)
    assert np.array_equal(text_encoder(cutting)(tiny_texts[0]), text_encoder(tiny_tokenizer)(tiny_texts[0]))


def test_a_trained_tokenizer_survives_the_disk_and_another_one_has_another_hash(tmp_path, tiny_tokenizer, tiny_texts):
    saved = save_tokenizer(tiny_tokenizer, tmp_path / "tokenizer")
    loaded = load_tokenizer(str(tmp_path / "tokenizer"))
    assert saved == tokenizer_sha256(loaded) == tokenizer_sha256(tiny_tokenizer)
    assert loaded(tiny_texts[0])["input_ids"] == tiny_tokenizer(tiny_texts[0])["input_ids"]
    assert tokenizer_sha256(train_tokenizer(tiny_texts, 301)) != saved
    assert tokenizer_sha256(train_tokenizer(["other words entirely " * 20, *tiny_texts[:100]], 300)) != saved


def test_unusable_tokenizers_are_refused(tmp_path, monkeypatch, tiny_tokenizer, tiny_texts):
    with pytest.raises(ValueError, match=r"holds 257 to 65536 ids, not 256\.") as error:
        train_tokenizer(tiny_texts, 256)
    one_sentence(error)
    with pytest.raises(ValueError, match=r"enough for a vocabulary of 2\d\d, not 5000: ask for fewer ids\.") as error:
        train_tokenizer(["the sea"], 5000)
    one_sentence(error)

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is neither 'gpt2' nor a folder or Hub id that loads") as error:
        load_tokenizer(str(tmp_path / "empty"))
    one_sentence(error)

    save_tokenizer(tiny_tokenizer, tmp_path / "endless")
    settings = tmp_path / "endless/tokenizer_config.json"
    settings.write_text(re.sub(r'.*"eos_token".*\n', "", settings.read_text()))
    with pytest.raises(ValueError, match=r"must be a fast tokenizer with an end-of-text \(eos\) token") as error:
        load_tokenizer(str(tmp_path / "endless"))
    one_sentence(error)

    save_tokenizer(tiny_tokenizer, tmp_path / "large")
    monkeypatch.setattr(tokenizer, "LARGEST_VOCABULARY", 299)
    with pytest.raises(ValueError, match=r"has ids up to 299; shards hold 16-bit ids, less than 299\.") as error:
        load_tokenizer(str(tmp_path / "large"))
    one_sentence(error)


# Documents


TEXTS = {
    "lines": "".join(f"Line {i} of the sea,  and\tso on.\n" + "\n" * (i % 3) for i in range(300)),
    "crlf": "".join(f"Line {i} of the sea.\r\n\r\n" for i in range(300)),
    "no newline": "the long cold sea, and " * 400,
    "no whitespace": "sea海" * 3000,
    "odd whitespace": "one\x1c\ntwo!\x1f \u2028\u00a0 three\u3000\n 中文字\n\n\x0b\x0c\r \U0001f600 's\n" * 100,
    "blank ends": "\n\n  \n" + "the sea\n" * 300 + "\n \n",
}


@pytest.fixture(scope="module")
def whitespace_tokenizer():
    """One that merges runs of whitespace, so that it shows where words were cut."""
    return train_tokenizer(TEXTS.values(), 330)


@pytest.mark.parametrize("kind", TEXTS)
def test_pieces_of_a_text_have_the_ids_of_the_whole(tmp_path, monkeypatch, whitespace_tokenizer, kind):
    monkeypatch.setattr(text_files, "PIECE_CHARACTERS", 50)
    (tmp_path / "a.txt").write_bytes(TEXTS[kind].encode())
    pieces = read_all([str(tmp_path / "a.txt")])
    assert "".join(piece.text for piece in pieces) == TEXTS[kind]
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert len({piece.id for piece in pieces}) == len(pieces)
    assert len(pieces) > 20 or kind == "no whitespace"

    source = local_source([str(tmp_path / "a.txt")])
    shards = prepare_shards(source, whitespace_tokenizer, "tiny", tmp_path / "out", 0.0)
    whole = text_encoder(whitespace_tokenizer)(TEXTS[kind]).tolist()
    assert all_ids(shards).tolist() == [whitespace_tokenizer.eos_token_id, *whole]
    assert shards.manifest["splits"]["train"]["text_bytes"] == len(TEXTS[kind].encode())
    assert shards.manifest["splits"]["train"]["documents"] == 1


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("range_bytes", [7, 64, 1000])
def test_a_text_larger_than_a_unit_loses_and_doubles_nothing(tmp_path, monkeypatch, kind, range_bytes):
    monkeypatch.setattr(documents, "RANGE_BYTES", range_bytes)
    (tmp_path / "a.txt").write_bytes(TEXTS[kind].encode())
    units = list_units([str(tmp_path / "a.txt")])
    assert len(units) > 2
    assert "".join(piece for unit in units for piece in read_pieces(unit.path, unit.start, unit.stop)) == TEXTS[kind]
    texts = "".join(document.text for document in read_all([str(tmp_path / "a.txt")]))
    assert texts.split() == TEXTS[kind].split()  # a unit of nothing but whitespace is no document


@pytest.mark.parametrize("range_bytes", [1, 40, 333, 10**6])
def test_json_lines_larger_than_a_unit_lose_and_double_nothing(tmp_path, monkeypatch, range_bytes):
    monkeypatch.setattr(documents, "RANGE_BYTES", range_bytes)
    rows = [{"text": "the sea 中 " * (i % 7 + 1), "id": f"row {i}"} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert [(document.id, document.text) for document in read_all([path])] == [(row["id"], row["text"]) for row in rows]
    Path(path).write_bytes(Path(path).read_bytes().rstrip())  # no line break at the end
    assert len(read_all([path])) == 40


def test_json_lines_without_ids_are_known_by_their_place_and_nothing_is_skipped_but_blanks(tmp_path):
    lines = ['{"text": "one"}', "", '{"text": null, "id": 1}', '{"text": " \\n"}', '{"text": "two", "id": null}', "  "]
    lines += ['{"text": "three", "id": 7}', r'{"text": "half \ud83d, whole \ud83d\ude00"}']
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    found = [(document.id, document.text) for document in read_all([str(tmp_path / "a.jsonl")])]
    place = "\r\n".join(lines).index('{"text": "two"')
    assert found[:3] == [("a.jsonl:0", "one"), (f"a.jsonl:{place}", "two"), ("7", "three")]
    assert found[3][1] == "half \ufffd, whole \U0001f600"
    assert len(found) == 4


def test_the_mark_that_windows_editors_put_first_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe sea")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "the sea"}\n')
    assert [document.text for document in read_all([str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")])] == [
        "the sea"
    ] * 2


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_is_read_by_row_group_with_its_ids_and_without_empty_rows(tmp_path, monkeypatch, text_type):
    monkeypatch.setattr(parquet, "BATCH_ROWS", 4)
    texts = [None if i % 5 == 0 else " " if i % 5 == 1 else f"text {i}" for i in range(25)]
    ids = [None if i == 7 else f"id {i}" for i in range(25)]
    path = write_parquet(
        tmp_path / "a.parquet", {"url": ["x"] * 25, "text": pa.array(texts).cast(text_type), "id": ids}
    )
    units = list_units([path])
    assert [(unit.start, unit.name) for unit in units] == [(i, f"a.parquet:{i}") for i in range(3)]
    wanted = [Document(f"id {i}" if i != 7 else "a.parquet:0:7", f"text {i}") for i in range(25) if i % 5 > 1]
    assert read_all([path]) == wanted
    assert list(read_unit(units[2])) == [document for document in wanted if int(document.text[5:]) >= 20]

    unnamed = write_parquet(tmp_path / "b.parquet", {"text": texts})
    assert [document.id for document in read_all([unnamed])][-1] == "b.parquet:2:4"


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one"] * 5})
    assert len(read_all([path])) == 5
    write_parquet(tmp_path / "a.parquet", {"text": ["two"] * 25})
    os.utime(path, ns=(1, 1))
    assert [document.text for document in read_all([path])] == ["two"] * 25


def test_patterns_are_expanded_in_order_and_a_file_is_taken_once(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    source = local_source([str(tmp_path / "c.txt"), str(tmp_path / "*.txt")])
    assert source.description["files"] == ["c.txt", "a.txt", "b.txt"]
    assert [document.text for unit in source.units for document in source.read(unit)] == ["text c", "text a", "text b"]


def bad_parquet(path):
    write_parquet(path, {"text": ["the sea " * 100] * 50})
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the first page; the footer stays whole
    path.write_bytes(content)


BAD_FILES = {
    "no.txt": (lambda path: None, r"there is no file .*no\.txt\."),
    "empty.txt": (lambda path: path.touch(), r"empty\.txt is empty\."),
    "a.csv": (lambda path: path.write_text("a,b"), r"a\.csv is not of a kind that can be read: \.txt, \.jsonl"),
    "latin.txt": (lambda path: path.write_bytes(b"caf\xe9"), r"is not UTF-8 \(byte 3 is 0xe9\): convert it\."),
    "marked.txt": (lambda path: path.write_bytes(b"\xef\xbb\xbf\xe9"), r"is not UTF-8 \(byte 3 is 0xe9\)"),
    "latin.jsonl": (lambda path: path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}'), r"is not UTF-8 \(byte 24 is"),
    "bad.jsonl": (lambda path: path.write_text('{"text": "a"}\n{bad\n'), r"the line at byte 14 must be a JSON object"),
    "list.jsonl": (lambda path: path.write_text('["text"]\n'), r"the line at byte 0 must be a JSON object"),
    "field.jsonl": (lambda path: path.write_text('{"txt": "a"}\n'), r"must be a JSON object with a 'text' field\."),
    "number.jsonl": (lambda path: path.write_text('{"text": 7}\n'), r"'text' in the line at byte 0 is not text\."),
    "column.parquet": (
        lambda path: write_parquet(path, {"txt": ["a"], "id": ["b"]}),
        r"has no column 'text'; it has txt, id: name one by --text_column\.",
    ),
    "numbers.parquet": (lambda path: write_parquet(path, {"text": [1, 2]}), r"'text' of .* holds int64, not text"),
    "bad.parquet": (bad_parquet, r"bad\.parquet is not a whole parquet file \("),
    "cut.parquet": (lambda path: path.write_bytes(b"PAR1 and no more"), r"is not a whole parquet file \("),
    "binary.parquet": (
        lambda path: write_parquet(path, {"text": pa.array([b"\xff\xe9"]).cast(pa.string(), safe=False)}),
        r"binary\.parquet is not a whole parquet file \(",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_sentence(tmp_path, name):
    write, pattern = BAD_FILES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=pattern) as error:
        read_all([str(tmp_path / name)])
    assert name in one_sentence(error)


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_LINE_BYTES", 100)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a" * 100}])
    with pytest.raises(ValueError, match=r"has a line of more than 100 bytes") as error:
        read_all([path])
    one_sentence(error)


def test_the_problems_of_all_files_are_told_together(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"no\.txt\.\n.*empty\.txt is empty\.$"):
        list_units([str(tmp_path / "no.txt"), str(tmp_path / "empty.txt")])


# Prepared shards


def test_the_split_is_by_document_and_nothing_depends_on_the_workers(tmp_path, texts_parquet, tiny_tokenizer):
    source = local_source([texts_parquet])
    made = {
        workers: prepare_shards(
            source, tiny_tokenizer, "tiny", tmp_path / str(workers), 0.2, shard_tokens=3_000, workers=workers
        )
        for workers in (1, 4)
    }
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "4")
    assert made[1].fingerprint == made[4].fingerprint

    found = {}
    for split in ("train", "validation"):
        found[split] = tiny_tokenizer.decode(all_ids(made[1], split)).split(END)[1:]
        totals = made[1].manifest["splits"][split]
        assert totals["documents"] == len(found[split])
        assert totals["tokens"] == len(all_ids(made[1], split))
        assert totals["text_bytes"] == sum(len(text.encode()) for text in found[split])
        assert made[1].bytes_per_token(split) == totals["text_bytes"] / totals["tokens"]
    everything = read_all([texts_parquet])
    for split, wanted in (("train", False), ("validation", True)):
        assert found[split] == [document.text for document in everything if validates(document.id, 0.2) is wanted]
    assert 20 < len(found["validation"]) < 60


def test_a_share_is_a_share_and_a_larger_one_holds_the_smaller():
    small, large = ({i for i in range(5_000) if validates(f"id {i}", share)} for share in (0.05, 0.2))
    assert 150 < len(small) < 350
    assert 850 < len(large) < 1150
    assert small < large


def test_who_validates_is_fixed_for_good():
    # As it was first released: shards made on another machine or by a newer version hold out the same documents.
    assert [i for i in range(100) if validates(f"id {i}", 0.05)] == [27, 29, 56, 72, 87]


def test_pieces_of_one_text_serve_both_splits(tmp_path, tiny_texts, tiny_tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(tiny_texts))
    shards = prepare_shards(local_source([str(tmp_path / "a.txt")]), tiny_tokenizer, "tiny", tmp_path / "out", 0.3)
    pieces = read_all([str(tmp_path / "a.txt")])
    chosen = [validates(piece.id, 0.3) for piece in pieces]
    for split, wanted in (("train", False), ("validation", True)):
        text = "".join(
            (END if i == 0 or chosen[i - 1] is not wanted else "") + piece.text
            for i, piece in enumerate(pieces)
            if chosen[i] is wanted
        )
        assert tiny_tokenizer.decode(all_ids(shards, split)) == text


def test_max_tokens_is_exact_and_cuts_the_same_tokens(tmp_path, texts_parquet, tiny_tokenizer):
    source = local_source([texts_parquet])
    whole = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "whole", 0.1)
    for workers, limit in ((1, 4_321), (3, 5_000)):
        out = tmp_path / f"cut{workers}"
        cut = prepare_shards(source, tiny_tokenizer, "tiny", out, 0.1, limit, shard_tokens=1_000, workers=workers)
        assert np.array_equal(all_ids(cut), all_ids(whole)[:limit])
        totals = cut.manifest["splits"]["train"]
        assert totals["tokens"] == limit
        assert totals["documents"] == np.count_nonzero(all_ids(cut) == tiny_tokenizer.eos_token_id)
        kept = tiny_tokenizer.decode(all_ids(cut)).replace(END, "")
        assert abs(totals["text_bytes"] - len(kept.encode())) < 100


def test_a_shard_is_as_long_as_asked_and_its_hash_is_its_own(token_shards):
    for split in ("train", "validation"):
        entries = token_shards.manifest["splits"][split]["shards"]
        assert [entry["tokens"] for entry in entries[:-1]] == [5_000] * (len(entries) - 1)
        for entry, ids in zip(entries, token_shards.shards(split), strict=True):
            assert hashlib.sha256(ids.tobytes()).hexdigest() == entry["sha256"]
            assert np.array_equal(np.load(token_shards.folder / entry["file"]), ids)
    assert len(token_shards.manifest["splits"]["train"]["shards"]) > 2
    assert sorted(path.name for path in token_shards.folder.iterdir() if path.suffix != ".npy") == [
        "manifest.json",
        "tokenizer",
    ]


def test_progress_is_told_after_each_unit(tmp_path, texts_parquet, tiny_tokenizer):
    told = []
    shards = prepare_shards(
        local_source([texts_parquet]),
        tiny_tokenizer,
        "tiny",
        tmp_path / "out",
        0.1,
        on_progress=lambda *numbers: told.append(numbers),
    )
    assert [(units, total) for units, total, _ in told] == [(i, 20) for i in range(1, 21)]
    assert told[-1][2] == shards.manifest["splits"]["train"]["tokens"]


@dataclass(frozen=True)
class DyingSource(Source):
    """Reading its fifth unit ends the program."""

    def read(self, unit):
        if unit == self.units[4]:
            raise KeyboardInterrupt
        return super().read(unit)


def test_a_preparation_killed_in_the_middle_can_be_started_again(tmp_path, texts_parquet, tiny_tokenizer):
    source, out = local_source([texts_parquet]), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(
            DyingSource(source.units, source.description), tiny_tokenizer, "tiny", out, 0.1, shard_tokens=1_000
        )
    assert list(out.glob("train_*.npy"))
    (out / "train_000099.partial").touch()  # cut off while it was written
    with pytest.raises(ValueError, match=r"has no manifest\.json: its preparation was not finished") as error:
        open_shards(out)
    one_sentence(error)
    again = prepare_shards(source, tiny_tokenizer, "tiny", out, 0.1, shard_tokens=1_000)
    fresh = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "fresh", 0.1, shard_tokens=1_000)
    assert shard_bytes(out) == shard_bytes(tmp_path / "fresh")
    assert again.fingerprint == fresh.fingerprint
    assert not list(out.glob("*.partial"))


@pytest.mark.parametrize("name", ["notes.txt", "train_000000.npy", "training_set.npy", "tokenizer"])
def test_a_folder_with_other_files_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds other files \({name}\): give an empty --output_dir\.") as error:
        begin_preparation(tmp_path)
    one_sentence(error)
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_beside_an_unfinished_preparation_are_left_alone(tmp_path):
    begin_preparation(tmp_path / "out")
    (tmp_path / "out/train_000000.npy").touch()
    (tmp_path / "out/train_set.npy").touch()
    with pytest.raises(ValueError, match=r"holds other files \(train_set\.npy\)"):
        begin_preparation(tmp_path / "out")
    assert (tmp_path / "out/train_000000.npy").exists()


def test_a_folder_that_cannot_be_used_is_a_sentence(tmp_path, monkeypatch, token_shards):
    with pytest.raises(ValueError, match=r"holds prepared shards already: use them, or give another") as error:
        begin_preparation(token_shards.folder)
    one_sentence(error)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/inside"):
        with pytest.raises(ValueError, match=r"file is a file: give a folder as --output_dir\.") as error:
            find_remains(folder)
        one_sentence(error)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match=r"cannot be written to: give another --output_dir\.") as error:
        find_remains(tmp_path / "new")
    one_sentence(error)


def test_text_that_is_too_little_to_split_is_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "blank.txt").write_text(" \n\t\n" * 100)
    with pytest.raises(ValueError, match=r"there is no text in the source") as error:
        prepare_shards(local_source([str(tmp_path / "blank.txt")]), tiny_tokenizer, "tiny", tmp_path / "blank", 0.1)
    one_sentence(error)
    (tmp_path / "a.txt").write_text("the sea")
    for share, split in ((0.001, "validation"), (0.999, "train")):
        with pytest.raises(ValueError, match=rf"none of the text fell to the {split} split") as error:
            prepare_shards(local_source([str(tmp_path / "a.txt")]), tiny_tokenizer, "tiny", tmp_path / split, share)
        one_sentence(error)


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def other_tokenizer(folder):
    train_tokenizer(["entirely other words " * 20, "and more of them, too"], 270).save_pretrained(folder / "tokenizer")


DAMAGE = {
    "folder": (shutil.rmtree, r"there is no folder .*: prepare it with prepare_data\.py --output_dir"),
    "manifest": (lambda folder: (folder / "manifest.json").unlink(), r"has no manifest\.json: its preparation"),
    "cut manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 1,'),
        r"manifest\.json is damaged",
    ),
    "list": (lambda folder: (folder / "manifest.json").write_text("[1]"), r"manifest\.json is damaged"),
    "format": (lambda folder: edit_manifest(folder, lambda m: m.update(format=2)), r"it is of format 2, and this"),
    "no splits": (lambda folder: edit_manifest(folder, lambda m: m.pop("splits")), r"is damaged \('splits'\)"),
    "no hash": (
        lambda folder: edit_manifest(folder, lambda m: m["tokenizer"].update(sha256="")),
        r"no hash of the tok",
    ),
    "entries": (
        lambda folder: edit_manifest(folder, lambda m: m["splits"]["train"]["shards"].pop()),
        r"the shards of train do not add up",
    ),
    "shard": (lambda folder: (folder / "train_000001.npy").unlink(), r"shard .*train_000001\.npy is missing"),
    "cut shard": (lambda folder: os.truncate(folder / "train_000001.npy", 500), r"is truncated or damaged"),
    "empty shard": (lambda folder: os.truncate(folder / "train_000001.npy", 0), r"is truncated or damaged"),
    "other shard": (
        lambda folder: np.save(folder / "train_000001.npy", np.zeros(5_000, np.int64)),
        r"holds 5000 ids of int64, not 5000 of uint16\.",
    ),
    "shorter shard": (
        lambda folder: np.save(folder / "train_000001.npy", np.zeros(4_999, np.uint16)),
        r"holds 4999 ids of uint16, not 5000 of uint16\.",
    ),
    "tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer does not load"),
    "cut tokenizer": (
        lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{}"),
        r"tokenizer does not load",
    ),
    "other tokenizer": (other_tokenizer, r"is not the tokenizer that these shards were made with"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_a_sentence(tmp_path, token_shards, kind):
    folder = tmp_path / "shards"
    shutil.copytree(token_shards.folder, folder)
    assert open_shards(folder).fingerprint == token_shards.fingerprint
    damage, pattern = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ValueError, match=pattern) as error:
        open_shards(folder)
    one_sentence(error)


# Rows and their order


def made_rows(tokens=1_000, block_size=10, shard_tokens=137):
    """Ids 0, 1, 2, ... in shards that are no multiple of a row."""
    ids = np.arange(tokens, dtype=np.uint16)
    return TokenRows([ids[i : i + shard_tokens] for i in range(0, tokens, shard_tokens)], block_size)


def shape(rows_per_step=12, micro_batch_rows=3, seed=1, process_index=0, num_processes=1, block_size=10):
    return BatchShape(block_size, rows_per_step, micro_batch_rows, seed, process_index, num_processes)


def step_rows(batches, step):
    """The inputs of a step's rows, in their order, and the proof that targets are the next tokens."""
    parts = list(batches.micro_batches(step))
    for part in parts:
        assert part["input_ids"].dtype == part["shift_labels"].dtype == torch.int64
        assert torch.equal(part["input_ids"][:, 1:], part["shift_labels"][:, :-1])
        assert len(part["input_ids"]) == batches.shape.micro_batch_rows
    return torch.cat([torch.cat([part["input_ids"], part["shift_labels"][:, -1:]], dim=1) for part in parts])


def interleaved(parts):
    """Rows of the processes 0, 1, ... -> the rows of the run: process p has every P-th from the p-th on."""
    return torch.stack(parts, dim=1).flatten(0, 1)


@pytest.mark.parametrize("block_size", [1, 10, 136, 137, 500])
def test_rows_read_across_shards_are_naive_slices(block_size):
    rows = made_rows(block_size=block_size)
    assert len(rows) == 999 // block_size
    numbers = np.random.default_rng(0).permutation(len(rows))
    naive = np.stack([np.arange(i * block_size, i * block_size + block_size + 1) for i in numbers])
    assert np.array_equal(rows.read(numbers), naive)
    assert rows.read(numbers).dtype == np.int64


def test_rows_of_real_shards_are_slices_of_the_split(token_shards):
    rows, ids = TokenRows(token_shards.shards("train"), 64), all_ids(token_shards)
    numbers = np.arange(len(rows))
    assert np.array_equal(rows.read(numbers), np.stack([ids[i * 64 : i * 64 + 65] for i in numbers]))


def test_an_epoch_holds_each_row_once_and_predicts_each_token_once():
    rows = made_rows(tokens=961)  # 96 rows are 8 steps of 12
    batches = ShuffledBatches(rows, shape())
    epochs = [torch.cat([step_rows(batches, step) for step in range(first, first + 8)]) for first in (0, 8)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 960, 10))
        assert sorted(epoch[:, 1:].flatten().tolist()) == list(range(1, 961))
    assert epochs[0][:, 0].tolist() != sorted(epochs[0][:, 0].tolist())
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0][:12], step_rows(ShuffledBatches(rows, shape(seed=2)), 0))


def test_a_step_may_lie_in_two_epochs():
    batches = ShuffledBatches(made_rows(), shape())  # 99 rows: 8 steps and a quarter
    rows = torch.cat([step_rows(batches, step) for step in range(33)])  # 4 epochs
    for epoch in rows.split(99):
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 990, 10))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_rows", [1, 3])
def test_the_order_depends_neither_on_processes_nor_on_the_micro_batch(processes, micro_batch_rows):
    rows = made_rows()
    alone = ShuffledBatches(rows, shape(36, 12))
    together = [ShuffledBatches(rows, shape(36, micro_batch_rows, 1, p, processes)) for p in range(processes)]
    for step in range(20):
        assert torch.equal(interleaved([step_rows(part, step) for part in together]), step_rows(alone, step))


def test_a_step_reached_directly_is_the_one_reached_in_order():
    rows = made_rows()
    in_order = ShuffledBatches(rows, shape())
    reached = [step_rows(in_order, step) for step in range(30)]
    for step in (29, 8, 17, 0):
        direct = ShuffledBatches(rows, shape())
        direct.load_state_dict(in_order.state_dict())
        assert torch.equal(step_rows(direct, step), reached[step])


def test_the_order_of_a_seed_is_fixed_for_good():
    # As it was first released: whoever resumes a run on a newer version goes on with the same rows.
    assert ShuffledBatches(made_rows(), shape()).row_numbers(0).tolist() == [
        93,
        61,
        75,
        9,
        36,
        39,
        85,
        55,
        96,
        31,
        16,
        2,
    ]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_validation_takes_the_first_rows_once_over_all_processes(processes):
    rows = made_rows()
    for tokens, count in ((70, 7), (79, 7), (1, 1), (10**9, 99)):
        parts = [list(validation_batches(rows, tokens, 4, p, processes)) for p in range(processes)]
        assert all(len(batch["input_ids"]) <= 4 for part in parts for batch in part)
        firsts = sorted(int(first) for part in parts for batch in part for first in batch["input_ids"][:, 0])
        assert firsts == list(range(0, count * 10, 10))


def test_too_little_text_for_a_row_is_a_sentence_for_each_split(token_shards):
    with pytest.raises(ValueError, match=r"the training split holds 10 tokens, but one row takes 11: give") as error:
        made_rows(tokens=10)
    one_sentence(error)
    assert len(made_rows(tokens=11)) == 1
    with pytest.raises(ValueError, match=r"the training split .*\nthe validation split .*--block_size\.$"):
        data_from_shards(token_shards, shape(block_size=100_000))


def test_the_data_of_a_run_says_who_it_is(token_shards):
    data = data_from_shards(token_shards, shape(block_size=64))
    again = data_from_shards(open_shards(token_shards.folder), shape(block_size=64, process_index=1, num_processes=2))
    assert data.identity == again.identity
    assert data.identity != data_from_shards(token_shards, shape(block_size=64, seed=2)).identity
    assert data.bytes_per_token == token_shards.bytes_per_token("validation")
    assert sum(len(batch["input_ids"]) for batch in data.validation_batches(640, 4)) == 10


# Streaming

UNITS, DOCUMENTS_A_UNIT = 17, 2


@pytest.fixture
def streamed(tmp_path, monkeypatch, tiny_tokenizer):
    """17 units of two documents, all of one length in tokens; a row is as long as a document, so 32 rows in 4 lanes are
    an epoch."""
    monkeypatch.setattr(stream, "MOST_LANES", 4)
    texts = [f"the ship {u:02d} found land {d:02d}" for u in range(UNITS) for d in range(DOCUMENTS_A_UNIT)]
    lengths = {len(text_encoder(tiny_tokenizer)(text)) for text in texts}
    assert len(lengths) == 1
    source = local_source([write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=DOCUMENTS_A_UNIT)])
    block_size = lengths.pop() + 1

    def build(process_index=0, num_processes=1, rows_per_step=8, micro_batch_rows=2, seed=1, **options):
        order = BatchShape(block_size, rows_per_step, micro_batch_rows, seed, process_index, num_processes)
        return StreamedBatches(source, tiny_tokenizer, order, **options)

    return build


def ships(tokenizer, rows):
    """Which (unit, document) each row holds: two numbers of two digits in its text."""
    texts = tokenizer.batch_decode(rows[:, :-1])
    assert all(text.startswith(END) and text.count(END) == 1 for text in texts)
    return [tuple(map(int, re.findall(r"\d\d", text))) for text in texts]


def test_an_epoch_of_a_stream_uses_each_unit_once_and_never_one_of_validation(streamed, tiny_tokenizer):
    batches = streamed()
    rows = torch.cat([step_rows(batches, step) for step in range(12)])  # 3 epochs
    seen = ships(tiny_tokenizer, rows)
    held_out = {unit.start for unit in batches.validation_units}
    wanted = {(u, d): 1 for u in range(UNITS) for d in range(DOCUMENTS_A_UNIT) if u not in held_out}
    epochs = [seen[first : first + 32] for first in (0, 32, 64)]
    assert [Counter(epoch) for epoch in epochs] == [wanted] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert {u for u, _ in epochs[0][:4]} != set(range(4))  # units are shuffled
    assert {epoch.index((u, 0)) < epoch.index((u, 1)) for epoch in epochs for u, _ in wanted} == {True, False}

    validation, bytes_per_token = batches.validation_rows(10**6)
    text = tiny_tokenizer.decode(np.concatenate(validation.shards)).split(END)[1:]
    assert {int(found[9:11]) for found in text} == held_out
    assert len(held_out) == 1
    assert bytes_per_token == pytest.approx(len(text[0]) / batches.shape.block_size)
    batches.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_stream_gives_the_same_rows_to_any_number_of_processes(streamed, processes):
    alone = streamed(micro_batch_rows=8)
    together = [streamed(p, processes, micro_batch_rows=1) for p in range(processes)]
    for step in range(10):
        assert torch.equal(interleaved([step_rows(part, step) for part in together]), step_rows(alone, step))


@pytest.mark.parametrize("step", [0, 1, 5, 9])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 4)])
def test_a_stream_goes_on_with_the_very_next_row_on_other_processes(streamed, step, before, after):
    alone = streamed()
    rows = [step_rows(alone, s) for s in range(13)]
    stopped = [streamed(p, before, micro_batch_rows=1) for p in range(before)]
    for s in range(step):
        for part in stopped:
            step_rows(part, s)
    states = [json.loads(json.dumps(part.state_dict())) for part in stopped]
    state = {"next_step": step, "lanes": {lane: place for part in states for lane, place in part["lanes"].items()}}
    resumed = [streamed(p, after, micro_batch_rows=1) for p in range(after)]
    for part in resumed:
        part.load_state_dict(state)
    for s in range(step, 13):
        assert torch.equal(interleaved([step_rows(part, s) for part in resumed]), rows[s])


def test_a_stream_can_be_set_back(streamed):
    batches = streamed()
    start = json.loads(json.dumps(batches.state_dict()))
    rows = [step_rows(batches, step) for step in range(9)]
    batches.load_state_dict(start)
    assert torch.equal(torch.cat([step_rows(batches, step) for step in range(9)]), torch.cat(rows))


def test_rows_of_a_stream_join_where_they_should(tmp_path, monkeypatch, tiny_texts, tiny_tokenizer):
    """One lane: what follows a row's last token is the next row, across documents, units and epochs."""
    monkeypatch.setattr(stream, "MOST_LANES", 1)
    source = local_source([write_parquet(tmp_path / "a.parquet", {"text": tiny_texts[:30]}, row_group_size=10)])
    batches = StreamedBatches(source, tiny_tokenizer, BatchShape(64, 4, 2, seed=3))
    rows = torch.cat([step_rows(batches, step) for step in range(60)])
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    kept = [document for unit in batches.units for document in source.read(unit)]
    tokens = sum(1 + len(text_encoder(tiny_tokenizer)(document.text)) for document in kept)
    flat = rows[:, :-1].flatten()
    assert len(flat) > 2 * tokens
    for epoch in (flat[:tokens], flat[tokens : 2 * tokens]):
        assert sorted(tiny_tokenizer.decode(epoch).split(END)[1:]) == sorted(document.text for document in kept)


def test_a_text_file_is_streamed_in_its_order(tmp_path, monkeypatch, tiny_texts, tiny_tokenizer):
    monkeypatch.setattr(documents, "RANGE_BYTES", 20_000)
    monkeypatch.setattr(stream, "MOST_LANES", 1)
    (tmp_path / "a.txt").write_text("\n".join(tiny_texts))
    batches = StreamedBatches(local_source([str(tmp_path / "a.txt")]), tiny_tokenizer, BatchShape(64, 32, 32, seed=3))
    text = tiny_tokenizer.decode(step_rows(batches, 0)[:, :-1].flatten()).removeprefix(END)
    assert len(text) > 2 * text_files.PIECE_CHARACTERS
    assert text.split(END)[0] in "\n".join(tiny_texts)
    assert len(text.split(END)) <= 2  # the next unit may have begun


def test_a_stream_that_cannot_be_is_a_sentence(tmp_path, streamed, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"3 processes cannot share 4 lanes evenly: use a power of two") as error:
        streamed(0, 3)
    one_sentence(error)
    (tmp_path / "one.txt").write_text("the sea")
    with pytest.raises(ValueError, match=r"streaming needs two units or more, one for validation") as error:
        StreamedBatches(local_source([str(tmp_path / "one.txt")]), tiny_tokenizer, shape())
    one_sentence(error)
    blank = local_source([write_parquet(tmp_path / "blank.parquet", {"text": [" "] * 9}, row_group_size=1)])
    batches = StreamedBatches(blank, tiny_tokenizer, shape())
    with pytest.raises(ValueError, match=r"there is no text in the source") as error:
        next(batches.micro_batches(0))
    one_sentence(error)
    with pytest.raises(ValueError, match=r"the validation split holds 0 tokens") as error:
        batches.validation_rows(100)
    one_sentence(error)


def test_the_identity_of_a_stream_says_what_decides_its_rows(tmp_path, streamed, tiny_tokenizer):
    source, order = streamed().source, streamed().shape
    data = data_from_stream(source, tiny_tokenizer, order, 0.001, 100)
    same = data_from_stream(source, tiny_tokenizer, replace(order, micro_batch_rows=1), 0.001, 100)
    assert data.identity == same.identity
    for other in (
        data_from_stream(source, tiny_tokenizer, replace(order, seed=9), 0.001, 100),
        data_from_stream(source, tiny_tokenizer, order, 0.5, 100),
        data_from_stream(
            local_source([source.units[0].path], "text"), train_tokenizer(["a b " * 99], 258), order, 0.001, 9
        ),
    ):
        assert other.identity != data.identity
    assert data.summary == "files, streamed: 16 units in 4 lanes"


# Patience with the Hub


class Failing:
    """Fails with the errors it is given, one after another, then returns 7."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


def http_error(status):
    @dataclass
    class Answer:
        status_code: int
        headers: dict
        request: None = None

    return HfHubHTTPError("the Hub says no", response=Answer(status, {}))


def test_a_busy_or_absent_hub_is_asked_again():
    work = Failing(http_error(503), HTTPError("connection lost"), http_error(429))
    assert (retrying(work, retries=3, wait_seconds=0), work.calls) == (7, 4)


def test_patience_with_the_hub_ends_in_a_sentence():
    work = Failing(*[HTTPError("connection lost")] * 9)
    with pytest.raises(ConnectionError, match=r"the Hub did not answer in 3 attempts \(HTTPError\)") as error:
        retrying(work, retries=2, wait_seconds=0)
    one_sentence(error)
    assert work.calls == 3


def test_a_refusal_and_an_error_of_our_own_are_not_repeated():
    for refusal in (http_error(401), http_error(404), ValueError("damaged")):
        work = Failing(refusal)
        with pytest.raises(type(refusal)):
            retrying(work, wait_seconds=0)
        assert work.calls == 1


def test_units_are_named_the_same_on_every_machine():
    for path in ("a/b/x.parquet", "/somewhere/x.parquet", "hf://datasets/ns/n@0123/sample/x.parquet"):
        assert Unit(path, 3, 4).name == "x.parquet:3"
