"""From files to partitions and from partitions to documents, and what is wrong with a file."""

import json
import os
import re
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_gpt2repro.data.prepare.local import prepare_shards
from modeling_gpt2repro.data.sources import documents
from modeling_gpt2repro.data.sources import partitions as listing
from modeling_gpt2repro.data.sources import text as text_files
from modeling_gpt2repro.data.sources.documents import (
    BadLineError,
    BadLines,
    Document,
    Partition,
    read_partition,
)
from modeling_gpt2repro.data.sources.parquet import read_rows, row_ranges
from modeling_gpt2repro.data.sources.partitions import list_partitions
from modeling_gpt2repro.data.sources.resolve import local_source
from modeling_gpt2repro.data.sources.text import read_lines, read_pieces
from modeling_gpt2repro.data.tokenizer import text_encoder, train_tokenizer


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, columns, row_group_size=10):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def read_all(paths, **options):
    return [document for partition in list_partitions(paths, **options) for document in read_partition(partition)]


TEXTS = {
    "lines": "".join(f"Line {i} of the sea,  and\tso on.\n" + "\n" * (i % 3) for i in range(300)),
    "crlf": "".join(f"Line {i} of the sea.\r\n\r\n" for i in range(300)),
    "no newline": "the long cold sea, and " * 400,
    "no whitespace": "sea海" * 600,
    "odd whitespace": "one\x1c\ntwo!\x1f \u2028\u00a0 three\u3000\n 中文字\n\n\x0b\x0c\r \U0001f600 's\n" * 100,
    "blank ends": "\n\n  \n" + "the sea\n" * 300 + "\n \n",
}


@pytest.fixture(scope="module")
def whitespace_tokenizer():
    """One that merges runs of whitespace, so that it shows where words were cut."""
    return train_tokenizer(TEXTS.values(), 330)


@pytest.mark.parametrize("kind", TEXTS)
def test_pieces_of_a_text_have_the_ids_of_the_whole(tmp_path, monkeypatch, whitespace_tokenizer, kind, all_ids):
    monkeypatch.setattr(text_files, "PIECE_CHARACTERS", 50)
    (tmp_path / "a.txt").write_bytes(TEXTS[kind].encode())
    text = (tmp_path / "a.txt").read_text(encoding="utf-8")  # Python's text mode: every line end is \n
    pieces = read_all([str(tmp_path / "a.txt")])
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert len({piece.id for piece in pieces}) == len(pieces)
    assert len(pieces) > 20 or kind == "no whitespace"

    source = local_source([str(tmp_path / "a.txt")])
    shards = prepare_shards(source, whitespace_tokenizer, "tiny", tmp_path / "out", 0.0)
    whole = text_encoder(whitespace_tokenizer)(text).tolist()
    assert all_ids(shards).tolist() == [whitespace_tokenizer.eos_token_id, *whole]
    assert shards.manifest["splits"]["train"]["text_bytes"] == len(text.encode())
    assert shards.manifest["splits"]["train"]["documents"] == 1


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("partition_bytes", [7, 64, 1000])
def test_a_text_of_several_partitions_loses_and_doubles_nothing(tmp_path, kind, partition_bytes):
    (tmp_path / "a.txt").write_bytes(TEXTS[kind].encode())
    text = (tmp_path / "a.txt").read_text(encoding="utf-8")
    partitions = list_partitions([str(tmp_path / "a.txt")], partition_bytes=partition_bytes)
    assert len(partitions) > 2
    assert text == "".join(
        piece for part in partitions for _, _, piece in read_pieces(part.path, part.start, part.stop)
    )
    texts = "".join(document.text for document in read_all([str(tmp_path / "a.txt")], partition_bytes=partition_bytes))
    assert texts.split() == text.split()  # a partition of nothing but whitespace is no document


