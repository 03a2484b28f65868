"""Append lines to a file so that it holds whole lines only, each once, also on a disk that fails for a while."""

import os
from contextlib import suppress
from pathlib import Path


class LineAppender:
    """Appends lines to a file; those that the disk refuses wait in memory, in order, for the next `flush`."""

    def __init__(self, path: Path):
        self.path = path
        self._pending: list[bytes] = []
        self._whole_bytes: int | None = None  # after a write that failed: how much of the file is whole lines

    def append(self, line: str):
        """Take a line, which must not contain a line break; `flush` writes it."""
        self._pending.append(line.encode() + b"\n")

    def flush(self):
        """Write all lines that wait.

        Raises:
            OSError: If the disk refuses; then none of them is in the file, as far as the disk allows that.
        """
        if not self._pending:
            return
        try:
            self._write(b"".join(self._pending))
        except OSError:
            # A reader should not see half a line meanwhile. If the disk refuses this as well, the next write does it.
            with suppress(OSError):
                if self._whole_bytes is not None and self.path.stat().st_size > self._whole_bytes:
                    os.truncate(self.path, self._whole_bytes)
            raise
        self._pending = []
        self._whole_bytes = None

    def _write(self, lines: bytes):
        with open(self.path, "ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if self._whole_bytes is not None and size > self._whole_bytes:
                size = file.truncate(self._whole_bytes)
            self._whole_bytes = size
            if size > 0:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # ends a line that a crash cut off
            file.write(lines)
