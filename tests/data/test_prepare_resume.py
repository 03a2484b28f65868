"""A preparation that is interrupted at any moment, even by kill -9, resumes to the same bytes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import PATIENCE_SECONDS, wait_until

import prepare_data
from modeling_gpt2repro.data.prepare import assemble, local, workspace
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources import resolve
from modeling_gpt2repro.data.sources.resolve import Source
from modeling_gpt2repro.storage import atomic, lock

REPOSITORY = Path(__file__).parents[2]

# For every n: killed when its n-th file is renamed, then run again undisturbed. Prints what each run did.
KILLED_EVERYWHERE = """
import json
import os
import signal
import sys
from pathlib import Path

import prepare_data
from modeling_gpt2repro.data.sources.resolve import Source
from modeling_gpt2repro.storage import atomic, lock
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions

root, arguments = Path(sys.argv[1]), sys.argv[2:]

def run(folder, kill_at, late=False):
    child = os.fork()  # the imports are done once
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(folder.with_suffix(".stderr"), os.O_WRONLY | os.O_CREAT), 2)
    started = []
    renamed = []
    read = Source.read

    def replace(old, new, rename=os.replace):
        renamed.append(new)
        if late:
            rename(old, new)
        if len(renamed) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not late:
            rename(old, new)

    def recorded(source, partition, *more):
        started.append(partition.start)
        return read(source, partition, *more)

    atomic.os.replace = replace
    Source.read = recorded
    prepare_data.main(["--output_dir", str(folder), *arguments])
    folder.with_suffix(".json").write_text(json.dumps(started))
    os._exit(0)

lock.GONE_SECONDS = 0.0  # the killed one is gone
results = []
for kill_at in range(1, 100):
    folder = root / f"killed{kill_at}"
    killed = run(folder, kill_at, late=kill_at % 2 == 0)
    if killed == 0:
        break
    finished = sorted(finished_partitions(folder))
    manifest = (folder / "manifest.json").exists()
    again = run(folder, None)
    started = json.loads(folder.with_suffix(".json").read_text())
    results.append({"killed": killed, "again": again, "finished": finished, "started": started, "manifest": manifest})
print(json.dumps(results))
"""

# prepare_data.py with workers that stay at work: once $HELD_AT partitions are finished, the next one never ends.
HELD = f"""
import os
import threading

import prepare_data
from modeling_gpt2repro.data.prepare import local
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions

write_partition = local.write_partition

def write_or_hold(folder, *tokenized):
    if len(finished_partitions(folder)) >= int(os.environ["HELD_AT"]):
        threading.Event().wait({PATIENCE_SECONDS})
    write_partition(folder, *tokenized)

local.write_partition = write_or_hold
if __name__ == "__main__":
    prepare_data.main()
