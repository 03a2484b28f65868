"""Write the token shards of one split."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modeling_gpt2repro.storage.atomic import abort, commit, open_temporary

from .nanogpt_format import shard_length, shard_name


@dataclass(eq=False)
class ShardWriter:
    """Append ids to the .npy shards of one split; each is streamed to a temporary file and renamed when complete.

    With shard_tokens 4, append([0, 1, 2]) and append([3, 4, 5]) give shards [0, 1, 2, 3] and [4, 5].
    """

    folder: Path
    split: str
    shard_tokens: int | None  # tokens after which a shard ends; None: one shard
    end_of_text_id: int
    max_tokens: int | None = None  # tokens after which the split ends
    layout: str = "plain"

    def __post_init__(self):
        self.shard_tokens = shard_length(self.layout, self.split, self.shard_tokens)
        self.tokens = 0
        self.text_bytes = 0
        self.entries: list[dict] = []
        self._file: BinaryIO | None = None

    @property
    def is_full(self) -> bool:
        """Whether max_tokens is reached."""
        return self.tokens == self.max_tokens

    def append(self, ids: np.ndarray, text_bytes: int, partition: int):
        """Add ids (n,) uint16; a shard ends wherever it is full, also in the middle of a document.

        Args:
            text_bytes: UTF-8 bytes of the text that the ids encode; counted in proportion if max_tokens cuts them.
            partition: Index of the partition that they come from.
        """
        given = len(ids)
        if self.max_tokens is not None:
            ids = ids[: self.max_tokens - self.tokens]
        self.text_bytes += text_bytes * len(ids) // max(1, given)
        while len(ids):
            if self._file is None:
                self._begin(partition)
            entry = self.entries[-1]
            taken = ids if self.shard_tokens is None else ids[: self.shard_tokens - entry["tokens"]]
            data = np.ascontiguousarray(taken, dtype="<u2").data
            self._file.write(data)
            self._hash.update(data)
            entry["tokens"] += len(taken)
            entry["documents"] += int(np.count_nonzero(taken == self.end_of_text_id))
            entry["units"][1] = partition
            self.tokens += len(taken)
            ids = ids[len(taken) :]
            if entry["tokens"] == self.shard_tokens:
                self._end()

    def finish(self) -> dict:
        """Complete the last shard and return the split's part of the manifest."""
        if self._file is not None:
            self._end()
        documents = sum(entry["documents"] for entry in self.entries)
        totals = {"tokens": self.tokens, "documents": documents, "text_bytes": self.text_bytes}
        return {**totals, "shards": self.entries}

    def abandon(self):
        """Delete the incomplete shard, if there is one."""
        if self._file is not None:
            abort(self._file)

    def _begin(self, partition: int):
        name = shard_name(self.layout, self.split, len(self.entries))
        self._file = open_temporary(self.folder / name)
        self._hash = hashlib.sha256()
        self.entries.append({"file": name, "tokens": 0, "documents": 0, "units": [partition, partition]})
        _write_header(self._file, tokens=0)

    def _end(self):
        entry = self.entries[-1]
        entry["sha256"] = self._hash.hexdigest()
        self._file.seek(0)
        # Of the same length as the first header: numpy pads it, so that the count can grow in place.
        _write_header(self._file, entry["tokens"])
        commit(self._file, self.folder / entry["file"])
        self._file = None


def _write_header(file: BinaryIO, tokens: int):
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
