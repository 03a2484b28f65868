"""One writer for a folder: who is refused, who waits, who takes over; with locks, and with the heartbeat alone."""

import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

import psutil
import pytest
from lock_holder import ROOT, acquired, holder, record_of, refused, run_in, wait_for_beats
from patience import PATIENCE_SECONDS, wait_until

from modeling_gpt2repro.storage import lock
from modeling_gpt2repro.storage.lock import BEAT_SECONDS, GONE_SECONDS, LOCK_FILE, FolderLock

NO_LOCKS = """
def refuse(file, mode):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refuse
"""
ANOTHER_MACHINE = """
socket.gethostname = lambda: "node7"
lock.machine_id = lambda: "another"
"""
RECORD = {"host": "node7", "pid": 71, "since": "2025-09-30 12:00:00+02:00", "machine": "another", "id": "71"}

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the tests stop holders by signals"),
    pytest.mark.usefixtures("short_times"),
]


@pytest.fixture
def when_waiting(monkeypatch):
    """when_waiting(*actions): the first is called when this process says that it waits, the next when it says more."""

    def plan(*actions):
        remaining = list(actions)
        print_now = lock.print_now

        def print_and_act(message):
            print_now(message)
            if remaining:
                remaining.pop(0)()

        monkeypatch.setattr(lock, "print_now", print_and_act)

    return plan


@pytest.fixture
def clock(monkeypatch):
    """A clock that only pauses move, in this process: [seconds]."""
    now = [0.0]
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.5)
    fake = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(lock, "time", fake)
    return now


def suspend(process):
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)


def without_locks(monkeypatch):
    def refuse(file, mode):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


def test_a_second_program_prints_who_holds_the_folder(tmp_path, capsys):
    before = datetime.now().astimezone() - timedelta(seconds=1)
    with holder(tmp_path) as first:
        message = refused(tmp_path)
        who = f"{tmp_path} is in use by process {first.pid} on host {socket.gethostname()} since "
        since, _, advice = message.removeprefix(who).partition(": ")
        assert before <= datetime.fromisoformat(since) <= datetime.now().astimezone()
        assert advice == "stop that first, or give another --output_dir."
        waiting = capsys.readouterr().err
        assert waiting == f"{who}{since}, which is running: waiting up to 1 s.\n"
        first.stdin.close()
        assert first.wait() == 0
    acquired(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_killed_holder_frees_the_folder_after_three_beats(tmp_path, capsys, monkeypatch, clock):
    monkeypatch.setattr(lock, "GONE_SECONDS", GONE_SECONDS)
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
        assert record_of(tmp_path)["pid"] == first.pid
        acquired(tmp_path)
    assert 3 * BEAT_SECONDS < clock[0] <= 3 * BEAT_SECONDS + 2 * lock.POLL_SECONDS
    assert "which may be dead: waiting up to" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["fork", "multiprocessing", "subprocess"])
def test_children_of_a_killed_holder_do_not_keep_the_folder(tmp_path, how):
    start = {
        "fork": f"child = os.fork() or time.sleep({PATIENCE_SECONDS})",
        "multiprocessing": "import multiprocessing; p = multiprocessing.get_context('fork').Process("
        f"target=time.sleep, args=({PATIENCE_SECONDS},)); p.start(); child = p.pid",
        "subprocess": f"child = subprocess.Popen(['sleep', '{PATIENCE_SECONDS}'], close_fds=False).pid",
    }[how]
    (tmp_path / "child").touch()
    folder = tmp_path / "folder"
    with holder(folder) as first:
        run_in(first, f"{start}; Path({str(tmp_path / 'child')!r}).write_text(str(child))")
        child = int((tmp_path / "child").read_text())
        try:
            refused(folder)  # the child's end of the lock is closed, the holder's is not
            first.kill()
            os.kill(child, 0)  # alive
            acquired(folder)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_holder_that_is_stopping_is_waited_for(tmp_path, capsys, monkeypatch, when_waiting):
    monkeypatch.setattr(lock, "RUNNING_PATIENCE_SECONDS", 0.0)
    with holder(tmp_path) as first:
        run_in(first, "held.announce_stop()")
        wait_until(lambda: record_of(tmp_path)["stopping"])
        when_waiting(lambda: run_in(first, "held.release()"))
        acquired(tmp_path)
    assert f"which is stopping: waiting up to {PATIENCE_SECONDS} s." in capsys.readouterr().err