"""


def start_held(tmp_path, held_at, *arguments):
    """prepare_data.py with two workers that are still at work after `held_at` partitions, in a session of its own."""
    script = tmp_path / "held.py"
    script.write_text(HELD)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HELD_AT": str(held_at)}
    command = [sys.executable, script, "--output_dir", tmp_path / "out", *arguments, "--workers", "2"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_texts, tiny_tokenizer):
    """Arguments for a parquet file of 5 row groups and the tiny tokenizer; and the bytes that they become."""
    folder = tmp_path_factory.mktemp("texts")
    table = pa.table({"text": [*tiny_texts[:197], "", " \n", None], "id": [f"urn:{i}" for i in range(200)]})
    pq.write_table(table, folder / "texts.parquet", row_group_size=40)
    tiny_tokenizer.save_pretrained(folder / "tiny")
    arguments = ["--train_files", str(folder / "texts.parquet"), "--tokenizer", str(folder / "tiny")]
    arguments += ["--validation_share", "0.2", "--shard_tokens", "8000", "--workers", "1"]
    prepare_data.main(["--output_dir", str(folder / "undisturbed"), *arguments])
    return arguments, contents(folder / "undisturbed")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare(folder, arguments, *more):
    prepare_data.main(["--output_dir", str(folder), *arguments, *map(str, more)])


def error_of(capsys, folder, arguments, *more):
    with pytest.raises(SystemExit) as end:
        prepare(folder, arguments, *more)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked, to import once")
def test_killed_before_or_after_any_file_it_resumes_to_the_same_bytes(tmp_path, texts, warm_python):
    arguments, expected = texts
    done = warm_python.run("-c", KILLED_EVERYWHERE, tmp_path, *arguments)
    results = json.loads(done.stdout.splitlines()[-1])
    shards = [name for name in expected if name.endswith(".npy")]
    # The tokenizer for its hash, spec, tokenizer, partitions, shards, manifest.
    assert len(results) == 3 + 5 + len(shards) + 1
    for kill_at, result in enumerate(results, start=1):
        assert (result["killed"], result["again"]) == (signal.SIGKILL, 0)
        if not result["manifest"]:  # finished partitions are not tokenized again
            assert sorted(result["finished"] + result["started"]) == [0, 1, 2, 3, 4]
        assert contents(tmp_path / f"killed{kill_at}") == expected
    # Every second one is killed after its file was renamed, the others before.
    assert [len(result["finished"]) for result in results[:9]] == [0, 0, 0, 1, 1, 3, 3, 5, 5]
    assert results[-1]["manifest"] is (len(results) % 2 == 0)


def test_two_workers_end_when_their_parent_is_killed_and_one_process_resumes(
    tmp_path, texts, tiny_texts, monkeypatch, capsys
):
    """Also: two workers make the bytes that one makes."""
    pq.write_table(
        pa.table({"text": [f"{i}: {text}" for i, text in enumerate(tiny_texts)]}),
        tmp_path / "texts.parquet",
        row_group_size=8,
    )
    arguments = ["--train_files", str(tmp_path / "texts.parquet"), *texts[0][2:6]]
    with start_held(tmp_path, 4, *arguments) as process:
        wait_until(lambda: len(finished_partitions(tmp_path / "out")) >= 4)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    if Path("/proc").is_dir():  # its processes are those of its session
        wait_until(lambda: not session_of(process.pid))
    before = {number: path.stat().st_mtime_ns for number, (_, path) in finished_partitions(tmp_path / "out").items()}
    assert 4 <= len(before) <= 5  # a worker looks before it writes, and there are two

    started = record_tokenized_partitions(monkeypatch)
    monkeypatch.setattr(lock, "GONE_SECONDS", 0.0)
    monkeypatch.setattr(prepare_data, "finish_job", lambda folder: None)
    prepare(tmp_path / "out", arguments, "--workers", 1)
    assert sorted([*started, *before]) == list(range(25))
    after = {number: path.stat().st_mtime_ns for number, (_, path) in finished_partitions(tmp_path / "out").items()}
    assert {number: after[number] for number in before} == before
    monkeypatch.undo()
    with pytest.raises(SystemExit):  # only the clean-up is missing, and these shards are of another spec
        prepare(tmp_path / "out", arguments, "--max_tokens", 5)
    assert "holds prepared shards already" in capsys.readouterr().err
    prepare(tmp_path / "out", arguments)
    prepare(tmp_path / "one", arguments, "--workers", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def interrupt_before_the_shards(folder, arguments, monkeypatch, partitions=5):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, "write_shards", interrupt)
    with pytest.raises(SystemExit) as end:
        prepare(folder, arguments)
    assert end.value.code == 130
    monkeypatch.undo()
    assert len(finished_partitions(folder)) == partitions


def record_tokenized_partitions(monkeypatch):
    """A list that fills with the row groups that are tokenized in this process."""
    started = []
    read = Source.read

    def recorded(source, partition, *more):
        started.append(partition.start)
        return read(source, partition, *more)

    monkeypatch.setattr(Source, "read", recorded)
    return started


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

    def recorded(documents, *more):
        documents = list(documents)
        again.append(int(documents[0].id.split("-")[0]) if documents else None)
        return tokenize(documents, *more)

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
    good = [json.dumps({"id": f"{row}", "text": f"The cold sea number {row} goes on."}).encode() for row in range(60)]
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


def session_of(leader):
    """Ids of the processes that are alive in the session of `leader`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(session) == leader and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.slow
