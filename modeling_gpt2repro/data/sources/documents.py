"""Files of text, on disk or on the Hub, as partitions that are read independently of each other, and their documents.

A partition is a row group of a .parquet file (of a large one, some of its rows), or 16 MiB of a .txt or .jsonl file. It
gives the same documents whenever and wherever it is read.
"""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from modeling_gpt2repro.storage.hub_files import is_on_hub, retry_hub_read

from .parquet import NOT_UTF8, read_rows, row_ranges
from .text import line_number, read_lines, read_pieces

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
    # Of a row group that is shared by several partitions: the first row, and one after the last; None for all of it.
    first_row: int = 0
    stop_row: int | None = None

    @property
    def name(self) -> str:
        """File name and start, the same on every machine."""
        rows = "" if self.stop_row is None else f":{self.first_row}"
        return f"{Path(self.path).name}:{self.start}{rows}"

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        if self.stop_row is not None:
            return f"rows {self.first_row} to {self.stop_row} of row group {self.start} of {self.path}"
        if self.stop == self.start + 1:
            return f"row group {self.start} of {self.path}"
        return f"bytes {self.start} to {self.stop} of {self.path}"


@dataclass(frozen=True)
class BadLine:
    """A line or row that is no document."""

    partition: Partition
    position: int  # its first byte in a .jsonl file, its number in the row group of a .parquet file
    problem: str  # what is wrong with this one: the end of a sentence
    reason: str = ""  # a few words that many bad lines have in common

    @property
    def place(self) -> str:
        """Where it is in the file; the lines before it are counted for that."""
        if self.partition.path.endswith(".parquet"):
            return f"row {self.position} of row group {self.partition.start} (both counted from 0)"
        return f"line {line_number(self.partition.path, self.position):,} (byte {self.position})"

    def __str__(self) -> str:
        return f"{self.partition.path}: {self.place} {self.problem}"


class BadLineError(ValueError):
    """There is a bad line, and it is not to be skipped."""


class BadLines:
    """The bad lines of a partition that were skipped."""

    def __init__(self):
        self.counts = Counter()  # by reason
        self.first: BadLine | None = None

    def add(self, line: BadLine):
        """Count one more."""
        self.counts[line.reason] += 1
        self.first = self.first or line


def list_partitions(
    paths: list[str],
    text_column: str = "text",
    partition_bytes: int = PARTITION_BYTES,
    skip_bad_lines: bool = False,
) -> list[Partition]:
    """Cut files (local paths or `hf://` addresses of parquet files) into partitions, in their order.

    Args:
        skip_bad_lines: Accept a .jsonl file whose first line is bad, if there is a good one in the first partition.

    Raises:
        ValueError: With every problem, one a line: a file that is missing, of an unknown kind, empty, or without the
            text column (of a .jsonl file, in its first line).
    """

    def partitions_or_problem(path: str) -> list[Partition] | str:
        try:
            return _partitions_of(path, text_column, partition_bytes, skip_bad_lines)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        results = list(pool.map(partitions_or_problem, paths))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        raise ValueError("\n".join(problems))
    return [partition for partitions in results for partition in partitions]


def _partitions_of(path: str, text_column: str, partition_bytes: int, skip_bad_lines: bool) -> list[Partition]:
    if Path(path).suffix not in FILE_KINDS:
        raise ValueError(f"{path} is not of a kind that can be read: {', '.join(FILE_KINDS)}.")
    if not is_on_hub(path):
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}.")
        if Path(path).stat().st_size == 0:
            raise ValueError(f"{path} is empty.")
    if path.endswith(".parquet"):
        return [
            Partition(path, rows.row_group, rows.row_group + 1, text_column, rows.text_bytes, rows.first, rows.stop)
            for rows in row_ranges(path, text_column)
        ]
    size = Path(path).stat().st_size
    cuts = [*range(0, size, partition_bytes), size]
    partitions = [Partition(path, start, stop, text_column, stop - start) for start, stop in pairwise(cuts)]
    if path.endswith(".jsonl"):
        _check_first_line(partitions[0], skip_bad_lines)
    return partitions