def test_a_holder_that_does_not_stop_is_waited_for_no_longer_than_the_patience(tmp_path, clock):
    with holder(tmp_path) as first:
        run_in(first, "held.announce_stop()")
        wait_until(lambda: record_of(tmp_path)["stopping"])
        assert f"in use by process {first.pid} on" in refused(tmp_path, lock.PATIENCE_SECONDS)
        assert lock.PATIENCE_SECONDS < clock[0] <= lock.PATIENCE_SECONDS + 2 * lock.POLL_SECONDS


def test_a_stop_announced_while_another_waits_makes_it_wait_longer(tmp_path, capsys, monkeypatch, when_waiting):
    monkeypatch.setattr(lock, "RUNNING_PATIENCE_SECONDS", PATIENCE_SECONDS - 1)
    with holder(tmp_path) as first:
        when_waiting(lambda: run_in(first, "held.announce_stop()"), lambda: run_in(first, "held.release()"))
        acquired(tmp_path)
    states = [line.partition(", which ")[2] for line in capsys.readouterr().err.splitlines()]
    assert states == [
        f"is running: waiting up to {PATIENCE_SECONDS - 1} s.",
        f"is stopping: waiting up to {PATIENCE_SECONDS} s.",
    ]


def test_without_locks_a_beating_holder_on_another_machine_is_refused(tmp_path, monkeypatch, capsys):
    without_locks(monkeypatch)
    with holder(tmp_path, before=NO_LOCKS + ANOTHER_MACHINE) as first:
        assert f"process {first.pid} on host node7 since" in refused(tmp_path)
        first.stdin.close()
        assert "has no file locks" in first.stderr.read()
        assert first.wait() == 0
    acquired(tmp_path)
    assert f"the disk of {tmp_path} has no file locks" in capsys.readouterr().err


def test_a_lock_that_only_one_machine_sees_does_not_let_a_second_one_in(tmp_path):
    """On Lustre with localflock, or NFS with local_lock: the system grants what another machine has."""
    with holder(tmp_path, before=NO_LOCKS.replace("raise", "return") + ANOTHER_MACHINE):
        assert "on host node7 since" in refused(tmp_path)


def test_a_lock_that_only_one_container_sees_does_not_let_a_second_one_in(tmp_path, monkeypatch):
    """With a mount for each container, of FUSE or NFS, the system grants what another one of this machine has."""
    monkeypatch.setattr(lock, "GONE_SECONDS", PATIENCE_SECONDS)
    with holder(tmp_path, before=NO_LOCKS.replace("raise", "return")) as first:
        assert f"in use by process {first.pid} on" in refused(tmp_path)
        wait_for_beats(first)
        assert record_of(tmp_path)["pid"] == first.pid


@pytest.mark.parametrize("with_locks", [True, False])
def test_a_silent_holder_on_another_machine_is_dead_after_a_while(tmp_path, monkeypatch, capsys, clock, with_locks):
    if not with_locks:
        without_locks(monkeypatch)
    (tmp_path / LOCK_FILE).write_text(json.dumps(RECORD))
    acquired(tmp_path)
    assert lock.DEAD_SECONDS < clock[0] <= lock.DEAD_SECONDS + 4 * lock.POLL_SECONDS
    who = "process 71 on host node7 since 2025-09-30 12:00:00+02:00"
    assert f"{who}, which may be dead: waiting up to {PATIENCE_SECONDS} s." in capsys.readouterr().err


def test_a_silent_holder_that_the_system_says_is_there_is_not_dead(tmp_path, monkeypatch):
    """A machine that died, whose lock the NFS server keeps for a while; or one that is cut off."""
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.1)
    with holder(tmp_path, before=ANOTHER_MACHINE) as first:
        suspend(first)
        assert f"or delete {tmp_path / LOCK_FILE} if it is dead" in refused(tmp_path, patience_seconds=1)