def test_a_killed_worker_ends_the_preparation_with_one_sentence(tmp_path, texts, tiny_texts):
    pq.write_table(pa.table({"text": tiny_texts}), tmp_path / "texts.parquet", row_group_size=8)
    arguments = ["--train_files", str(tmp_path / "texts.parquet"), *texts[0][2:6]]
    with start_held(tmp_path, 1, *arguments) as process:
        wait_until(lambda: finished_partitions(tmp_path / "out"))
        spawned = [pid for pid in session_of(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(spawned[0]), signal.SIGKILL)
        message = process.stderr.read().splitlines()[-1]
    assert process.returncode == 2
    assert "a worker was killed" in message
    assert "what is finished is kept." in message


@pytest.mark.slow
def test_an_error_in_one_worker_ends_the_others_at_once(tmp_path, texts):
    line = b'{"text": "The ship sails over the cold sea."}\n'
    first_partition = line * (2**24 // len(line) + 1)
    (tmp_path / "a.jsonl").write_bytes(first_partition + b'{"text": 5}\n' + 4 * first_partition)
    arguments = ["--train_files", str(tmp_path / "a.jsonl"), *texts[0][2:6]]
    with start_held(tmp_path, 1, *arguments) as process:
        message = process.stderr.read().splitlines()[-1]
    assert process.returncode == 2
    assert (
        f"bytes 16777216 to 33554432 of {tmp_path / 'a.jsonl'}: line {2**24 // len(line) + 2:,} (byte 1677" in message
    )
    assert len(finished_partitions(tmp_path / "out")) <= 1  # the other worker had three to tokenize
    if Path("/proc").is_dir():
        wait_until(lambda: not session_of(process.pid))


def full_disk_at(monkeypatch, number):
    """From the `number`-th fsync of storage/atomic.py on, the disk is full; the lock's heartbeat has its own."""
    calls = []

    def fsync(file, fsync=os.fsync):
        calls.append(file)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(atomic, "os", SimpleNamespace(**{**vars(os), "fsync": fsync}))


# A file and its folder are flushed: the spec (after a tokenizer, for its hash), a partition (after the tokenizer), the
# first shard, the last.
@pytest.mark.parametrize("at", [3, 10, 17, 21])
def test_a_full_disk_is_one_sentence_and_finished_partitions_stay(tmp_path, texts, capsys, monkeypatch, at):
    arguments, expected = texts
    full_disk_at(monkeypatch, at)
    message = error_of(capsys, tmp_path / "out", arguments)
    assert message.endswith("free some space and run the same command again; finished work is kept.")
    assert message.startswith(
        f"{Path(sys.argv[0]).name}: the disk of {tmp_path / 'out'} is full (No space left on device): "
    )
    assert not list((tmp_path / "out").rglob("*.partial"))  # they would keep the disk full
    assert len(finished_partitions(tmp_path / "out")) == {3: 0, 10: 2, 17: 5, 21: 5}[at]
    monkeypatch.undo()
    started = record_tokenized_partitions(monkeypatch)
    prepare(tmp_path / "out", arguments)
    assert started == {3: [0, 1, 2, 3, 4], 10: [2, 3, 4], 17: [], 21: []}[at]
    assert contents(tmp_path / "out") == expected


def test_other_options_are_refused_and_the_same_resume(tmp_path, texts, capsys, monkeypatch):
    arguments, expected = texts
    interrupt_before_the_shards(tmp_path / "out", arguments, monkeypatch)
    before = contents(tmp_path / "out")
    for more, part in (
        (["--max_tokens", "9000"], "max_tokens None there, 9000 now"),
        (["--shard_tokens", "9e3"], "shard_tokens 8000 there, 9000 now"),
        (["--validation_share", "0.3"], "validation_share 0.2 there, 0.3 now"),
        (["--layout", "karpathy"], "layout plain there, karpathy now"),
        (["--text_column", "id"], "source {'text_column': 'text'} there, {'text_column': 'id'} now"),
    ):
        message = error_of(capsys, tmp_path / "out", arguments, *more)
        assert f"{tmp_path / 'out'} holds an unfinished preparation with other options (" in message
        assert part in message
    assert contents(tmp_path / "out") == before
    monkeypatch.chdir(Path(arguments[1]).parent)  # the folder of the text does not count
    prepare(tmp_path / "out", ["--train_files", "texts.parquet", *arguments[2:]])
    assert contents(tmp_path / "out") == expected


def test_interrupted_clearing_is_resumed(tmp_path, texts, monkeypatch):
    arguments, expected = texts
    interrupt_before_the_shards(tmp_path / "out", arguments, monkeypatch)
    (tmp_path / "out/train_000000.npy").touch()
    for _, path in finished_partitions(tmp_path / "out").values():  # so that there is nothing to resume
        path.unlink()

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace, "shutil", SimpleNamespace(rmtree=interrupt))
    with pytest.raises(SystemExit):
        prepare(tmp_path / "out", arguments)
    monkeypatch.undo()
    prepare(tmp_path / "out", arguments)
    assert contents(tmp_path / "out") == expected


def test_a_damaged_partition_file_is_one_sentence(tmp_path, texts, capsys, monkeypatch):
    arguments, expected = texts
    interrupt_before_the_shards(tmp_path / "out", arguments, monkeypatch)
    path = finished_partitions(tmp_path / "out")[2][1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "is damaged (Bad CRC-32" in error_of(capsys, tmp_path / "out", arguments)
    path.unlink()
    prepare(tmp_path / "out", arguments)
    assert contents(tmp_path / "out") == expected


def test_only_the_partitions_that_max_tokens_needs_are_tokenized(tmp_path, texts, monkeypatch, all_ids):
    started = record_tokenized_partitions(monkeypatch)
    prepare(tmp_path / "out", texts[0], "--max_tokens", 6000)
    assert started == [0, 1, 2]
    assert len(all_ids(open_shards(tmp_path / "out"))) == 6000
    assert open_shards(tmp_path / "out").manifest["units"]["count"] == 3
