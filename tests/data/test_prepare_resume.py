"""A preparation that was cut off, at any moment and however hard, and is started again."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from modeling_gpt2repro.data.prepare import tokenize_units
from modeling_gpt2repro.data.prepare import workspace as preparation_folder
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.storage import atomic

REPOSITORY = Path(__file__).parents[2]

# Is killed before its n-th file gets its name, for every n, and each time runs again in peace; prints what was done.
KILLED_EVERYWHERE = """
import json
import os
import signal
import sys
from pathlib import Path

import prepare_data
from modeling_gpt2repro.data.prepare import tokenize_units
from modeling_gpt2repro.storage import atomic
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions

root, arguments = Path(sys.argv[1]), sys.argv[2:]

def run(folder, kill_at, late=False):
    child = os.fork()  # the imports are done once
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(folder.with_suffix(".told"), os.O_WRONLY | os.O_CREAT), 2)
    begun, renamed, tokenize = [], [], tokenize_units.tokenize_partition

    def replace(old, new, rename=os.replace):
        renamed.append(new)
        if late:
            rename(old, new)
        if len(renamed) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not late:
            rename(old, new)

    def tokenize_partition(source, unit, *more):
        begun.append(unit.start)
        return tokenize(source, unit, *more)

    atomic.os.replace, tokenize_units.tokenize_partition = replace, tokenize_partition
    prepare_data.main(["--output_dir", str(folder), *arguments])
    folder.with_suffix(".json").write_text(json.dumps(begun))
    os._exit(0)

results = []
for kill_at in range(1, 100):
    folder = root / f"killed{kill_at}"
    killed = run(folder, kill_at, late=kill_at % 2 == 0)
    if killed == 0:
        break
    finished = sorted(finished_partitions(folder))
    manifest = (folder / "manifest.json").exists()
    again = run(folder, None)
    begun = json.loads(folder.with_suffix(".json").read_text())
    results.append({"killed": killed, "again": again, "finished": finished, "begun": begun, "manifest": manifest})
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_texts, tiny_tokenizer):
    """A parquet file of 5 row groups and the tiny tokenizer's folder, as arguments; and the bytes that they become."""
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


def told_by(capsys, folder, arguments, *more):
    with pytest.raises(SystemExit) as end:
        prepare(folder, arguments, *more)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked, to import once")
def test_killed_before_or_after_any_file_it_goes_on_to_the_same_bytes(tmp_path, texts, warm_python):
    arguments, expected = texts
    done = warm_python.run("-c", KILLED_EVERYWHERE, tmp_path, *arguments)
    results = json.loads(done.stdout.splitlines()[-1])
    shards = [name for name in expected if name.endswith(".npy")]
    assert len(results) == 1 + 5 + len(shards) + 1  # plan, units, shards, manifest
    for kill_at, result in enumerate(results, start=1):
        assert (result["killed"], result["again"]) == (signal.SIGKILL, 0)
        if not result["manifest"]:  # what was finished is not done again
            assert sorted(result["finished"] + result["begun"]) == [0, 1, 2, 3, 4]
        assert contents(tmp_path / f"killed{kill_at}") == expected
    # Every second one is killed after its file has its name, the others before.
    assert [len(result["finished"]) for result in results[:7]] == [0, 1, 1, 3, 3, 5, 5]
    assert results[-1]["manifest"] is (len(results) % 2 == 0)


