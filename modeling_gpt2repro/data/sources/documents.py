"""Files of text, on disk or on the Hub, as partitions that are read independently of each other, and their documents.

A partition is a row group of a .parquet file (some rows of a large one), 16 MiB of a text or .jsonl file, or a whole
file that can only be read from its beginning. It gives the same documents whenever and wherever it is read.
"""

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from modeling_gpt2repro.storage.hub_files import is_on_hub, retry_hub_read

from .files import TABLE_KINDS, TEXT_KINDS, file_kind, is_compressed, open_bytes, raise_problems, shorten
from .parquet import NOT_UTF8, read_rows, row_ranges
from .tables import BadRow, is_json_lines, read_arrow, read_csv, read_json
from .text import (
    BLOCK_BYTES,
    WHOLE_FILE,
    compile_separator,
    describe_not_utf8,
    find_document_cut,
    has_separator,
    line_number,
    read_documents,
    read_lines,
    read_pieces,
    replace_lone_surrogates,
)

COMPRESSION_RATIO = 3  # English text by gzip or zstd, roughly
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
    start: int  # the first byte, or the row group of a .parquet file
    stop: int  # one after the last
    text_column: str = "text"
    text_bytes: int = 0  # bytes of its text, roughly; 0 where they are not known
    file: str = ""  # what ids call the file; empty where that is its name
    # Of a row group that several partitions share: the first row, and one after the last; None for all of it.
    first_row: int = 0
    stop_row: int | None = None

    @property
    def file_name(self) -> str:
        """A name that no other file of the source has, the same on every machine."""
        return self.file or os.path.basename(self.path)

    @property
    def name(self) -> str:
        """File name and start, the same on every machine."""
        rows = "" if self.stop_row is None else f":{self.first_row}"
        return f"{self.file_name}:{self.start}{rows}"

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
    """A line or row that is not a document."""

    partition: Partition
    # Its first byte (in text, its first bad one; of a row of .csv, that of its last line), or its number (in the row
    # group of a .parquet file, or in a .json list).
    position: int
    problem: str  # what is wrong with this one: the end of a sentence
    reason: str = ""  # the kind of problem, a few words that bad lines are counted by

    @property
    def place(self) -> str:
        """Where it is in the file. Slow: it counts the lines before."""
        if file_kind(self.partition.path) == ".parquet":
            return f"row {self.position} of row group {self.partition.start} (both counted from 0)"
        if _content_kind(self.partition.path, self.partition.text_column) == ".json":
            return f"row {self.position} (counted from 0)"
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
    partition_bytes: int = BLOCK_BYTES,
    document_separator: str | None = None,
    skip_bad_lines: bool = False,
) -> list[Partition]:
    """Cut files (local paths or `hf://` addresses of parquet files) into partitions, in their order.

    Args:
        text_column: Column or field that holds the text, in all but text files.
        partition_bytes: Size of a partition of a text or .jsonl file.
        document_separator: See `read_partition`.
        skip_bad_lines: Accept a .jsonl file whose first line is bad, if it has a good one.

    Raises:
        ValueError: With all problems, one per line, or in one sentence if they are many: a file that is missing, of an
            unknown kind, empty, or without the text column (in a .jsonl file, in its first line); a document separator
            that occurs in no file.
    """

    def partitions_or_problem(path: str) -> list[Partition] | str:
        try:
            return _partitions_of(path, text_column, partition_bytes, document_separator, skip_bad_lines)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        results = list(pool.map(partitions_or_problem, paths))
    raise_problems([result for result in results if isinstance(result, str)])
    if document_separator is not None:
        _check_separator(paths, document_separator)
    return [partition for partitions in results for partition in partitions]


def _partitions_of(
    path: str, text_column: str, partition_bytes: int, document_separator: str | None, skip_bad_lines: bool
) -> list[Partition]:
    file_kind(path)  # raises if it is unknown
    if not is_on_hub(path):
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}.")
        if Path(path).stat().st_size == 0:
            raise ValueError(f"{path} is empty.")
    kind = _content_kind(path, text_column)
    if kind == ".parquet":
        ranges = row_ranges(path, text_column)
        whole = [Partition(path, rows.row_group, rows.row_group + 1, text_column, rows.text_bytes) for rows in ranges]
        return [
            replace(partition, first_row=rows.first, stop_row=rows.stop)
            for partition, rows in zip(whole, ranges, strict=True)
        ]
    if kind in (*TEXT_KINDS, ".jsonl", ".csv", ".tsv"):
        _check_encoding(path)
    size = Path(path).stat().st_size
    whole = Partition(path, 0, size, text_column, size * (COMPRESSION_RATIO if is_compressed(path) else 1))
    if kind not in TEXT_KINDS:
        _check_first_row(whole, skip_bad_lines)
    if is_compressed(path) or kind in TABLE_KINDS or (kind in TEXT_KINDS and document_separator == WHOLE_FILE):
        return [whole]
    cuts = list(range(0, size, partition_bytes))
    if kind in TEXT_KINDS and document_separator is not None:
        cuts = _document_cuts(path, size, partition_bytes, compile_separator(document_separator))
    return [Partition(path, start, stop, text_column, stop - start) for start, stop in pairwise([*cuts, size])]


def _document_cuts(path: str, size: int, partition_bytes: int, separator: re.Pattern[bytes]) -> list[int]:
    """The first byte of each partition, chosen so that no document crosses from one to the next."""
    cuts = [0]
    while cuts[-1] + partition_bytes < size:
        cut = find_document_cut(path, cuts[-1] + partition_bytes, separator)
        if cut is None:
            break
        cuts.append(cut)
    return cuts


