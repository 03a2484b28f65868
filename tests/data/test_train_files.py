"""What --train_files takes: folders, links, every kind of file, compressed or not; and what it says about it."""

import csv
import gzip
import json
import ntpath
import os
import tracemalloc
from pathlib import Path, PureWindowsPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from modeling_gpt2repro.data.prepare.local import prepare_shards
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources import files
from modeling_gpt2repro.data.sources.documents import BadLineError, BadLines
from modeling_gpt2repro.data.sources.files import find_files
from modeling_gpt2repro.data.sources.resolve import local_source
from modeling_gpt2repro.data.sources.text import compile_separator, read_documents, read_pieces

# What readers of tables like to change: words for a missing value, numbers, dates, line ends, quotes.
TEXTS = [
    "The sea.",
    "NA",
    "null",
    "nan",
    "5",
    "2020-01-01",
    "a\r\nb\rc\n",
    'so "quoted", he said',
    "\ttab",
    "  blanks ",
]
TEXTS += ["中 😀 \u2028\x7f", "the last"]


def table(texts):
    return pa.table({"n": range(len(texts)), "text": texts, "id": [f"id {i}" for i in range(len(texts))]})


def rows(texts):
    return [{"n": i, "text": text, "id": f"id {i}"} for i, text in enumerate(texts)]


