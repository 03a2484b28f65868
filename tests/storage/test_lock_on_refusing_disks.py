"""A lock whose file is deleted, refused, full or forgotten by its server: it stays with the program that has it."""

import errno
import json
import os
import sys

import pytest
from lock_holder import acquired, end_quietly, holder, record_of, refused, run_in, wait_for_beats
from patience import PATIENCE_SECONDS, wait_until
from refusing_disk import ERRORS, OPERATIONS

from modeling_gpt2repro.storage import lock
from modeling_gpt2repro.storage.lock import LOCK_FILE, FolderLock

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the tests stop holders by signals"),
    pytest.mark.usefixtures("short_times"),
]


def test_a_lock_file_that_somebody_deletes_comes_back(tmp_path):
    with holder(tmp_path) as first:
        (tmp_path / LOCK_FILE).unlink()
        wait_until((tmp_path / LOCK_FILE).exists)
        wait_until(lambda: (tmp_path / LOCK_FILE).read_bytes())
        assert f"process {first.pid} on" in refused(tmp_path)
        first.kill()
        first.wait()
        acquired(tmp_path)


def test_a_disk_that_is_away_for_a_moment_costs_nothing(tmp_path):
    with holder(tmp_path / "folder") as first:
        (tmp_path / "folder").rename(tmp_path / "away")
        wait_for_beats(first)
        (tmp_path / "away").rename(tmp_path / "folder")
        beat = record_of(tmp_path / "folder")["beat"]
        wait_until(lambda: record_of(tmp_path / "folder")["beat"] > beat)
        end_quietly(first)


def test_a_full_disk_costs_the_record_but_not_the_lock_or_the_program(tmp_path):
    full = "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"
    with holder(tmp_path, before=full) as first:
        assert (tmp_path / LOCK_FILE).read_bytes() == b""
        assert "is in use by another program: stop that first" in refused(tmp_path)
        wait_for_beats(first)
        run_in(first, "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))")
        wait_until(lambda: (tmp_path / LOCK_FILE).read_bytes())
        end_quietly(first)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operations", [("open", "write", "fsync"), OPERATIONS])
def test_a_disk_that_refuses_the_heartbeat_costs_neither_the_lock_nor_the_program(tmp_path, error, operations):
    disk = "import pytest\nfrom refusing_disk import RefusingDisk\n"
    disk += "disk = RefusingDisk(pytest.MonkeyPatch(), Path(sys.argv[1]))"
    with holder(tmp_path, before=disk) as first:
        run_in(first, f"disk.refuse({ERRORS[error]}, *{operations})")
        wait_for_beats(first)
        beat = record_of(tmp_path)["beat"]
        wait_for_beats(first)
        assert record_of(tmp_path)["beat"] == beat  # it is silent
        assert f"process {first.pid} on" in refused(tmp_path)  # and the operating system's lock is still there
        run_in(first, "disk.recover()")
        wait_until(lambda: record_of(tmp_path)["beat"] > beat)
        assert f"process {first.pid} on" in refused(tmp_path)
        end_quietly(first)
    assert list(tmp_path.iterdir()) == []


STALE_FILE = """
class Stale:  # a file whose NFS server has forgotten it: every use fails, whatever the path says
    def __init__(self, file):
        self.file = file

    def refuse(self, *arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    seek = write = fileno = refuse

    def close(self):
        self.file.close()
        self.refuse()
"""


def test_a_lock_file_that_its_server_has_forgotten_is_opened_again(tmp_path):
    with holder(tmp_path, before=STALE_FILE) as first:
        run_in(first, "held._file = Stale(held._file)")
        wait_for_beats(first)
        beat = record_of(tmp_path)["beat"]
        wait_until(lambda: record_of(tmp_path)["beat"] > beat)
        assert f"process {first.pid} on" in refused(tmp_path)
        end_quietly(first)
    assert list(tmp_path.iterdir()) == []


def test_a_holder_whose_file_was_forgotten_ends_where_another_has_taken_the_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(lock, "BEAT_SECONDS", PATIENCE_SECONDS)  # beats come from the test
    monkeypatch.setattr(os, "_exit", sys.exit)
    with FolderLock(tmp_path) as first, FolderLock(tmp_path) as second:
        first.acquire()
        first._is_stale = True
        (tmp_path / LOCK_FILE).unlink()
        second.acquire()
        with pytest.raises(SystemExit, match="1"):
            first._beat()
    assert "was taken over by process" in capfd.readouterr().err


def test_a_disk_that_takes_no_lock_file_does_not_stop_a_program(tmp_path, monkeypatch, capsys):
    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock, "open_in_place", read_only)
    with FolderLock(tmp_path) as held:
        held.acquire()
    assert capsys.readouterr().err == (
        f"{tmp_path / LOCK_FILE} cannot be written (Read-only file system): nothing keeps a second program out.\n"
    )
    (tmp_path / LOCK_FILE).touch()  # another user's
    with pytest.raises(ValueError, match="delete that file if there is none, or give another --output_dir"):
        FolderLock(tmp_path).acquire()


def test_each_record_is_flushed_for_other_machines_where_the_disk_can(tmp_path, monkeypatch):
    flushed = []

    def flush(descriptor):
        flushed.append(json.loads(os.pread(descriptor, lock.RECORD_BYTES, 0)))
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(lock.os, "fsync", flush)
    with FolderLock(tmp_path) as held:
        held.acquire()
        held.announce_stop()
        wait_until(lambda: flushed[-1]["stopping"])
    assert [record["beat"] for record in flushed] == list(range(len(flushed)))