@pytest.mark.parametrize("partition_bytes", [1, 40, 333, 10**6])
def test_json_lines_of_several_partitions_lose_and_double_nothing(tmp_path, partition_bytes):
    rows = [{"text": "the sea 中 " * (i % 7 + 1), "id": f"row {i}"} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    read = read_all([path], partition_bytes=partition_bytes)
    assert [(document.id, document.text) for document in read] == [(row["id"], row["text"]) for row in rows]
    Path(path).write_bytes(Path(path).read_bytes().rstrip())  # no line break at the end
    assert len(read_all([path], partition_bytes=partition_bytes)) == 40


def test_json_lines_without_ids_get_their_position_and_only_blank_ones_are_skipped(tmp_path):
    lines = ['{"text": "one"}', "", '{"text": null, "id": 1}', '{"text": " \\n"}', '{"text": "two", "id": null}', "  "]
    lines += ['{"text": "three", "id": 7}', r'{"text": "half \ud83d, whole \ud83d\ude00"}']
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    found = [(document.id, document.text) for document in read_all([str(tmp_path / "a.jsonl")])]
    position = "\r\n".join(lines).index('{"text": "two"')
    assert found[:3] == [("a.jsonl:0", "one"), (f"a.jsonl:{position}", "two"), ("7", "three")]
    assert found[3][1] == "half \ufffd, whole \U0001f600"
    assert len(found) == 4


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe sea")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "the sea"}\n')
    assert [document.text for document in read_all([str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")])] == [
        "the sea"
    ] * 2


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_is_read_by_row_group_with_its_ids_and_without_empty_rows(tmp_path, text_type):
    texts = [None if i % 5 == 0 else " " if i % 5 == 1 else f"text {i}" for i in range(25)]
    ids = [None if i == 7 else f"id {i}" for i in range(25)]
    path = write_parquet(
        tmp_path / "a.parquet", {"url": ["x"] * 25, "text": pa.array(texts).cast(text_type), "id": ids}
    )
    partitions = list_partitions([path])
    assert [(partition.start, partition.name) for partition in partitions] == [(i, f"a.parquet:{i}") for i in range(3)]
    wanted = [Document(f"id {i}" if i != 7 else "a.parquet:0:7", f"text {i}") for i in range(25) if i % 5 > 1]
    assert read_all([path]) == wanted
    assert list(read_partition(partitions[2])) == [document for document in wanted if int(document.text[5:]) >= 20]

    for group in range(3):
        assert list(read_rows(path, group, "text", rows_per_batch=4)) == list(read_rows(path, group, "text"))

    unnamed = write_parquet(tmp_path / "b.parquet", {"text": texts})
    assert [document.id for document in read_all([unnamed])][-1] == "b.parquet:2:4"


@pytest.mark.parametrize("rows_per_batch", [1, 7, 1000])
@pytest.mark.parametrize("range_bytes", [1, 400, 1500, 10**6])
@pytest.mark.parametrize("with_ids", [True, False])
def test_a_large_row_group_is_cut_into_rows_without_a_change_of_documents(
    tmp_path, monkeypatch, rows_per_batch, range_bytes, with_ids
):
    columns = {"text": [f"The sea, {i} of them." if i % 5 else "" for i in range(120)]}
    if with_ids:
        columns["id"] = [f"id {i}" for i in range(120)]
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=100)
    whole = read_all([path])
    assert [document.id for document in whole[-16:]] == (
        [f"id {i}" for i in range(100, 120) if i % 5] if with_ids else [f"a.parquet:1:{i}" for i in range(20) if i % 5]
    )
    monkeypatch.setattr(listing, "row_ranges", partial(row_ranges, range_bytes=range_bytes))
    monkeypatch.setattr(documents, "read_rows", partial(read_rows, rows_per_batch=rows_per_batch))
    partitions = list_partitions([path])
    size = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    first_group = [partition for partition in partitions if partition.start == 0]
    assert len(first_group) == max(1, min(16, size // range_bytes))
    assert len({partition.name for partition in partitions}) == len(partitions)
    assert max(part.text_bytes for part in partitions) <= max(2 * range_bytes, size // 16)
    assert read_all([path]) == whole
    assert [document for part in partitions for document in read_partition(part)] == whole
    if range_bytes == 400:
        first, stop = partitions[0].stop_row, partitions[1].stop_row
        assert partitions[1].location == f"rows {first} to {stop} of row group 0 of {path}"


def test_a_file_that_changed_is_read_again(tmp_path):
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
    assert [document.text for partition in source.partitions for document in source.read(partition)] == [
        "text c",
        "text a",
        "text b",
    ]


def bad_parquet(path):
    write_parquet(path, {"text": ["the sea " * 100] * 50})
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the first page; the footer stays whole
    path.write_bytes(content)


BAD_FILES = {
    "no.txt": (lambda path: None, r"there is no file .*no\.txt\."),
    "empty.txt": (lambda path: path.touch(), r"empty\.txt is empty\."),
    "a.pdf": (lambda path: path.write_text("a,b"), r"a\.pdf is not of a kind that can be read: \.txt, \.md, \.jsonl"),
    "latin.txt": (lambda path: path.write_bytes(b"caf\xe9"), r"is not UTF-8 \(byte 3 is 0xe9\): convert it\."),
    "marked.txt": (lambda path: path.write_bytes(b"\xef\xbb\xbf\xe9"), r"is not UTF-8 \(byte 3 is 0xe9\)"),
    "latin.jsonl": (lambda path: path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}'), r"is not UTF-8 \(byte 24 is"),
    "bad.jsonl": (lambda path: path.write_text('{"text": "a"}\n{bad\n'), r"line 2 \(byte 14\) must be a JSON object"),
    "list.jsonl": (lambda path: path.write_text('["text"]\n'), r"line 1 \(byte 0\) must be a JSON object"),
    "field.jsonl": (
        lambda path: path.write_text('{"txt": "a"}\n'),
        r"line 1 \(byte 0\) has no 'text' field; it has txt: name",
    ),
    "deep.jsonl": (
        lambda path: path.write_text('{"text": "a"}\n\n{"id": ' + "[" * 10**5 + "]" * 10**5 + ', "text": "b"}\n'),
        r"line 3 \(byte 15\) is nested too deeply\.",
    ),
    "number.jsonl": (lambda path: path.write_text('{"text": 7}\n'), r"line 1 \(byte 0\) has 'text' that is not text\."),
    "column.parquet": (
        lambda path: write_parquet(path, {"txt": ["a"], "id": ["b"]}),
        r"has no column 'text'; it has txt, id: name one by --text_column\.",
    ),
    "numbers.parquet": (lambda path: write_parquet(path, {"text": [1, 2]}), r"'text' of .* holds int64, not text"),
    "bad.parquet": (bad_parquet, r"bad\.parquet is not a whole parquet file \("),
    "cut.parquet": (lambda path: path.write_bytes(b"PAR1 and no more"), r"is not a whole parquet file \("),
    "binary.parquet": (
        lambda path: write_parquet(path, {"text": pa.array([b"\xff\xe9"]).cast(pa.string(), safe=False)}),
        r"row 0 of row group 0 \(both counted from 0\) has 'text' that is not UTF-8\.",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence(tmp_path, name, one_sentence):
    write, pattern = BAD_FILES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=pattern) as error:
        read_all([str(tmp_path / name)])
    assert name in one_sentence(error)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_rows_of_parquet_that_are_not_utf8_are_left_out_alone(tmp_path, kind):
    stored = [b"one", b"caf\xe9", None, b"two", b"three", b"four"]
    if kind == "dictionary":
        values = pa.array([b"one", b"caf\xe9", b"two", b"three", b"four"]).cast(pa.string(), safe=False)
        texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2, 3, 4], pa.int32()), values)
    elif kind == "string_view":
        texts = pa.array(stored).cast(pa.binary_view()).view(pa.string_view())
    else:
        texts = pa.array(stored).cast(getattr(pa, kind)(), safe=False)
    ids = pa.array([b"a", b"b", b"c", b"d", b"\xff", None]).cast(pa.string(), safe=False)
    path = write_parquet(tmp_path / "a.parquet", {"text": texts, "id": ids}, row_group_size=3)
    bad_lines = BadLines()
    read = [document for part in list_partitions([path]) for document in read_partition(part, bad_lines=bad_lines)]
    assert read == [Document("a", "one"), Document("d", "two"), Document("a.parquet:1:2", "four")]
    assert bad_lines.counts == {"not UTF-8": 2}
    assert str(bad_lines.first) == f"{path}: row 1 of row group 0 (both counted from 0) has 'text' that is not UTF-8."
    with pytest.raises(BadLineError, match=r"row 1 of row group 1 .* has 'id' that is not UTF-8\.$"):
        list(read_partition(list_partitions([path])[1]))


@pytest.mark.parametrize("document_separator", [None, "blank_line", "file"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_lines_of_a_text_that_are_not_utf8_are_left_out_alone(tmp_path, document_separator, line_end):
    lines = [f"{i}. The cold sea, café." for i in range(40)]
    data = [line.encode("latin-1" if i in (7, 33) else "utf-8") for i, line in enumerate(lines)]
    end = 2 * line_end.encode()
    (tmp_path / "a.txt").write_bytes(end.join(data))
    partitions = list_partitions([str(tmp_path / "a.txt")], document_separator=document_separator)
    bad_lines = BadLines()
    read = partial(read_partition, partitions[0], document_separator=document_separator)
    text = "".join(document.text for document in read(bad_lines=bad_lines))
    assert re.findall(r"\d+\..*?é\.", text) == [line for i, line in enumerate(lines) if i not in (7, 33)]
    assert bad_lines.counts == {"not UTF-8": 2}
    byte = len(end.join(data[:7])) + len(end) + lines[7].index("é")
    sentence = f"{tmp_path / 'a.txt'}: line 15 (byte {byte}) is not UTF-8 (byte {byte} is 0xe9): convert it."
    assert str(bad_lines.first) == sentence
    with pytest.raises(BadLineError) as error:
        list(read())
    assert str(error.value) == sentence


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b" \r"])
def test_a_bad_line_is_left_out_as_a_whole_wherever_the_text_is_cut(tmp_path, line_end):
    lines = [b"%d the cold sea and the land" % number for number in range(9)]
    bad = [line.replace(b"and", b"caf\xe9 and") if number in (3, 4) else line for number, line in enumerate(lines)]
    (tmp_path / "a.txt").write_bytes(line_end.join([*bad, b""]))
    good = b"".join(line for number, line in enumerate(lines) if number not in (3, 4)).decode()
    for partition_bytes in range(2, 200):
        partitions = list_partitions([str(tmp_path / "a.txt")], partition_bytes=partition_bytes)
        bad_lines = BadLines()
        read = [document.text for part in partitions for document in read_partition(part, bad_lines=bad_lines)]
        assert re.sub(r" *\n", "", "".join(read)).rstrip() == good
        assert bad_lines.counts == {"not UTF-8": 2}


def test_a_first_line_that_is_bad_is_no_wrong_column_if_others_are_good(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a"}\n{"text": "b"}\n')
    assert len(list_partitions([str(path)], skip_bad_lines=True)) == 1
    with pytest.raises(ValueError, match="has no 'column' field; it has body"):
        list_partitions([str(path)], "column", skip_bad_lines=True)


def test_a_line_that_is_too_long_is_passed_over_without_being_kept(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a" * 1000}, {"text": "b"}])
    size = os.path.getsize(path)
    lines = [(0, b'{"text": "a"}\n'), (14, None), (14 + 1013, b'{"text": "b"}\n')]
    assert list(read_lines(path, 0, size, max_line_bytes=100)) == lines
    for cut in range(1, size):  # also inside the long line
        parts = [*read_lines(path, 0, cut, max_line_bytes=100), *read_lines(path, cut, size, max_line_bytes=100)]
        assert parts == lines


def test_the_problems_of_all_files_are_reported_together(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"no\.txt\.\n.*empty\.txt is empty\.$"):
        list_partitions([str(tmp_path / "no.txt"), str(tmp_path / "empty.txt")])


def test_a_missing_field_is_reported_before_any_work(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "the sea", "id": 1}])
    with pytest.raises(ValueError, match=r"no 'text' field; it has body, id: name one by --text_column\.$"):
        list_partitions([path])
    assert len(list_partitions([path], "body")) == 1


def test_partitions_have_the_same_name_on_every_machine():
    for path in ("a/b/x.parquet", "/somewhere/x.parquet", "hf://datasets/ns/n@0123/sample/x.parquet"):
        assert Partition(path, 3, 4).name == "x.parquet:3"