def _check_encoding(path: str):
    """Raise on UTF-16, as Windows' programs write it: most of it is UTF-8, too, with a NUL after each letter."""
    with open_bytes(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path} is UTF-16, and only UTF-8 can be read: convert it.")


def _check_separator(paths: list[str], document_separator: str):
    """Raise a ValueError if the separator would not separate anything."""
    texts = [path for path in paths if file_kind(path) in TEXT_KINDS]
    if not texts:
        raise ValueError(f"document_separator ({document_separator}) is for text files only: leave it out.")
    if document_separator == WHOLE_FILE:
        return
    separator = compile_separator(document_separator)
    if not any(has_separator(path, separator) for path in texts):
        raise ValueError(
            f"document_separator ({document_separator}) is nowhere in {shorten(texts)} (the first "
            f"{BLOCK_BYTES // 2**20} MiB of each): give one that is, or {WHOLE_FILE} for one document per file."
        )


def _content_kind(path: str, text_column: str) -> str:
    """`file_kind`, but .jsonl for the many .json files that have one object per line."""
    kind = file_kind(path)
    return ".jsonl" if kind == ".json" and is_json_lines(path, text_column) else kind


def _check_first_row(partition: Partition, skip_bad_lines: bool):
    """Raise on a missing text column now, not after hours of work."""
    rows = _read_table(partition)
    first = next(rows, None)
    if isinstance(first, BadLine) and not (skip_bad_lines and any(isinstance(row, Document) for row in rows)):
        raise BadLineError(str(first))


def read_partition(
    partition: Partition,
    skipped: Counter | None = None,
    document_separator: str | None = None,
    bad_lines: BadLines | None = None,
) -> Iterator[Document]:
    """Yield the partition's documents, without those that hold nothing but whitespace.

    Args:
        skipped: Counts the documents that are left out, by reason; also, under LINE_ENDS, texts whose line endings were
            changed.
        document_separator: What separates the documents of a text file: see `compile_separator`, or WHOLE_FILE for one
            document per file. None: the partition is one document, in pieces that may be held out for validation.
        bad_lines: Collects the bad lines. If not given, the first one raises.

    Raises:
        BadLineError: On a line that is not UTF-8 or, in .jsonl, not a JSON object with text in the text column, or a
            row of .parquet, .csv or .json that is bad; the message has file and place.
        ValueError: On a damaged file; the message has the file.
        ConnectionError: If the Hub does not answer.
    """
    kind = file_kind(partition.path)
    if kind in TEXT_KINDS:
        documents = _read_text(partition, document_separator, skipped, bad_lines)
    elif is_on_hub(partition.path):
        # A read from the Hub is retried as a whole, so it must be complete before its first document is yielded.
        documents = retry_hub_read(lambda: list(_read_table(partition)))
    else:
        documents = _read_table(partition)
    for document in documents:
        if isinstance(document, BadLine):
            if bad_lines is None:
                raise BadLineError(str(document))
            bad_lines.add(document)
        elif document.continues or (document.text and not document.text.isspace()):
            yield document
        elif skipped is not None:
            skipped["whitespace" if document.text else "empty"] += 1


def _read_table(partition: Partition) -> Iterator[Document | BadLine]:
    kind = _content_kind(partition.path, partition.text_column)
    if kind == ".parquet":
        yield from _read_parquet(partition)
    elif kind == ".jsonl":
        yield from _read_json_lines(partition)
    else:
        read = {".json": read_json, ".csv": read_csv, ".tsv": read_csv, ".arrow": read_arrow}[kind]
        for number, row in enumerate(read(partition.path, partition.text_column)):
            if isinstance(row, BadRow):
                yield BadLine(partition, *row)
            else:
                name, text = row
                yield Document(f"{partition.file_name}:{number}" if name is None else str(name), text or "")


def _read_parquet(partition: Partition) -> Iterator[Document | BadLine]:
    row_range = (partition.first_row, partition.stop_row)
    rows = read_rows(partition.path, partition.start, partition.text_column, *row_range)
    # A document is named by its place in the row group, so that it does not depend on the cuts.
    row_group = f"{partition.file_name}:{partition.start}"
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
        return bad(describe_not_utf8(position + error.start, error.object[error.start]), "not UTF-8")
    except RecursionError:
        return bad("is nested too deeply.", "nested too deeply")
    except KeyError:
        return bad(f"has no {column!r} field; it has {', '.join(row) or 'none'}: name one by --text_column.", "no text")
    except (ValueError, TypeError, AttributeError):
        return bad("must be a JSON object.", "not a JSON object")
    if not isinstance(text, str | None):
        return bad(f"has {column!r} that is not text.", "no text")
    if text and "\\u" in line:
        text = replace_lone_surrogates(text)
    return Document(f"{partition.file_name}:{position}" if name is None else name, text or "")


def _read_text(
    partition: Partition, document_separator: str | None, counts: Counter | None, bad_lines: BadLines | None
) -> Iterator[Document]:
    def on_bad_line(position: int, byte: int):
        line = BadLine(partition, position, describe_not_utf8(position, byte), "not UTF-8")
        if bad_lines is None:
            raise BadLineError(str(line))
        bad_lines.add(line)

    path, start, stop = partition.path, partition.start, partition.stop
    if document_separator in (None, WHOLE_FILE):
        is_whole = document_separator == WHOLE_FILE
        for block, number, text in read_pieces(path, start, stop, counts, on_bad_line):
            # The pieces of a document that is held out as a whole have one id.
            name = partition.name if is_whole else f"{partition.file_name}:{block}:{number}"
            yield Document(name, text, continues=number > 0 or (is_whole and block > 0))
    else:
        separator = compile_separator(document_separator)
        for position, text in read_documents(path, start, stop, separator, counts, on_bad_line):
            yield Document(f"{partition.file_name}:{position}", text)
