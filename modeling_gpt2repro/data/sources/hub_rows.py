"""Hub datasets that are not stored as parquet (jsonl, csv, text, archives): their rows, as `datasets` streams them.

A partition is one of the shards that `datasets` sees, usually a file.
"""

import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from gzip import BadGzipFile
from itertools import islice
from zipfile import BadZipFile

from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.runtime.command_line import explain_missing_package
from modeling_gpt2repro.storage.hub_files import OnWait, retry_hub_read

from .documents import HUB_ROWS, Document, Partition

DAMAGED = (ValueError, EOFError, BadGzipFile, BadZipFile, zlib.error, lzma.LZMAError)


def list_row_partitions(dataset: str, config: str | None, split: str, commit: str, text_column: str) -> list[Partition]:
    """One partition for each shard.

    Raises:
        ValueError: If the dataset is empty or damaged, or has no such column, or the column does not hold text.
    """
    stream = retry_hub_read(lambda: _stream(dataset, config, split, commit))
    with _explain_damage(data_files(dataset, config, split, commit)[0]):
        first = retry_hub_read(lambda: next(iter(stream), None))
    if first is None:
        raise ValueError("it is empty.")
    if not isinstance(first.get(text_column), str | None) or text_column not in first:
        raise ValueError(
            f"it has no text column {text_column!r}; it has {', '.join(first)}: name one by --text_column."
        )
    # All that a worker on another machine needs to open the same stream.
    path = HUB_ROWS + "|".join([dataset, config or "", split, commit])
    return [Partition(path, shard, shard + 1, text_column) for shard in range(stream.num_shards)]


def is_hub_rows(path: str) -> bool:
    """Whether the path of a partition was made by `list_row_partitions`."""
    return path.startswith(HUB_ROWS)


def read_row_partition(
    partition: Partition, skipped: Counter | None = None, on_wait: OnWait = lambda reason: None
) -> Iterator[Document]:
    """Yield the documents of the partition's shard; their ids are the id column's, or else split, shard and row.

    Args:
        skipped: Counts the documents that are left out, by reason.
        on_wait: See `retry_hub_read`.

    Raises:
        ValueError: On a damaged file; the message has the file.
        ConnectionError: If the Hub does not answer, or refuses the file for minutes.
    """
    dataset, config, split, commit = partition.path.removeprefix(HUB_ROWS).split("|")
    stream = _stream(dataset, config or None, split, commit)
    files = data_files(dataset, config or None, split, commit)
    file = files[partition.start] if len(files) == stream.num_shards else partition.location
    shard = stream.shard(num_shards=stream.num_shards, index=partition.start)
    for number, row in enumerate(_rows(shard, file, on_wait)):
        text = row[partition.text_column] or ""
        name = row.get("id")
        if text and not text.isspace():
            yield Document(f"{split}:{partition.start}:{number}" if name is None else str(name), text)
        elif skipped is not None:
            skipped["whitespace" if text else "empty"] += 1


def data_files(dataset: str, config: str | None, split: str, commit: str) -> list[str]:
    """The addresses of the split's files: of archives and tables, one for each shard.

    Raises:
        ValueError: If there is no such split.
    """
    files = _builder(dataset, config, commit).config.data_files or {}
    if split not in files:
        raise ValueError(f"it has no split {split!r}, but {', '.join(map(str, files)) or 'none'}.")
    return list(files[split])


def _rows(shard: Iterable[dict], file: str, on_wait: OnWait) -> Iterator[dict]:
    """Yield the rows; where reading fails, open the shard anew and skip those that were read before."""
    num_read = 0
    rows = iter(shard)

    def read_row() -> dict | None:
        nonlocal rows
        try:
            return next(rows, None)
        except (OSError, HTTPError):
            rows = islice(shard, num_read, None)  # a generator that has raised is at its end
            raise

    with _explain_damage(file):
        while (row := retry_hub_read(read_row, is_known=True, on_wait=on_wait)) is not None:
            num_read += 1
            yield row


@contextmanager
def _explain_damage(file: str) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())}).") from error


@lru_cache(maxsize=4)
def _stream(dataset: str, config: str | None, split: str, commit: str):
    with _explain_damage(data_files(dataset, config, split, commit)[0]):  # which tells the columns
        return _builder(dataset, config, commit).as_streaming_dataset(split=split)


@lru_cache(maxsize=4)
def _builder(dataset: str, config: str | None, commit: str):
    with explain_missing_package("reading it"):
        import datasets  # takes a second, and other sources do without

    return datasets.load_dataset_builder(dataset, config, revision=commit)
