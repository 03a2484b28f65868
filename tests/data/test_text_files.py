"""Line ends and document separators of text files: the same documents wherever a file is cut."""

import gzip
import re
import tracemalloc
from collections import Counter
from random import Random

import pytest

from modeling_gpt2repro.data.prepare.local import prepare_shards
from modeling_gpt2repro.data.sources import documents as document_files
from modeling_gpt2repro.data.sources import text as text_files
from modeling_gpt2repro.data.sources.documents import read_partition
from modeling_gpt2repro.data.sources.partitions import list_partitions
from modeling_gpt2repro.data.sources.resolve import local_source
from modeling_gpt2repro.data.sources.text import LINE_ENDS, compile_separator, find_document_cut, read_documents


def read_with(path, separator, partition_bytes=2**24):
    partitions = list_partitions([str(path)], partition_bytes=partition_bytes, document_separator=separator)
    return [document for part in partitions for document in read_partition(part, document_separator=separator)]


def mixed_line_ends(seed, parts, length=1_500):
    random = Random(seed)
    return "".join(random.choice(parts) for _ in range(length)).encode()


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64])
def test_no_cut_falls_between_the_two_bytes_of_a_line_end(tmp_path, monkeypatch, block_bytes):
    """With pieces of a partition, and with blocks of one partition; a third of the bytes are line ends of each kind."""
    monkeypatch.setattr(text_files, "LOOK_AHEAD_BYTES", 5)  # so that there often is no whitespace in it
    for seed in range(20):
        data = mixed_line_ends(seed, ["\r\n", "\r", "\n", "a", "sea", " ", "中", "longerthanlookahead"], 300)
        (tmp_path / "a.txt").write_bytes(data)
        expected = (tmp_path / "a.txt").read_text(encoding="utf-8")
        partitions = list_partitions([str(tmp_path / "a.txt")], partition_bytes=block_bytes)
        pieces = [p for part in partitions for _, _, p in text_files.read_pieces(part.path, part.start, part.stop)]
        assert "".join(pieces) == expected
        blocks = text_files.read_pieces(str(tmp_path / "a.txt"), 0, len(data), block_bytes=block_bytes)
        assert [piece for _, _, piece in blocks] == pieces


def test_a_file_from_windows_has_the_ids_of_the_same_file_from_unix(tmp_path, tiny_texts, tiny_tokenizer):
    """And is counted, in the manifest as well."""
    text = "\n".join(tiny_texts)
    ids = []
    for name, line_end in (("unix", "\n"), ("windows", "\r\n"), ("mac", "\r")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(text.replace("\n", line_end).encode())
        (tmp_path / name / "b.txt").write_bytes(b"one\ntwo")
        source = local_source([str(tmp_path / name)])
        shards = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / f"{name}-shards", 0.3)
        ids.append([entry["sha256"] for split in shards.manifest["splits"].values() for entry in split["shards"]])
        assert shards.manifest.get("files_with_other_line_ends") == (None if name == "unix" else 1)
        assert shards.manifest["skipped"] == {}
    assert ids[0] == ids[1] == ids[2]


# What the separators mean, on text whose line ends are \n, as a pattern for re.split.
SEPARATORS = {
    "blank_line": r"\n(?:[ \t]*\n)+",
    "<|endoftext|>": r"(?:<\|endoftext\|>)+",
    r"\n\n": r"\n{2,}",
    r"\n---\n": r"\n---\n(?:---\n)*",
    "---": r"-{3,}",
    "aba": r"aba(?:ba|aba)*",
    "\\\\": r"\\+",
    "中": "中+",
}


@pytest.mark.parametrize("separator", SEPARATORS)
def test_documents_are_what_is_between_separators_wherever_the_file_is_cut(tmp_path, separator):
    literal = separator.replace("\\\\", "\\").replace(r"\n", "\n").replace("blank_line", "\n\n")
    parts = ["\n", "\r\n", "\r", " ", "\t", "a", "b", "the sea", "-", "--", "\\", "中", literal, literal]
    for seed in range(4):
        data = b"\xef\xbb\xbf" + b"start" + mixed_line_ends(seed, parts)
        (tmp_path / "a.txt").write_bytes(data)
        text = (tmp_path / "a.txt").read_text(encoding="utf-8-sig")
        stripped = [document.strip(" \t\n") for document in re.split(SEPARATORS[separator], text)]
        expected = [document for document in stripped if document]
        assert len(expected) > 50
        found = read_with(tmp_path / "a.txt", separator)
        assert [document.text for document in found] == expected
        for document in found:  # the id is the position, which holds whatever precedes the text in the file
            assert (
                re.sub(rb"\r\n?", b"\n", data[int(document.id.partition(":")[2]) :])
                .decode("utf-8-sig")
                .lstrip(" \t\n")
                .startswith(document.text)
            )
        for partition_bytes in (1, 5, 50, 700):
            assert read_with(tmp_path / "a.txt", separator, partition_bytes) == found
        for block_bytes in (1, 5, 50, 700):
            pattern = compile_separator(separator)
            blocks = read_documents(str(tmp_path / "a.txt"), 0, len(data), pattern, block_bytes=block_bytes)
            assert [(f"a.txt:{position}", text) for position, text in blocks if text] == [(d.id, d.text) for d in found]