def write_csv(path, texts, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # with the mark that Excel writes
        writer = csv.DictWriter(file, ["n", "text", "id"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows(texts))


def write_arrow(path, rows, new=pa.ipc.new_stream):
    rows = rows if isinstance(rows, pa.Table) else table(rows)
    with new(path, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=5)


def write_gzip(path, data):
    path.write_bytes(gzip.compress(data[:7]) + gzip.compress(data[7:]))  # as `cat a.gz b.gz` and bgzip make it


def write_zstd(path, data):
    path.write_bytes(pa.compress(data[:7], "zstd", asbytes=True) + pa.compress(data[7:], "zstd", asbytes=True))


def json_lines(texts):
    return "".join(json.dumps(row) + "\n" for row in rows(texts)).encode()


WRITERS = {
    "a.parquet": lambda path, texts: pq.write_table(table(texts), path),
    "A.PARQUET": lambda path, texts: pq.write_table(table(texts), path),
    "a.jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    "A.JSONL": lambda path, texts: path.write_bytes(json_lines(texts)),
    "a.jsonl.gz": lambda path, texts: write_gzip(path, json_lines(texts)),
    "a.jsonl.zst": lambda path, texts: write_zstd(path, json_lines(texts)),
    "list.json": lambda path, texts: path.write_text(json.dumps(rows(texts))),
    "pretty.json": lambda path, texts: path.write_text(json.dumps(rows(texts), indent=2)),
    "columns.json": lambda path, texts: path.write_text(json.dumps(table(texts).to_pydict())),
    "pandas.json": lambda path, texts: table(texts).to_pandas().to_json(path),
    "several lines.json": lambda path, texts: path.write_text(
        '{"text":\n' + json.dumps(texts) + ', "id":\n' + json.dumps([f"id {i}" for i in range(len(texts))]) + "\n}"
    ),
    "pandas lines.json": lambda path, texts: path.write_text(
        table(texts).to_pandas()[["text", "id"]].to_json().replace(':{"0":', ':\n{"0":').replace(',"id"', '\n,"id"')
    ),
    "lines.json": lambda path, texts: path.write_bytes(b"\n" + json_lines(texts)),
    "lines.json.gz": lambda path, texts: write_gzip(path, json_lines(texts)),
    "list.json.zst": lambda path, texts: write_zstd(path, json.dumps(rows(texts)).encode()),
    "a.csv": write_csv,
    "a.tsv": lambda path, texts: write_csv(path, texts, "\t"),
    "stream.arrow": write_arrow,
    "file.arrow": lambda path, texts: write_arrow(path, texts, pa.ipc.new_file),
}


def documents_of(source):
    return [(document.id, document.text) for part in source.partitions for document in source.read(part)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_texts_unchanged(tmp_path, name):
    WRITERS[name](tmp_path / name, TEXTS)
    assert documents_of(local_source([str(tmp_path / name)])) == [(f"id {i}", text) for i, text in enumerate(TEXTS)]


def test_documents_without_ids_get_the_name_of_the_file_and_the_row(tmp_path):
    (tmp_path / "a.json").write_text(r'[{"text": "half \ud83d"}, {"text": null}, {"text": "b", "id": null}]')
    (tmp_path / "a.csv").write_text('text,id\nfirst,\n\n"two\nlines",7\n')
    assert documents_of(local_source([str(tmp_path)])) == [
        ("a.csv:0", "first"),
        ("7", "two\nlines"),
        ("a.json:0", "half \ufffd"),
        ("a.json:2", "b"),
    ]


def test_what_datasets_saves_is_read_as_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": saved, "more": saved}).save_to_disk(tmp_path / "saved")
    source = local_source([str(tmp_path / "saved")])
    assert [text for _, text in documents_of(source)] == TEXTS * 2
    assert len({name for name, _ in documents_of(source)}) == 2 * len(TEXTS)  # though two files have one name


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.md", "a", "a.txt.gz", "A.Md.GZ", "a.gz", "a.txt.zst", "a.zst"])
def test_text_is_read_with_any_ending(tmp_path, name):
    write = write_gzip if name.lower().endswith(".gz") else write_zstd if name.endswith(".zst") else Path.write_bytes
    write(tmp_path / name, "The sea, 中.\r\nThe land.".encode())
    [document] = documents_of(local_source([str(tmp_path / name)]))
    assert document == (f"{name}:0:0", "The sea, 中.\nThe land.")


def test_a_folder_is_read_in_order_without_what_is_hidden_empty_or_of_another_kind(tmp_path, one_sentence):
    for name in ("b/2.txt", "b/1.md", "a.txt", "README", "c.JSONL", ".hidden/x.txt", "b/.DS_Store", "x.pdf", "y.PDF"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "program").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    source = local_source([str(tmp_path)])
    assert [text for _, text in documents_of(source)] == [
        '{"text": "README"}', '{"text": "a.txt"}', '{"text": "b/1.md"}', '{"text": "b/2.txt"}', "c.JSONL"
    ]  # fmt: skip
    assert source.description["files"] == ["README", "a.txt", "1.md", "2.txt", "c.JSONL"]
    said = "\n".join(source.remarks)
    assert "reading files: 1 without an extension, 2 .txt, 1 .md, 1 .jsonl" in said
    assert f"not read, 2 hidden: {tmp_path}/.hidden, {tmp_path}/b/.DS_Store" in said
    assert "not read, 3 of other kinds: " in said
    assert f"not read, 1 empty: {tmp_path}/empty.txt" in said
    (tmp_path / "b/none").mkdir()
    with pytest.raises(ValueError, match=r"there is no file in .*/b/none that can be read\.") as error:
        local_source([f"{tmp_path}/b/none"])
    one_sentence(error)


def test_output_below_the_input_is_not_read_and_resumes(tmp_path, monkeypatch, capsys, tiny_texts, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "notes/web").mkdir(parents=True)
    (tmp_path / "notes/a.txt").write_text("\n".join(tiny_texts))
    (tmp_path / "notes/web/manifest.json").write_text('[{"text": "of another program"}]')
    monkeypatch.chdir(tmp_path)

    def prepare(out, files):
        prepare_data.main(
            [
                "--output_dir",
                out,
                "--train_files",
                files,
                "--tokenizer",
                "tiny",
                "--workers",
                "1",
                "--validation_share",
                "0.3",
            ]
        )
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            prepare("notes/out", "notes")
    assert "not read, 1 written by this program: notes/out\n" in prepare("notes/out", "notes")
    expected = open_shards("notes/out").manifest
    assert expected["source"]["files"] == ["a.txt", "manifest.json"]
    for number, pattern in enumerate(("notes", "notes/*", "notes/**/*.*", f"{tmp_path}/notes/**")):
        assert "not read, 1 written by this program: " in prepare(f"out{number}", pattern)
        assert sorted(open_shards(f"out{number}").manifest["source"]["files"]) == ["a.txt", "manifest.json"]
    with pytest.raises(SystemExit) as end:
        prepare("other", "notes/out")
    assert end.value.code == 2
    assert "there is no text in notes/out, but what this program wrote: give other files." in capsys.readouterr().err


def test_a_file_and_its_links_are_read_once_and_it_is_said(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("the sea")
    (tmp_path / "texts/b.txt").symlink_to("a.txt")
    os.link(tmp_path / "texts/a.txt", tmp_path / "texts/c.txt")
    (tmp_path / "elsewhere").symlink_to("texts")
    (tmp_path / "texts/other.txt").write_text("the sea")  # a copy is another file
    names, not_read = find_files([f"{tmp_path}/texts/*.txt", f"{tmp_path}/texts", str(tmp_path / "elsewhere")])
    assert list(names) == [f"{tmp_path}/texts/a.txt", f"{tmp_path}/texts/other.txt"]
    [sentence] = not_read
    assert sentence.startswith("not read, 6 linked to a file that is read already: ")
    assert sentence.endswith(f"{tmp_path}/texts/b.txt, {tmp_path}/texts/c.txt, {tmp_path}/elsewhere/a.txt and 3 more")


def test_a_name_with_brackets_is_that_file_or_folder_where_there_is_one(tmp_path):
    for name in ("n1.txt", "n[1].txt", "n2.txt", "d1/a.txt", "d[1]/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("the sea")

    def found(pattern):
        return list(find_files([str(tmp_path / pattern)])[0])

    assert found("n[1].txt") == [f"{tmp_path}/n[1].txt"]
    assert found("d[1]") == [f"{tmp_path}/d[1]/a.txt"]
    assert found("n[12].txt") == [f"{tmp_path}/n1.txt", f"{tmp_path}/n2.txt"]
    (tmp_path / "broken[1].txt").symlink_to("nothing")
    (tmp_path / "broken1.txt").write_text("the sea")
    with pytest.raises(ValueError, match=r"there is no file .*broken\[1\]\.txt"):
        local_source([f"{tmp_path}/broken[1].txt"])


def test_many_files_of_one_name_are_named_in_linear_time(tmp_path, monkeypatch):
    calls = []
    commonpath = os.path.commonpath
    monkeypatch.setattr(os.path, "commonpath", lambda paths: calls.append(1) or commonpath(paths))
    paths = [f"{tmp_path}/{number}/{name}" for number in range(50) for name in ("a.txt", "b.txt")]
    names = files._with_names([*paths, f"{tmp_path}/c.txt"])
    assert names == {path: path.removeprefix(f"{tmp_path}/") for path in paths} | {f"{tmp_path}/c.txt": ""}
    assert len(calls) == 2


def test_files_of_one_name_on_two_drives_have_their_whole_paths(monkeypatch):
    monkeypatch.setattr(files, "Path", PureWindowsPath)
    monkeypatch.setattr(os, "path", ntpath)
    monkeypatch.setattr(ntpath, "abspath", str)
    paths = [r"C:\texts\a.txt", r"D:\a.txt", r"C:\texts\b.txt"]
    assert list(files._with_names(paths).values()) == ["C:/texts/a.txt", "D:/a.txt", ""]


def test_files_of_one_name_have_different_ids(tmp_path, tiny_tokenizer):
    """Else a folder a book, each with a text.txt, would be held out wholly or not at all."""
    for number in range(30):
        (tmp_path / f"books/{number:02d}").mkdir(parents=True)
        (tmp_path / f"books/{number:02d}/text.txt").write_text(f"Book {number}")
    source = local_source([str(tmp_path / "books/*/text.txt")], document_separator="file")
    assert [name for name, _ in documents_of(source)] == [f"{number:02d}/text.txt:0" for number in range(30)]
    shards = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "out", 0.2)
    assert 1 < shards.manifest["splits"]["validation"]["documents"] < 15


two_texts = pa.table([["a"], ["b"], ["c"]], names=["text", "text", "more"])
two_ids = two_texts.rename_columns(["text", "id", "id"])


BAD_FILES = {
    "cut.txt.gz": (lambda path: path.write_bytes(gzip.compress(b"the sea" * 99)[:-9]), r"is not a whole gzip file \("),
    "no.jsonl.zst": (lambda path: path.write_text('{"text": "a"}\n'), r"is not a whole zstd file \("),
    "latin.txt.gz": (lambda path: path.write_bytes(gzip.compress(b"caf\xe9")), r"is not UTF-8 \(byte 3 is 0xe9\)"),
    "a.parquet.gz": (lambda path: path.write_bytes(b"a"), r"not of a kind that can be read: \.txt.*all but \.parquet"),
    "header.csv": (lambda path: path.write_text("id;text\n1;a\n"), r"has no column 'text'; it has id;text: name"),
    "fields.csv": (
        lambda path: path.write_text("id,text\n1,a\n2,b,c\n"),
        r"line 3 \(byte 12\) ends a row of 3 fields, and",
    ),
    "quote.csv": (
        lambda path: path.write_text('text\n"a\nb\n'),
        r"line 3 \(byte 8\) does not follow the rules of \.csv \(une",
    ),
    "latin.csv": (
        lambda path: path.write_bytes(b"text\ncaf\xe9\n"),
        r"line 2 \(byte 8\) is not UTF-8 \(byte 8 is 0xe9\)",
    ),
    "bad.json": (lambda path: path.write_text('[{"text": "a"},\n'), r"is not JSON \(Expecting value: line 2 column 1"),
    "deep.json": (lambda path: path.write_text("[" * 10**5), r"is not JSON \(maximum recursion depth"),
    "number.json": (
        lambda path: path.write_text('[{"text": "a"}, {"text": 5}]'),
        r"row 1 \(counted from 0\) has 'text' that is not text\.",
    ),
    "field.json": (
        lambda path: path.write_text('[{"body": 5}]'),
        r"row 0 \(counted from 0\) has no column 'text'; it has body: ",
    ),
    "lengths.json": (lambda path: path.write_text('{"text": ["a"], "id": []}'), r"must be lists of one length"),
    "texts.json": (lambda path: path.write_text('["a"]'), r"must hold a list of JSON objects, an object of columns"),
    "columns.arrow": (lambda path: write_arrow(path, [5]), r"column 'text' of .* holds int64, not text: name another"),
    "two.arrow": (lambda path: write_arrow(path, two_texts), r"has 2 columns 'text': rename all of them but one\."),
    "two.parquet": (lambda path: pq.write_table(two_texts, path), r"has 2 columns 'text': rename all of them but one"),
    "ids.parquet": (lambda path: pq.write_table(two_ids, path), "2 columns 'id'"),
    "two.csv": (lambda path: path.write_text("text,text\na,b\n"), r"has 2 columns 'text': rename all of them but one"),
    "line.json": (lambda path: path.write_bytes(b'{"text": "\xe9"}\n{"text": "a"}\n'), r"line 1 .* is not UTF-8"),
    "line2.json": (lambda path: path.write_bytes(b'["text"]\n\n{"text": "a"}\n'), r"line 1 .* must be a JSON object"),
    "line3.json": (lambda path: path.write_text('{"text": []}\n{"text": "a"}\n'), r"line 1 .* has 'text' that is no"),
    "cut.arrow": (lambda path: path.write_bytes(b"ARROW1"), r"is not a whole arrow file \("),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence(tmp_path, name, one_sentence):
    write, pattern = BAD_FILES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=pattern) as error:
        documents_of(local_source([str(tmp_path / name)]))
    assert name in one_sentence(error)


SOME_BAD_ROWS = {
    "a.csv": b'id,text\n1,a\n2,b,c\n3,caf\xe9\n"4"x,d\n5,"two\nlines"\n6,\xe9,"\n",\n7,g\n',
    "a.tsv": b'id\ttext\n1\ta\n2\n3\tcaf\xe9\n"4"x\td\n5\t"two\nlines"\n6\t"\n\xe9"\n7\tg\n',
    "a.json": b'[{"id": 1, "text": "a"}, 2, {"id": 3}, {"text": 4}, {"id": 5, "text": "two\\nlines"}, [], '
    b'{"id": 7, "text": "g"}]',
}


@pytest.mark.parametrize("name", SOME_BAD_ROWS)
def test_bad_rows_of_a_table_are_left_out_alone(tmp_path, name):
    (tmp_path / name).write_bytes(SOME_BAD_ROWS[name])
    source = local_source([str(tmp_path / name)], skip_bad_lines=True)
    bad_lines = BadLines()
    documents = [(document.id, document.text) for document in source.read(source.partitions[0], bad_lines=bad_lines)]
    assert documents == [("1", "a"), ("5", "two\nlines"), ("7", "g")]
    if name == "a.json":
        assert bad_lines.counts == {"not a JSON object": 2, "no text": 2}
        assert bad_lines.first.place == "row 1 (counted from 0)"
    else:
        assert bad_lines.counts == {"another number of fields": 1, "not UTF-8": 2, "not CSV": 1}
        assert bad_lines.first.place == "line 3 (byte 12)"
    with pytest.raises(BadLineError):
        list(source.read(source.partitions[0]))


def test_bad_rows_of_arrow_are_not_skipped(tmp_path, one_sentence):
    write_arrow(tmp_path / "a.arrow", TEXTS)
    with pytest.raises(ValueError, match=r"^skip_bad_lines \(True\) is not for \.arrow files") as error:
        local_source([str(tmp_path / "a.arrow")], skip_bad_lines=True)
    one_sentence(error)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.jsonl", "a.csv", "a.tsv", "a.txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_one_sentence_even_if_bad_lines_are_skipped(tmp_path, name, encoding, one_sentence):
    data = '\ufefftext\n{"text": "the sea"}\n'.encode(encoding)
    (write_gzip if name.endswith(".gz") else Path.write_bytes)(tmp_path / name, data)
    with pytest.raises(ValueError, match=r"is UTF-16, and only UTF-8 can be read: convert it\.") as error:
        local_source([str(tmp_path / name)], skip_bad_lines=True)
    assert name in one_sentence(error)


def test_sixty_bad_files_are_one_sentence(tmp_path, capsys):
    for number in range(60):
        (tmp_path / f"{number:02d}.pdf").touch()
    for paths, pattern in (
        ([tmp_path / f"no{number}.txt" for number in range(60)], "there is no file"),
        (sorted(tmp_path.glob("*.pdf")), "is not of a kind that can be read"),
    ):
        with pytest.raises(SystemExit) as end:
            prepare_data.main(["--output_dir", str(tmp_path / "out"), "--train_files", *map(str, paths)])
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "60 files cannot be read: " in message
        assert message.count(pattern) == 3
        assert message.endswith("; and 57 more.\n")


def test_the_command_line_reads_folders_and_separated_documents_and_says_so(tmp_path, capsys, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "texts").mkdir()
    for number in range(3):
        text = "\r\n<|endoftext|>\r\n".join(f"Story {number} {part}" for part in range(20))
        write_gzip(tmp_path / f"texts/{number}.txt.gz", text.encode())
    options = ["--train_files", str(tmp_path / "texts"), "--tokenizer", str(tmp_path / "tiny")]
    separated = ["--document_separator", "<|endoftext|>", "--validation_share", "0.2"]
    prepare_data.main(["--output_dir", str(tmp_path / "out"), *options, *separated, "--workers", "1"])
    printed = capsys.readouterr()
    shards = open_shards(tmp_path / "out")
    counted = {split: totals["documents"] for split, totals in shards.manifest["splits"].items()}
    assert sum(counted.values()) == 60
    assert counted["validation"] > 3
    assert shards.manifest["source"]["document_separator"] == "<|endoftext|>"
    assert "reading files: 3 .txt" in printed.err
    assert "compressed, so that each is read as a whole by one worker: 3" in printed.err
    assert "\\r\\n and \\r became \\n in 3 of the files" in printed.out

    for more, sentence in (
        (["--document_separator", "\\"], "document_separator (\\) must be blank_line, file or the text"),
        (["--document_separator", "§"], "document_separator (§) is nowhere in "),
    ):
        with pytest.raises(SystemExit) as end:
            prepare_data.main(["--output_dir", str(tmp_path / "other"), *options, *more])
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        prepare_data.main(["--output_dir", str(tmp_path / "other"), "--document_separator", "file"])
    assert "document_separator (file) is for --train_files only" in capsys.readouterr().err


def test_another_separator_or_reading_rule_does_not_resume(tmp_path, capsys, tiny_texts, tiny_tokenizer, monkeypatch):
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "a.txt").write_text("\n\n".join(tiny_texts))
    options = ["--train_files", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tiny"), "--workers", "1"]
    monkeypatch.setattr(prepare_data, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    blank = [*options, "--document_separator", "blank_line"]
    with pytest.raises(SystemExit):
        prepare_data.main(["--output_dir", str(tmp_path / "out"), *blank])
    monkeypatch.undo()
    for other in (options, [*options, "--document_separator", r"\n\n"]):
        with pytest.raises(SystemExit) as end:
            prepare_data.main(["--output_dir", str(tmp_path / "out"), *other])
        assert end.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "holds an unfinished preparation with other options (" in message
        assert "'document_separator': 'blank_line'" in message
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["source"].pop("line_ends") == "LF"  # a version that did not change line ends wrote none
    (tmp_path / "out/plan.json").write_text(json.dumps(plan))
    with pytest.raises(SystemExit):
        prepare_data.main(["--output_dir", str(tmp_path / "out"), *blank])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "that an older version began, which left line ends as they are: delete it, or give another" in message
    with pytest.raises(SystemExit):  # other options than the older version's are named as ever
        prepare_data.main(["--output_dir", str(tmp_path / "out"), *options])
    assert "holds an unfinished preparation with other options (" in capsys.readouterr().err


def test_a_compressed_file_is_read_in_constant_memory(tmp_path):
    """6 MB of text, in blocks of 64 KiB."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((b"the cold sea\n" * 50 + b"\n") * 10_000))
    path = str(tmp_path / "a.txt.gz")
    for texts in (
        (text for _, _, text in read_pieces(path, 0, 1, block_bytes=2**16)),
        (text for _, text in read_documents(path, 0, 1, compile_separator("blank_line"), block_bytes=2**16)),
    ):
        tracemalloc.start()
        assert sum(len(text) for text in texts) >= 649 * 10_000
        assert tracemalloc.get_traced_memory()[1] < 2e6
        tracemalloc.stop()
