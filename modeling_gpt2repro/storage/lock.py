"""One writer per folder: a lock of the operating system, and a heartbeat for disks where such locks do not work.

The kernel releases its lock the moment the holder ends, however it ends. But a network disk may have no locks, or locks
that only one machine or one container sees. So the lock file also holds a record of the holder, which changes every two
seconds while the holder is alive: another program that sees it change knows that the folder is in use. No clocks are
compared.
"""

import errno
import json
import os
import socket
import stat
import sys
import threading
import time
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from .json_files import parse_json, read_bounded, shown

LOCK_FILE = "run.lock"
RECORD_BYTES = 512  # always padded to this, so that one write replaces a record
MAX_RECORD_BYTES = 2**16  # that are read of a lock file, which may be a stranger's
LOCKED_BYTE = 2**30  # the byte that Windows locks: beyond the record, because a locked byte cannot be read there
POLL_SECONDS = 0.5
BEAT_SECONDS = 2.0
GONE_SECONDS = 6.0  # three beats, for a holder of this machine without the lock: it is seldom on a mount of its own
DEAD_SECONDS = 60.0  # thirty beats: a busy machine or a disk that hangs may miss some
RUNNING_PATIENCE_SECONDS = 10.0  # the holder may just have been asked to stop, which its next beats would show
PATIENCE_SECONDS = 240.0  # the last checkpoint of a large model takes minutes; NFS keeps a dead machine's lock for 90 s