def _check_first_line(partition: Partition, skip_bad_lines: bool):
    """Raise on a missing text column now, not after hours of work."""
    lines = _read_json_lines(partition)
    first = next(lines, None)
    if isinstance(first, BadLine) and not (skip_bad_lines and any(isinstance(line, Document) for line in lines)):
        raise BadLineError(str(first))


def read_partition(
    partition: Partition, skipped: Counter | None = None, bad_lines: BadLines | None = None
) -> Iterator[Document]:
    """Yield the partition's documents, without those that hold nothing but whitespace.

    Args:
        skipped: Counts the documents that are left out, by reason.
        bad_lines: Takes the bad lines. If not given, the first one raises.

    Raises:
        BadLineError: On a line that is not a JSON object with text in the text column, or a row that is not UTF-8; the
            message has file and place.
        ValueError: On text that is not UTF-8, or a damaged parquet file; the message has the file.
        ConnectionError: If the Hub does not answer.
    """
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".txt": _read_text}
    read = readers[Path(partition.path).suffix]
    # A read from the Hub is retried as a whole, so it must be complete before its first document is yielded.
    documents = retry_hub_read(lambda: list(read(partition))) if is_on_hub(partition.path) else read(partition)
    for document in documents:
        if isinstance(document, BadLine):
            if bad_lines is None:
                raise BadLineError(str(document))
            bad_lines.add(document)
        elif document.continues or (document.text and not document.text.isspace()):
            yield document
        elif skipped is not None:
            skipped["whitespace" if document.text else "empty"] += 1


def _read_parquet(partition: Partition) -> Iterator[Document | BadLine]:
    row_range = (partition.first_row, partition.stop_row)
    rows = read_rows(partition.path, partition.start, partition.text_column, *row_range)
    # A document is named by its place in the row group, so that it does not depend on the cuts.
    row_group = f"{Path(partition.path).name}:{partition.start}"
    for row, name, text in rows:
        if name is NOT_UTF8 or text is NOT_UTF8:
            problem = f"has {partition.text_column if text is NOT_UTF8 else 'id'!r} that is not UTF-8."
            yield BadLine(partition, row, problem, "not UTF-8")
        else:
            yield Document(f"{row_group}:{row}" if name is None else str(name), text or "")


def _read_json_lines(partition: Partition) -> Iterator[Document | BadLine]:
    for position, line in read_lines(partition.path, partition.start, partition.stop):
        document = _json_document(line, partition, position)
        if document is not None:
            yield document


def _json_document(line: bytes | None, partition: Partition, position: int) -> Document | BadLine | None:
    """The document in a line that begins at byte `position`; None if the line is blank."""

    bad = partial(BadLine, partition, position)
    column = partition.text_column
    if line is None:
        return bad("is too long for one document.", "too long")
    try:
        line = line.decode()
        if line.isspace():
            return None
        row = json.loads(line)
        text = row[column]
        name = row.get("id")
        name = name if name is None else str(name)
    except UnicodeDecodeError as error:
        bad_byte = error.object[error.start]
        return bad(f"is not UTF-8 (byte {position + error.start} is 0x{bad_byte:02x}): convert it.", "not UTF-8")
    except RecursionError:
        return bad("is nested too deeply.", "nested too deeply")
    except KeyError:
        return bad(f"has no {column!r} field; it has {', '.join(row) or 'none'}: name one by --text_column.", "no text")
    except (ValueError, TypeError, AttributeError):
        return bad("must be a JSON object.", "not a JSON object")
    if not isinstance(text, str | None):
        return bad(f"has {column!r} that is not text.", "no text")
    if text and "\\u" in line:
        # JSON can spell half of a surrogate pair, which UTF-8 cannot encode: U+FFFD replaces it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Document(f"{Path(partition.path).name}:{position}" if name is None else name, text or "")


def _read_text(partition: Partition) -> Iterator[Document]:
    """The partition is one document in pieces."""
    for number, text in enumerate(read_pieces(partition.path, partition.start, partition.stop)):
        yield Document(f"{partition.name}:{number}", text, continues=number > 0)
