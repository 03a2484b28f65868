"""A preparation that is interrupted at any moment, even by kill -9, resumes to the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import PATIENCE_SECONDS, wait_until
from preparing import contents, error_of, interrupt_before_the_shards, prepare

import prepare_data
from modeling_gpt2repro.data.prepare import workspace
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions
from modeling_gpt2repro.data.shards.dataset import open_shards
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


def record_tokenized_partitions(monkeypatch):
    """A list that fills with the row groups that are tokenized in this process."""
    started = []
    read = Source.read

    def recorded(source, partition, *more):
        started.append(partition.start)
        return read(source, partition, *more)

    monkeypatch.setattr(Source, "read", recorded)
    return started


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


@pytest.mark.parametrize("years", [-1, 1])
def test_a_clock_that_was_set_by_a_year_costs_no_finished_partition(tmp_path, texts, monkeypatch, years):
    arguments, expected = texts
    interrupt_before_the_shards(tmp_path / "out", arguments, monkeypatch)
    for path in (tmp_path / "out").rglob("*"):  # as if what is there had been written before or after it
        times = path.stat().st_mtime + years * 365 * 24 * 3600
        os.utime(path, (times, times))
    started = record_tokenized_partitions(monkeypatch)
    prepare(tmp_path / "out", arguments)
    assert started == []
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