class FolderLock:
    """Context manager that releases at its end the lock that `acquire` took.

    Args:
        folder: The folder to lock.
        patience_seconds: How long `acquire` waits, at most.
    """

    def __init__(self, folder: Path, patience_seconds: float = PATIENCE_SECONDS):
        self.folder = folder
        self.path = folder / LOCK_FILE
        self._is_stopping = False
        self._patience_seconds = patience_seconds
        self._id = uuid4().hex
        self._machine = machine_id()
        self._since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self._beats = 0
        self._is_stale = False  # whether the open file is of no more use, because an NFS server has forgotten it
        self._file: BinaryIO | None = None  # open while the lock is held
        self._is_over = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat_until_over, daemon=True)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *exception):
        self.release()

    def acquire(self):
        """Take the lock, and create the folder if there is none; wait while another program may be about to release it.

        The wait is ten seconds if the holder is running, and `patience_seconds` if it is stopping or may be dead. It is
        taken for dead after a minute without a heartbeat, or six seconds if it was on this machine, unless the
        operating system says that it has the lock. Where no lock file can be written, a line on stderr says so, and
        there is no lock.

        Raises:
            ValueError: If another program still has it, with host and process, or if there is a lock file that cannot
                be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._wait()
        except OSError as error:
            if self.path.exists():
                raise ValueError(
                    f"{self.path} cannot be written ({error.strerror}), so another program may be using the folder: "
                    "delete that file if there is none, or give another --output_dir."
                ) from error
            print_now(f"{self.path} cannot be written ({error.strerror}): nothing keeps a second program out.")
            return
        if hasattr(os, "register_at_fork"):  # a forked child shares the open file, and with it the lock
            close = weakref.WeakMethod(self._close)
            os.register_at_fork(after_in_child=lambda: (method := close()) and method())
        self._heartbeat.start()

    def announce_stop(self):
        """Let others know that this program is about to end, so that they wait. Safe to call in a signal handler."""
        self._is_stopping = True

    def release(self):
        """Delete the lock file and release the lock; does nothing if it is not held."""
        if self._file is None:
            return
        self._is_over.set()
        if self._heartbeat.is_alive():
            self._heartbeat.join()
        if os.name != "posix":
            self._file.close()  # Windows cannot delete an open file
        with suppress(OSError):
            if self._holder().get("id") == self._id:
                self.path.unlink()
        self._close()

    def _wait(self):
        started = changed = time.monotonic()
        seen, shown, is_alive = None, None, False
        while True:
            try:
                is_locked, record = self._attempt(seen, silent_seconds=time.monotonic() - changed)
            except OSError as error:
                if seen is None and error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                # The folder or the file was deleted meanwhile, or the disk is unreachable: it may come back.
                self._close()
                changed = time.monotonic()
                is_locked, record = False, seen or b""
                with suppress(OSError):
                    self.folder.mkdir(parents=True, exist_ok=True)
            if self._file is not None:
                return
            if seen is not None and record != seen:
                changed = time.monotonic()
                is_alive = True
            seen = record
            holder = parse_record(record)
            is_alive = is_alive or (is_locked and holder.get("machine", self._machine) == self._machine)
            who = describe(holder)
            if holder.get("stopping"):
                patience, what = self._patience_seconds, "is stopping"
            elif is_alive:
                patience, what = min(RUNNING_PATIENCE_SECONDS, self._patience_seconds), "is running"
            else:
                patience, what = self._patience_seconds, "may be dead"
            if time.monotonic() - started > patience:
                advice = "" if is_alive else f", or delete {self.path} if it is dead"
                raise ValueError(
                    f"{self.folder} is in use by {who}: stop that first{advice}, or give another --output_dir."
                )
            if holder and what != shown:
                print_now(f"{self.folder} is in use by {who}, which {what}: waiting up to {patience:.0f} s.")
                shown = what
            time.sleep(POLL_SECONDS)

    def _attempt(self, seen: bytes | None, silent_seconds: float) -> tuple[bool, bytes]:
        """Take the lock if it is free, or if its holder is dead.

        Args:
            seen: The record that was there until now.
            silent_seconds: How long it has been the same.

        Returns:
            Whether the operating system says that another program has it, and the record that was in the file.
        """
        file = open_in_place(self.path)
        granted = try_lock(file)
        file.seek(0)
        record = file.read(RECORD_BYTES)
        holder = parse_record(record)
        # A granted lock is no proof: that of another machine, or of a container with its own mount, may not be visible
        # here. So the heartbeat must be silent as well, for less long if it is of this machine.
        is_gone = granted and holder.get("machine") == self._machine
        is_dead = record == seen and silent_seconds > (GONE_SECONDS if is_gone else DEAD_SECONDS)
        is_free = not holder or is_dead
        if granted is not False and is_free:
            self._file = file
            is_written = self._write()
            if granted is None:
                time.sleep(2 * POLL_SECONDS)  # of two that come at once, the one that wrote last has it
            # It is not ours if its holder deleted the file before it was locked here, or another program wrote to it.
            if not is_written or self._holder().get("id") == self._id:
                if granted is None:
                    print_now(f"the disk of {self.folder} has no file locks: {self.path} is only a heartbeat.")
                return False, record
            self._file = None
        file.close()
        return granted is False, record

    def _beat_until_over(self):
        while not self._is_over.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that is full or unreachable must not end a training
                self._beat()

    def _beat(self):
        """Write the record. If another program has taken the folder, end this process at once: it must write nothing.

        Without locks, that happens to a process that was suspended or cut off from its disk for more than a minute.
        """
        is_refused = False
        if self._is_stale or not self.path.exists():  # somebody deleted it, or its server has forgotten it
            file = open_in_place(self.path)
            if self._is_stale:
                self._close_file()  # and with it a lock that its server has forgotten, but perhaps not this machine
            is_refused = try_lock(file) is False
            if is_refused:
                file.close()
            else:
                self._close_file()
                self._file = file
                self._is_stale = False
        holder = self._holder()
        if self._beats and holder.get("id", self._id) != self._id:
            message = f"{self.folder} was taken over by {describe(holder)}: this process, which seemed dead, ends here."
            os.write(2, f"{message}\n".encode())
            os._exit(1)
        if not is_refused:
            self._write()

    def _write(self) -> bool:
        """Replace the record; False if the disk refuses the write."""
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "stopping": self._is_stopping,
            "beat": self._beats,
            "machine": self._machine,
            "id": self._id,
        }
        try:
            self._file.seek(0)
            self._file.write(json.dumps(record).encode().ljust(RECORD_BYTES - 1) + b"\n")
            os.fsync(self._file.fileno())  # an NFS client may keep a write to itself for half a minute
        except OSError as error:
            self._is_stale = error.errno == errno.ESTALE
            if error.errno != errno.EINVAL:  # the disk cannot flush
                return False
        self._beats += 1
        return True

    def _holder(self) -> dict:
        """The record of the file that now has the lock's name; empty if there is none."""
        try:
            return parse_record(read_bounded(self.path, MAX_RECORD_BYTES))
        except (FileNotFoundError, ValueError):  # something else was put there
            return {}

    def _close(self):
        if self._file is not None:
            self._close_file()
            self._file = None

    def _close_file(self):
        with suppress(OSError):  # of a disk that is away; the file is closed all the same
            self._file.close()


def print_now(message: str):
    """Print to stderr and flush: what follows may take minutes."""
    print(message, file=sys.stderr, flush=True)


def open_in_place(path: Path) -> BinaryIO:
    """Open a file to read and write, created but never emptied; programs that this one starts do not inherit it."""
    return open(path, "rb+", buffering=0, opener=_open_regular_file)


def _open_regular_file(name: str, flags: int) -> int:
    """A folder may be a stranger's: a link could lead to a file elsewhere, which would be overwritten."""
    descriptor = os.open(name, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file")
    return descriptor


def try_lock(file: BinaryIO) -> bool | None:
    """Lock a file until it is closed: True; False if another program has it locked; None if the disk has no locks."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def parse_record(record: bytes) -> dict:
    """'{"pid": 7}' -> {"pid": 7}; empty if it is not whole."""
    try:
        holder = parse_json(record)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def describe(holder: dict) -> str:
    """{"pid": 7, "host": "a", "since": "2025-09-30 12:00:00+02:00"} -> 'process 7 on host a since 2025-...'."""
    if not holder:
        return "another program"
    pid, host, since = (shown(holder.get(name)).strip("'") for name in ("pid", "host", "since"))
    return f"process {pid} on host {host} since {since}"


def machine_id() -> str:
    """An id that all processes of a machine share until it reboots, also those in containers; else the host's name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
