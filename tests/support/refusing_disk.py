"""A disk that refuses: Python's operations on the files of one folder raise an OSError for a while.

What libraries write without Python (safetensors, tokenizers) still works, except that Python can open, stat, flush or
rename nothing; tests with a real full disk are in `tests/scripts/test_full_disk.py`.
"""

import builtins
import errno
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path

ERRORS = {name: getattr(errno, name) for name in ("EROFS", "EIO", "ESTALE", "EACCES", "ENOSPC")}
# Operation -> the functions of `os` that do it. Also refused: open, fsync, and write, flush, truncate of an open file.
PATH_FUNCTIONS = {
    "stat": ("stat", "lstat"),
    "rename": ("rename", "replace"),
    "truncate": ("truncate",),
    "mkdir": ("mkdir",),
    "unlink": ("unlink", "remove", "rmdir"),
    "list": ("scandir", "listdir"),
    "chmod": ("chmod",),
}
OPERATIONS = ("open", "read", "write", "flush", "fsync", *PATH_FUNCTIONS)
READING = ("stat", "list", "read")  # what a read-only disk allows


class RefusingDisk:
    """Everything passes until `refuse` is called.

    Args:
        monkeypatch: Takes the patches away at the end of the test.
        folder: Only what is in it is refused.
    """

    def __init__(self, monkeypatch, folder: Path):
        self._folder = os.path.join(os.path.realpath(folder), "")
        self._before: Callable[[str], None] = lambda operation: None
        for operation, names in PATH_FUNCTIONS.items():
            for name in names:
                monkeypatch.setattr(os, name, self._guarded(operation, getattr(os, name)))
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda descriptor: (self._before("fsync"), fsync(descriptor))[1])
        os_open = os.open

        def open_descriptor(path, flags, *others, **options):
            if self._holds(path, options):
                is_writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                self._before("open" if is_writing else "read")
            return os_open(path, flags, *others, **options)

        monkeypatch.setattr(os, "open", open_descriptor)
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self._guarded_open(module.open))

    def refuse(self, number: int, *operations: str):
        """Refuse these operations, or all, with this errno; a refused write writes half before."""
        refused = operations or OPERATIONS

        def before(operation):
            if operation in refused:
                raise OSError(number, os.strerror(number))

        self._before = before

    def refuse_nth(self, number: int, n: int, and_later: bool) -> Callable[[], int]:
        """Refuse the n-th operation from now on, from 0; returns a function that counts those until now."""
        count = 0

        def before(operation):
            nonlocal count
            count += 1
            if count - 1 == n or (and_later and count - 1 > n):
                raise OSError(number, os.strerror(number))

        self._before = before
        return lambda: count

    def recover(self):
        """Refuse nothing any more."""
        self._before = lambda operation: None

    def _holds(self, path, options: dict) -> bool:
        if options.get("dir_fd") is not None:  # a name in an open folder, as `rmtree` gives it
            return True
        if isinstance(path, int):
            return False
        return os.path.join(os.path.abspath(os.fsdecode(path)), "").startswith(self._folder)

    def _guarded(self, operation: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def guarded(path=".", *others, **options):
            if self._holds(path, options):
                self._before(operation)
            return function(path, *others, **options)

        return guarded

    def _guarded_open(self, original: Callable) -> Callable:
        def guarded(path, mode="r", *others, **options):
            if isinstance(path, int) or not self._holds(path, {}):
                return original(path, mode, *others, **options)
            is_writing = any(letter in mode for letter in "wax+")
            self._before("open" if is_writing else "read")
            file = original(path, mode, *others, **options)
            return GuardedFile(file, self) if is_writing else file

        return guarded


class GuardedFile:
    """A file open for writing on a disk that may refuse."""

    def __init__(self, file, disk: RefusingDisk):
        self._file = file
        self._disk = disk

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __iter__(self):
        return iter(self._file)

    def write(self, content):
        try:
            self._disk._before("write")
        except OSError:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            raise
        return self._file.write(content)

    def flush(self):
        self._disk._before("flush")
        self._file.flush()

    def truncate(self, *size):
        self._disk._before("truncate")
        return self._file.truncate(*size)

    def close(self):
        """Flush and close, which closes the descriptor in any case."""
        try:
            if not self._file.closed:
                self._disk._before("flush")
        finally:
            self._file.close()