def test_two_processes_killed_in_the_middle_leave_nothing_behind_and_one_goes_on(
    tmp_path, texts, tiny_texts, monkeypatch, capsys
):
    """Also: two workers make the bytes that one makes."""
    pq.write_table(
        pa.table({"text": [f"{i}: {text}" for i, text in enumerate(tiny_texts * 100)]}),
        tmp_path / "texts.parquet",
        row_group_size=800,
    )
    arguments = ["--train_files", str(tmp_path / "texts.parquet"), *texts[0][2:6]]
    command = [sys.executable, "prepare_data.py", "--output_dir", str(tmp_path / "out"), *arguments, "--workers", "2"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, start_new_session=True) as process:
        wait_for(lambda: len(finished_partitions(tmp_path / "out")) >= 4)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    if Path("/proc").is_dir():  # its processes are those of its session
        wait_for(lambda: not session_of(process.pid))
    before = {number: path.stat().st_mtime_ns for number, (_, path) in finished_partitions(tmp_path / "out").items()}
    assert 4 <= len(before) < 25

    begun = noting_units(monkeypatch)
    monkeypatch.setattr(prepare_data, "finish_job", lambda folder: None)
    prepare(tmp_path / "out", arguments, "--workers", 1)
    assert sorted([*begun, *before]) == list(range(25))
    after = {number: path.stat().st_mtime_ns for number, (_, path) in finished_partitions(tmp_path / "out").items()}
    assert {number: after[number] for number in before} == before
    monkeypatch.undo()
    with pytest.raises(SystemExit):  # what was cut off was the clearing, and these shards are not of another plan
        prepare(tmp_path / "out", arguments, "--max_tokens", 5)
    assert "holds prepared shards already" in capsys.readouterr().err
    prepare(tmp_path / "out", arguments)
    prepare(tmp_path / "one", arguments, "--workers", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def cut_off_before_the_shards(folder, arguments, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize_units, "write_shards", cut_off)
    with pytest.raises(SystemExit) as end:
        prepare(folder, arguments)
    assert end.value.code == 130
    monkeypatch.undo()
    assert len(finished_partitions(folder)) == 5


def noting_units(monkeypatch):
    """A list that fills with the row groups that are tokenized in this process."""
    begun, tokenize = [], tokenize_units.tokenize_partition

    def noted(source, unit, *more):
        begun.append(unit.start)
        return tokenize(source, unit, *more)

    monkeypatch.setattr(tokenize_units, "tokenize_partition", noted)
    return begun


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def session_of(leader):
    """Processes that live in the session of `leader`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # gone meanwhile
            continue
        if int(session) == leader and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_in_a_sentence(tmp_path, texts, tiny_texts):
    pq.write_table(pa.table({"text": tiny_texts * 1000}), tmp_path / "texts.parquet", row_group_size=1600)
    arguments = ["--train_files", str(tmp_path / "texts.parquet"), *texts[0][2:6]]
    command = [sys.executable, "prepare_data.py", "--output_dir", str(tmp_path / "out"), *arguments, "--workers", "2"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: finished_partitions(tmp_path / "out"))
        spawned = [pid for pid in session_of(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(spawned[0]), signal.SIGKILL)
        told = process.stderr.read().splitlines()[-1]
    assert process.returncode == 2
    assert "a worker was killed" in told
    assert "what is finished is kept." in told


def full_disk_at(monkeypatch, number):
    """The `number`-th file that is written does not fit, nor any after it."""
    calls = []

    def fsync(file, fsync=os.fsync):
        calls.append(file)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(atomic.os, "fsync", fsync)


@pytest.mark.parametrize(
    "at", [1, 6, 13, 17]
)  # each file is flushed twice: the plan, a unit, the first shard, the last
def test_a_full_disk_is_a_sentence_and_what_is_finished_stays(tmp_path, texts, capsys, monkeypatch, at):
    arguments, expected = texts
    full_disk_at(monkeypatch, at)
    told = told_by(capsys, tmp_path / "out", arguments)
    assert told.endswith("free some space and run the same command again; finished work is kept.")
    assert told.startswith(
        f"{Path(sys.argv[0]).name}: the disk of {tmp_path / 'out'} is full (No space left on device): "
    )
    assert not list((tmp_path / "out").rglob("*.partial"))  # they would keep the disk full
    assert len(finished_partitions(tmp_path / "out")) == {1: 0, 6: 2, 13: 5, 17: 5}[at]
    monkeypatch.undo()
    begun = noting_units(monkeypatch)
    prepare(tmp_path / "out", arguments)
    assert begun == {1: [0, 1, 2, 3, 4], 6: [2, 3, 4], 13: [], 17: []}[at]
    assert contents(tmp_path / "out") == expected


def test_another_plan_is_refused_and_the_same_goes_on(tmp_path, texts, capsys, monkeypatch):
    arguments, expected = texts
    cut_off_before_the_shards(tmp_path / "out", arguments, monkeypatch)
    before = contents(tmp_path / "out")
    for more, part in (
        (["--max_tokens", "9000"], "max_tokens None there, 9000 now"),
        (["--shard_tokens", "9e3"], "shard_tokens 8000 there, 9000 now"),
        (["--validation_share", "0.3"], "validation_share 0.2 there, 0.3 now"),
        (["--layout", "karpathy"], "layout plain there, karpathy now"),
        (["--text_column", "id"], "other text"),
    ):
        told = told_by(capsys, tmp_path / "out", arguments, *more)
        assert f"{tmp_path / 'out'} holds an unfinished preparation with another plan (" in told
        assert part in told
    file = Path(arguments[1])
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert "text that changed" in told_by(capsys, tmp_path / "out", arguments)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert contents(tmp_path / "out") == before
    monkeypatch.chdir(file.parent)  # where the text lies does not count
    prepare(tmp_path / "out", ["--train_files", file.name, *arguments[2:]])
    assert contents(tmp_path / "out") == expected


def test_clearing_that_was_cut_off_goes_on(tmp_path, texts, monkeypatch):
    arguments, expected = texts
    cut_off_before_the_shards(tmp_path / "out", arguments, monkeypatch)
    (tmp_path / "out/train_000000.npy").touch()
    for _, path in finished_partitions(tmp_path / "out").values():  # so that there is nothing to go on with
        path.unlink()

    def cut_off(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation_folder, "shutil", SimpleNamespace(rmtree=cut_off))
    with pytest.raises(SystemExit):
        prepare(tmp_path / "out", arguments)
    monkeypatch.undo()
    prepare(tmp_path / "out", arguments)
    assert contents(tmp_path / "out") == expected


def test_a_damaged_unit_is_a_sentence(tmp_path, texts, capsys, monkeypatch):
    arguments, expected = texts
    cut_off_before_the_shards(tmp_path / "out", arguments, monkeypatch)
    path = finished_partitions(tmp_path / "out")[2][1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "is damaged (Bad CRC-32" in told_by(capsys, tmp_path / "out", arguments)
    path.unlink()
    prepare(tmp_path / "out", arguments)
    assert contents(tmp_path / "out") == expected


def test_only_the_units_that_are_needed_are_tokenized(tmp_path, texts, monkeypatch, all_ids):
    begun = noting_units(monkeypatch)
    prepare(tmp_path / "out", texts[0], "--max_tokens", 6000)
    assert begun == [0, 1, 2]
    assert len(all_ids(open_shards(tmp_path / "out"))) == 6000
    assert open_shards(tmp_path / "out").manifest["units"]["count"] == 3
