"""The ids of a shard, read from the file with each slice."""

import threading
from io import FileIO
from pathlib import Path

import numpy as np

try:
    import resource
except ImportError:  # Windows, which allows for thousands
    resource = None


class ShardFile:
    """Ids (n,) uint16 of a shard: `shard[100:200]` reads these from the disk, `len(shard)` is n.

    A memory map would do the same in one line. But where its file is cut short, or its disk is gone, touching the map
    ends the process by a signal, SIGBUS, while a read raises an error: the run can still write its checkpoint. A read
    takes 3 microseconds more for 1,025 ids.

    Args:
        path: A .npy file.
        offset: Bytes before the first id.
    """

    def __init__(self, path: Path, offset: int, num_ids: int):
        self.path = path
        self.offset = offset
        self.num_ids = num_ids
        self._file = FileIO(path)  # open as long as the run: a file that is renamed or deleted meanwhile stays readable
        self._lock = threading.Lock()  # one thread's seek must not come before another's read

    def __len__(self) -> int:
        return self.num_ids

    def __getitem__(self, ids: slice) -> np.ndarray:
        """A slice without a step, as an array of its own.

        Raises:
            OSError: If the file cannot be read, or has become shorter; the message has its path.
        """
        start, stop, _ = ids.indices(self.num_ids)
        part = np.empty(max(0, stop - start), dtype=np.uint16)
        try:
            with self._lock:
                self._file.seek(self.offset + start * part.itemsize)
                is_whole = self._file.readinto(part) == part.nbytes
        except OSError as error:
            raise OSError(f"{self.path} cannot be read ({error.strerror}).") from error
        if not is_whole:
            raise OSError(f"{self.path} cannot be read: it has become shorter since the run opened it.")
        return part


def allow_open_files(more: int):
    """Raise the limit of open files by so many, as far as this machine's permits: each `ShardFile` keeps one open.

    Linux begins with 1,024, macOS with 256; 350 B tokens are 3,500 shards.
    """
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
