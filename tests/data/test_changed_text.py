"""Text that changes, or is mended, between two runs of a preparation: only what was made of it is made again."""

import json
import os
import shutil
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import contents, error_of, interrupt_before_the_shards, prepare

import prepare_data
from modeling_gpt2repro.data.prepare import local
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources import resolve


def write_groups(path, *groups):
    """A parquet file with a row group of 20 texts for each number, which differ for different numbers."""
    schema = pa.schema([("text", pa.string()), ("id", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for number in groups:
            texts = [f"The ship number {number} sails over the cold sea number {row}." for row in range(20)]
            ids = [f"{number}-{row}" for row in range(20)]
            writer.write_table(pa.table({"text": texts, "id": ids}, schema))


@pytest.fixture
def three_files(tmp_path, texts):
    """Arguments for three parquet files of the row groups 0 1 2, 3 4 and 5, prepared up to the shards."""
    (tmp_path / "in").mkdir()
    for name, groups in (("a", (0, 1, 2)), ("b", (3, 4)), ("c", (5,))):
        write_groups(tmp_path / f"in/{name}.parquet", *groups)
    return ["--train_files", str(tmp_path / "in/*.parquet"), *texts[0][2:]]


def tokenized_again(folder, arguments, monkeypatch):
    """Resume, and return the numbers of the ships whose row groups were tokenized, in their order."""
    again = []
    tokenize = local.tokenize_documents

    def recorded(documents, *more, **options):
        documents = list(documents)
        again.append(int(documents[0].id.split("-")[0]) if documents else None)
        return tokenize(documents, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(local, "tokenize_documents", recorded)
        prepare(folder, arguments)
    return again


def test_a_changed_file_loses_only_its_partitions_that_differ(tmp_path, three_files, monkeypatch, capsys):
    out = tmp_path / "out"
    interrupt_before_the_shards(out, three_files, monkeypatch, partitions=6)
    # One more than before, so those of the other files move; the last was of the file before, at another place.
    write_groups(tmp_path / "in/a.parquet", 0, 7, 8, 1)
    write_groups(tmp_path / "in/c.parquet", 9)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(out, interrupted)
    assert tokenized_again(out, three_files, monkeypatch) == [7, 8, 1, 9]
    assert "changed or copied since this preparation was started: a.parquet, c.parquet; what" in capsys.readouterr().err
    prepare(tmp_path / "fresh", three_files)
    assert contents(out) == contents(tmp_path / "fresh")

    # Interrupted again, and changed again, to fewer; workers read their numbers from the spec.
    interrupt_before_the_shards(interrupted, three_files, monkeypatch, partitions=7)
    write_groups(tmp_path / "in/a.parquet", 7)
    assert tokenized_again(interrupted, [*three_files, "--workers", "1"], monkeypatch) == [7]
    prepare(tmp_path / "fewer", three_files)
    assert contents(interrupted) == contents(tmp_path / "fewer")


def test_bad_lines_are_mended_or_skipped_and_what_is_finished_stays(tmp_path, texts, monkeypatch, capsys):
    monkeypatch.setattr(resolve, "list_partitions", partial(resolve.list_partitions, partition_bytes=500))
    good = [json.dumps({"id": f"{row}", "text": f"The cold sea number {row} is wide."}).encode() for row in range(60)]
    bad = [b'{"id": "a"}', b'{"text": "\xe9"}', b"{", b'["text"]', b'{"text": 5}', b'{"text": ' + b"[" * 9000, b"7"]
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\n".join(good[:30] + bad[:1] + good[30:40] + bad[1:] + good[40:]))
    arguments = ["--train_files", str(file), *texts[0][2:]]

    message = error_of(capsys, tmp_path / "mended", arguments)
    first = len(b"\n".join(good[:30])) + 1
    place = f"line 31 (byte {first}) has no 'text' field; it has id: name one by --text_column."
    assert f" of {file}: {place} Fix it and run the same command again, or skip all such lines by --skip" in message
    finished = sorted(finished_partitions(tmp_path / "mended"))
    assert finished == list(range(first // 500))
    shutil.copytree(tmp_path / "mended", tmp_path / "skipped")

    skip = [*arguments, "--skip_bad_lines"]
    again = tokenized_again(tmp_path / "skipped", skip, monkeypatch)
    assert len(again) == -(-file.stat().st_size // 500) - len(finished)
    assert open_shards(tmp_path / "skipped").manifest["bad_lines"] == {
        "counts": {"nested too deeply": 1, "no text": 2, "not UTF-8": 1, "not a JSON object": 3},
        "first": f"in.jsonl: {place}",
    }
    line = "7 left out (1 nested too deeply, 2 no text, 1 not UTF-8, 3 not a JSON object); the first: in.jsonl: line 31"
    assert line in capsys.readouterr().out
    prepare(tmp_path / "fresh skipped", skip)
    assert contents(tmp_path / "skipped") == contents(tmp_path / "fresh skipped")

    file.write_bytes(b"\n".join(good))
    again = tokenized_again(tmp_path / "mended", arguments, monkeypatch)
    assert len(again) == -(-file.stat().st_size // 500) - len(finished)
    prepare(tmp_path / "fresh", arguments)
    assert contents(tmp_path / "mended") == contents(tmp_path / "fresh")
    assert "bad_lines" not in open_shards(tmp_path / "fresh").manifest
    for name in ("train_000000.npy", "validation_000000.npy"):
        assert (tmp_path / "skipped" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_what_was_made_without_bad_lines_is_not_used_where_they_are_not_skipped(tmp_path, texts, monkeypatch, capsys):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"".join(b'{"text": "The sea number %d."}\n' % row for row in range(99)) + b"{}\n")
    arguments = ["--train_files", str(file), *texts[0][2:]]
    interrupt_before_the_shards(tmp_path / "out", [*arguments, "--skip_bad_lines"], monkeypatch, partitions=1)
    assert "skip_bad_lines True there, False now" in error_of(capsys, tmp_path / "out", arguments)


@pytest.mark.parametrize("values", [["web"], ["web", "book", "wiki"]])
def test_ids_that_put_all_documents_in_one_split_are_noticed_early(tmp_path, texts, monkeypatch, capsys, values):
    monkeypatch.setattr(resolve, "list_partitions", partial(resolve.list_partitions, partition_bytes=2000))
    rows = [json.dumps({"id": values[row % len(values)], "text": "The sea."}) for row in range(20_000)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    arguments = ["--train_files", str(tmp_path / "in.jsonl"), *texts[0][2:4], "--workers", "1"]
    message = error_of(capsys, tmp_path / "out", arguments)
    ids = "one id (web)" if len(values) == 1 else "only 3 different ids (book, web, wiki)"
    assert f": {1000 * len(values):,} documents have {ids}, by which all of them fell to" in message
    assert "to training: rename or remove 'id'" in message
    tokenized = len(finished_partitions(tmp_path / "out"))
    assert 10 < tokenized < 0.2 * (tmp_path / "in.jsonl").stat().st_size / 2000


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_noticed(tmp_path, three_files, monkeypatch):
    file = tmp_path / "in/b.parquet"
    write_groups(tmp_path / "other", 3, 6)
    interrupt_before_the_shards(tmp_path / "out", three_files, monkeypatch, partitions=6)
    stat = file.stat()
    assert (tmp_path / "other").stat().st_size == stat.st_size
    os.utime(tmp_path / "other", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(tmp_path / "other", file)
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert tokenized_again(tmp_path / "out", three_files, monkeypatch) == [6]
    prepare(tmp_path / "fresh", three_files)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_text_copied_to_another_folder_is_not_tokenized_again(tmp_path, three_files, monkeypatch, capsys):
    interrupt_before_the_shards(tmp_path / "out", three_files, monkeypatch, partitions=6)
    shutil.copytree(tmp_path / "in", tmp_path / "copy", copy_function=shutil.copy)  # with new times
    shutil.rmtree(tmp_path / "in")
    copied = ["--train_files", str(tmp_path / "copy/*.parquet"), *three_files[2:]]
    verify = local.verify_partition

    def interrupted(path, documents):
        if "c.parquet" in documents.partition.path:
            raise KeyboardInterrupt
        return verify(path, documents)

    monkeypatch.setattr(local, "verify_partition", interrupted)
    with pytest.raises(SystemExit):
        prepare(tmp_path / "out", copied)
    monkeypatch.undo()
    assert sorted(finished_partitions(tmp_path / "out")) == [0, 1, 2, 3, 4]
    assert "\nchanged or copied since " in capsys.readouterr().err
    assert tokenized_again(tmp_path / "out", copied, monkeypatch) == []
    prepare(tmp_path / "fresh", copied)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, three_files, capsys, monkeypatch):
    tokenize = prepare_data.tokenize_locally

    def tokenize_and_change(*args):
        tokenize(*args)
        write_groups(tmp_path / "in/b.parquet", 3, 6)

    monkeypatch.setattr(prepare_data, "tokenize_locally", tokenize_and_change)
    message = error_of(capsys, tmp_path / "out", three_files)
    assert "b.parquet changed while it was read: run the same command again" in message
    monkeypatch.undo()
    assert tokenized_again(tmp_path / "out", three_files, monkeypatch) == [6]
    prepare(tmp_path / "fresh", three_files)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_changed_file_of_which_nothing_is_finished_is_not_said_to_be_kept(tmp_path, three_files, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "tokenize_locally", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            prepare(tmp_path / "out", three_files)
    write_groups(tmp_path / "in/b.parquet", 3, 6)
    prepare(tmp_path / "out", three_files)
    assert "changed or copied" not in "".join(capsys.readouterr())


def test_a_trained_tokenizer_is_written_once(tmp_path, tiny_texts, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(tiny_texts))
    arguments = ["--train_files", str(tmp_path / "a.txt"), "--tokenizer", "train", "--vocab_size", "300"]
    arguments += ["--validation_share", "0.3", "--workers", "1"]
    interrupt_before_the_shards(tmp_path / "out", arguments, monkeypatch, partitions=1)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/tokenizer").iterdir()}
    prepare(tmp_path / "out", arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/tokenizer").iterdir()} == written
    prepare(tmp_path / "fresh", arguments)
    assert contents(tmp_path / "fresh") == contents(tmp_path / "out")


@pytest.mark.parametrize("at", ["train_tokenizer_on", "make_prepare_spec"])
def test_a_file_that_grows_while_a_tokenizer_is_trained_on_it_is_noticed(tmp_path, tiny_texts, capsys, monkeypatch, at):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(tiny_texts))
    step = getattr(prepare_data, at)

    def grow_at_step(*args, **options):
        with file.open("a") as opened:
            opened.write("\nThe end.")
        return step(*args, **options)

    monkeypatch.setattr(prepare_data, at, grow_at_step)
    arguments = ["--train_files", str(file), "--tokenizer", "train", "--vocab_size", "300"]
    arguments += ["--validation_share", "0.3", "--workers", "1"]
    message = error_of(capsys, tmp_path / "out", arguments)
    assert "a.txt changed while it was read: run the same command again" in message
    monkeypatch.undo()
    prepare(tmp_path / "out", arguments)
    totals = open_shards(tmp_path / "out").manifest["splits"].values()
    assert sum(split["text_bytes"] for split in totals) == file.stat().st_size


def test_a_preparation_of_an_older_version_resumes(tmp_path, three_files, monkeypatch):
    """Its plan.json has neither the status change time of a file nor the later fields of spec and partitions."""
    interrupt_before_the_shards(tmp_path / "out", three_files, monkeypatch, partitions=6)
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    old_keys = ("source", "units", "tokenizer", "end_of_text_id", "validation_share", "max_tokens", "shard_tokens")
    plan = {key: plan[key] for key in (*old_keys, "layout", "files")}
    plan["files"] = [state[:3] for state in plan["files"]]
    plan["units"] = [
        {key: unit[key] for key in ("path", "start", "stop", "text_column", "text_bytes")} for unit in plan["units"]
    ]
    (tmp_path / "out/plan.json").write_text(json.dumps(plan))
    write_groups(tmp_path / "in/c.parquet", 9, 10)
    assert tokenized_again(tmp_path / "out", three_files, monkeypatch) == [9, 10]
    prepare(tmp_path / "fresh", three_files)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
