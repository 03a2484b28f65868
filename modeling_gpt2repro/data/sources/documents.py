"""Files of text, on disk or on the Hub, as partitions that are read independently of each other, and their documents.

A partition is a row group of a .parquet file, or 16 MiB of a .txt or .jsonl file. It gives the same documents whenever
and wherever it is read.
"""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from modeling_gpt2repro.storage.hub_files import is_on_hub, retry_hub_read

from .parquet import read_row_group, row_group_bytes
from .text import read_lines, read_pieces

PARTITION_BYTES = 16 * 2**20  # of a .txt or .jsonl file: some 4 M tokens
FILE_KINDS = (".txt", ".jsonl", ".parquet")
LISTING_THREADS = 4  # the footers of parquet files on the Hub are waited for, not computed


@dataclass(frozen=True)
class Document:
    """One document, or a piece of one."""

    # The same on every machine, in every folder and for any number of workers: its hash decides whether the document is
    # held out for validation.
    id: str
    text: str  # never empty, and not whitespace alone, unless it continues the piece before
    continues: bool = False  # whether the text continues the piece before, with no end-of-text in between


@dataclass(frozen=True)
class Partition:
    """What one worker reads at a time; the fields are keys of plan.json."""

    path: str  # a file on disk, or an `hf://` address
    start: int  # the first byte of a .txt or .jsonl file, the row group of a .parquet file
    stop: int  # one after the last
    text_column: str = "text"
    text_bytes: int = 0  # bytes of its text, roughly; 0 where they are not known

    @property
    def name(self) -> str:
        """File name and start, the same on every machine."""
        return f"{Path(self.path).name}:{self.start}"

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        if self.stop == self.start + 1:
            return f"row group {self.start} of {self.path}"
        return f"bytes {self.start} to {self.stop} of {self.path}"


def list_partitions(
    paths: list[str], text_column: str = "text", partition_bytes: int = PARTITION_BYTES
) -> list[Partition]:
    """Cut files (local paths or `hf://` addresses of parquet files) into partitions, in their order.

    Raises:
        ValueError: With every problem, one a line: a file that is missing, of an unknown kind, empty, or without the
            text column (of a .jsonl file, in its first line).
    """

    def partitions_or_problem(path: str) -> list[Partition] | str:
        try:
            return _partitions_of(path, text_column, partition_bytes)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        results = list(pool.map(partitions_or_problem, paths))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        raise ValueError("\n".join(problems))
    return [partition for partitions in results for partition in partitions]


def _partitions_of(path: str, text_column: str, partition_bytes: int) -> list[Partition]:
    if Path(path).suffix not in FILE_KINDS:
        raise ValueError(f"{path} is not of a kind that can be read: {', '.join(FILE_KINDS)}.")
    if not is_on_hub(path):
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}.")
        if Path(path).stat().st_size == 0:
            raise ValueError(f"{path} is empty.")
    if path.endswith(".parquet"):
        sizes = row_group_bytes(path, text_column)
        return [Partition(path, group, group + 1, text_column, size) for group, size in enumerate(sizes)]
    size = Path(path).stat().st_size
    cuts = [*range(0, size, partition_bytes), size]
    partitions = [Partition(path, start, stop, text_column, stop - start) for start, stop in pairwise(cuts)]
    if path.endswith(".jsonl"):
        next(_read_json_lines(partitions[0]), None)  # raises on a missing text column now, not after hours of work
    return partitions


def read_partition(partition: Partition, skipped: Counter | None = None) -> Iterator[Document]:
    """Yield the partition's documents, without those that hold nothing but whitespace.

    Args:
        skipped: Counts the documents that are left out, by reason.

    Raises:
        ValueError: On text that is not UTF-8, a line that is not a JSON object with the text column, or a damaged
            parquet file; the message has file and position.
        ConnectionError: If the Hub does not answer.
    """
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".txt": _read_text}
    read = readers[Path(partition.path).suffix]
    # A read from the Hub is retried as a whole, so it must be complete before its first document is yielded.
    documents = retry_hub_read(lambda: list(read(partition))) if is_on_hub(partition.path) else read(partition)
    for document in documents:
        if document.continues or (document.text and not document.text.isspace()):
            yield document
        elif skipped is not None:
            skipped["whitespace" if document.text else "empty"] += 1


def _read_parquet(partition: Partition) -> Iterator[Document]:
    for row, (name, text) in enumerate(read_row_group(partition.path, partition.start, partition.text_column)):
        yield Document(f"{partition.name}:{row}" if name is None else str(name), text or "")


def _read_json_lines(partition: Partition) -> Iterator[Document]:
    for position, line in read_lines(partition.path, partition.start, partition.stop):
        if not line.isspace():
            yield _json_document(line, partition, position)


def _json_document(line: str, partition: Partition, position: int) -> Document:
    try:
        row = json.loads(line)
        text = row[partition.text_column]
        name = row.get("id")
    except KeyError as error:
        raise ValueError(
            f"{partition.path}: the line at byte {position} has no {partition.text_column!r} field; it has "
            f"{', '.join(row) or 'none'}: name one by --text_column."
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{partition.path}: the line at byte {position} must be a JSON object.") from error
    if not isinstance(text, str | None):
        raise ValueError(f"{partition.path}: {partition.text_column!r} in the line at byte {position} is not text.")
    if text and "\\u" in line:
        # JSON can spell half of a surrogate pair, which UTF-8 cannot encode: U+FFFD replaces it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Document(f"{Path(partition.path).name}:{position}" if name is None else str(name), text or "")


def _read_text(partition: Partition) -> Iterator[Document]:
    """The partition is one document in pieces."""
    for number, text in enumerate(read_pieces(partition.path, partition.start, partition.stop)):
        yield Document(f"{partition.name}:{number}", text, continues=number > 0)