@pytest.mark.parametrize("content", [b"", b'{"host": "no', b"[]", b"\0" * 512])
def test_a_record_that_a_crash_cut_off_holds_nothing(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    acquired(tmp_path, patience_seconds=0)


def test_a_record_of_brackets_names_no_holder():
    assert lock.parse_record(b"[" * 100_000) == {}


def test_a_holder_that_was_taken_for_dead_ends_when_it_wakes(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.5)
    with holder(tmp_path, before=NO_LOCKS + ANOTHER_MACHINE) as first:
        suspend(first)
        with FolderLock(tmp_path, PATIENCE_SECONDS) as second:
            second.acquire()
            os.kill(first.pid, signal.SIGCONT)
            assert first.wait(PATIENCE_SECONDS) == 1
            assert f"{tmp_path} was taken over by process {os.getpid()} on host" in first.stderr.read()
            assert record_of(tmp_path)["pid"] == os.getpid()


def test_a_wall_clock_that_jumps_costs_no_lock(tmp_path, monkeypatch):
    """Of the holder, and of the program that waits for it: an hour or a year, forward and back, at every look at it."""
    jumps = itertools.cycle([3600.0, -3600.0, 3.2e7, -3.2e7])
    wall_clock = time.time
    before = "import itertools\njumps = itertools.cycle([3600.0, -3600.0, 3.2e7, -3.2e7])\n"
    before += "wall_clock = time.time; time.time = lambda: wall_clock() + next(jumps)"
    monkeypatch.setattr(time, "time", lambda: wall_clock() + next(jumps))
    with holder(tmp_path, before=before) as first:
        assert f"process {first.pid} on" in refused(tmp_path)
        for moved in (3.2e7, -3.2e7):  # what the file server's clock makes of the file
            os.utime(tmp_path / LOCK_FILE, (wall_clock() + moved, wall_clock() + moved))
            assert f"process {first.pid} on" in refused(tmp_path)
        first.kill()
        first.wait()
        acquired(tmp_path)


def test_a_file_that_goes_while_it_is_locked_is_locked_again(tmp_path, monkeypatch):
    read_holder = FolderLock._holder

    def stale(self):
        monkeypatch.setattr(FolderLock, "_holder", read_holder)
        (tmp_path / LOCK_FILE).unlink()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(FolderLock, "_holder", stale)
    acquired(tmp_path)


@pytest.mark.parametrize("deleted", ["folder", "file"])
def test_a_program_whose_folder_or_file_is_deleted_while_it_waits_has_the_lock_all_the_same(
    tmp_path, monkeypatch, deleted
):
    folder = tmp_path / "folder"
    with holder(folder) as first:
        run_in(first, "held.announce_stop()")
        wait_until(lambda: record_of(folder)["stopping"])
        attempts = []
        open_in_place = lock.open_in_place

        def open_and_delete(path):
            """Between the second attempt's start and its look at the file."""
            attempts.append(path)
            if len(attempts) == 2:
                run_in(first, "held.release()")
                if deleted == "folder":
                    folder.rmdir()
                else:
                    raise OSError(errno.ESTALE, "Stale file handle")
            return open_in_place(path)

        monkeypatch.setattr(lock, "open_in_place", open_and_delete)
        acquired(folder)


TAKE_TURNS = """
import os, sys
from pathlib import Path
from modeling_gpt2repro.storage import lock
lock.POLL_SECONDS, lock.BEAT_SECONDS = 0.0005, 0.001
lock.RUNNING_PATIENCE_SECONDS = patience = float(sys.argv[2])
folder = Path(sys.argv[1])
for _ in range(150):
    with lock.FolderLock(folder, patience) as held:
        held.acquire()
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails if the other one is inside
        os.unlink(folder / "inside")
"""


def test_two_programs_that_take_turns_are_never_inside_together(tmp_path):
    """Each deletes the lock file at its end, while the other may have opened it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "GPT2REPRO_LAZY": "1"}
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path), str(PATIENCE_SECONDS)]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=2 * PATIENCE_SECONDS)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert list(tmp_path.iterdir()) == []