@pytest.mark.parametrize(("separator", "repeated"), [("blank_line", b"\n"), (r"\n\n", b"\r\n"), ("-", b"-")])
def test_many_separators_in_a_row_take_no_memory(separator, repeated):
    data = b"a" + repeated * 300_000 + b"b"
    pattern = compile_separator(separator)
    tracemalloc.start()
    assert [match.span() for match in pattern.finditer(data)] == [(1, len(data) - 1)]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_long_file_is_cut_between_documents_into_partitions(tmp_path):
    (tmp_path / "a.txt").write_text("the sea\n\n" * 1_000)
    partitions = list_partitions([str(tmp_path / "a.txt")], partition_bytes=1_000, document_separator="blank_line")
    assert len(partitions) == 9
    assert [part.start for part in partitions[1:]] == [part.stop for part in partitions[:-1]]
    assert {(part.start + 2) % 9 for part in partitions[1:]} == {0}  # where a blank line begins


def test_a_file_as_one_document_is_held_out_as_a_whole(tmp_path, monkeypatch, tiny_texts, tiny_tokenizer, all_ids):
    """Though it is read in blocks and pieces; there is one end-of-text a file."""
    monkeypatch.setattr(text_files, "PIECE_CHARACTERS", 50)
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("\n".join(tiny_texts[number * 10 :][:10]))
    source = local_source([str(tmp_path / "*.txt")], document_separator="file")
    assert len(source.partitions) == 20
    shards = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "out", 0.3)
    found = {}
    for split, totals in shards.manifest["splits"].items():
        text = "".join(tiny_tokenizer.decode(ids) for ids in shards.shards(split))
        found[split] = text.split("<|endoftext|>")[1:]
        assert totals["documents"] == len(found[split])
    assert Counter(found["train"] + found["validation"]) == Counter(path.read_text() for path in tmp_path.glob("*.txt"))
    assert len(found["validation"]) > 1

    # In one file of several blocks, all pieces but the first continue it.
    pieces = list(text_files.read_pieces(str(tmp_path / "3.txt"), 0, 10**6, block_bytes=100))
    monkeypatch.setattr(document_files, "read_pieces", lambda *_: iter(pieces))
    documents = list(read_partition(source.partitions[0], document_separator="file"))
    assert [document.continues for document in documents] == [False] + [True] * (len(pieces) - 1)
    assert len({block for block, _, _ in pieces}) > 3
    assert len({document.id for document in documents}) == 1


def test_a_long_book_as_one_document_is_no_column_of_one_value(tmp_path, monkeypatch, tiny_texts, tiny_tokenizer):
    monkeypatch.setattr(text_files, "PIECE_CHARACTERS", 5)
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"Book {number}. " + " ".join(tiny_texts))
    source = local_source([str(tmp_path / "*.txt")], document_separator="file")
    assert all(len(list(source.read(part))) > 1_000 for part in source.partitions)  # pieces
    shards = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "out", 0.6)
    assert {split: totals["documents"] for split, totals in shards.manifest["splits"].items()} == {
        "train": 1,
        "validation": 1,
    }


def test_a_compressed_text_has_the_pieces_and_the_documents_of_the_text(tmp_path, tiny_texts):
    text = "\r\n\r\n".join(tiny_texts * 3)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    for separator in (None, "blank_line", "file"):
        plain, compressed = ([(d.text, d.continues) for d in read_with(tmp_path / name, separator)]
                             for name in ("a.txt", "a.txt.gz"))  # fmt: skip
        assert plain == compressed
        assert len(plain) > 20
    blocks = [list(text_files.read_pieces(str(tmp_path / name), 0, len(text.encode()), block_bytes=999))
              for name in ("a.txt", "a.txt.gz")]  # fmt: skip
    assert blocks[0] == blocks[1]
    assert len(blocks[0]) > 20


def test_changed_line_ends_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\nthree\nfour\n\nfive\rsix")
    counts = Counter()
    [partition] = list_partitions([str(tmp_path / "a.txt")], document_separator="blank_line")
    assert len(list(read_partition(partition, counts, "blank_line"))) == 3
    assert counts == {LINE_ENDS: 2}


@pytest.mark.parametrize("separator", ["", "\\", "a\\d", "\\\\\\"])
def test_a_wrong_separator_is_one_sentence(separator, one_sentence):
    with pytest.raises(ValueError, match=r"must be blank_line, file or the text between two documents") as error:
        compile_separator(separator)
    one_sentence(error)


def test_a_separator_that_separates_nothing_is_one_sentence(tmp_path, one_sentence, monkeypatch):
    (tmp_path / "a.txt").write_text("the sea\n\n" * 1_000)
    (tmp_path / "b.md").write_text("the sea")
    (tmp_path / "c.jsonl").write_text('{"text": "a ## b"}\n')
    for files, pattern in (
        (["a.txt", "b.md"], r"document_separator \(##\) is nowhere in .*a\.txt, .*b\.md \(the first 16 MiB of each\)"),
        (["c.jsonl"], r"document_separator \(##\) is for text files only"),
    ):
        with pytest.raises(ValueError, match=pattern) as error:
            local_source([str(tmp_path / name) for name in files], document_separator="##")
        one_sentence(error)
    assert len(local_source([str(tmp_path)], document_separator="blank_line").partitions) == 3  # one file has it

    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.txt").write_text("the sea\n\n" + "the sea " * 10_000)
    for read in (
        lambda path, pattern: list(read_documents(path, 0, 10**6, pattern, block_bytes=10)),
        lambda path, pattern: find_document_cut(path, 5, pattern),
    ):
        with pytest.raises(ValueError, match=r"a\.txt has a document of more than 100 bytes, from byte") as error:
            read(str(tmp_path / "a.txt"), compile_separator("blank_line"))
        one_sentence(error)
