"""The documents of a partition: a part of a file, on disk or on the Hub, that is read independently of the others.

It gives the same documents whenever and wherever it is read.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from modeling_gpt2repro.storage.hub_files import OnWait, is_on_hub, retry_hub_read

from .files import TEXT_KINDS, file_kind
from .parquet import NOT_UTF8, read_rows
from .tables import BadRow, is_json_lines, read_arrow, read_csv, read_json
from .text import (
    WHOLE_FILE,
    compile_separator,
    describe_not_utf8,
    line_number,
    read_documents,
    read_lines,
    read_pieces,
    replace_lone_surrogates,
)

# Of a dataset on the Hub that is not stored as parquet, see hub_rows.py: its path is dataset|config|split|commit, its
# start the number of a shard.
HUB_ROWS = "hub-rows://"


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
        if self.path.startswith(HUB_ROWS):
            dataset, config, split, _ = self.path.removeprefix(HUB_ROWS).split("|")
            return f"shard {self.start} of {dataset}{f' ({config})' if config else ''}, split {split},"
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
        if content_kind(self.partition.path, self.partition.text_column) == ".json":
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


def content_kind(path: str, text_column: str) -> str:
    """`file_kind`, but .jsonl for the many .json files that have one object per line."""
    kind = file_kind(path)
    return ".jsonl" if kind == ".json" and is_json_lines(path, text_column) else kind


def read_partition(
    partition: Partition,
    skipped: Counter | None = None,
    document_separator: str | None = None,
    bad_lines: BadLines | None = None,
    on_wait: OnWait = lambda reason: None,
) -> Iterator[Document]:
    """Yield the partition's documents, without those that hold nothing but whitespace.

    Args:
        skipped: Counts the documents that are left out, by reason; also, under LINE_ENDS, texts whose line endings were
            changed.
        document_separator: What separates the documents of a text file: see `compile_separator`, or WHOLE_FILE for one
            document per file. None: the partition is one document, in pieces that may be held out for validation.
        bad_lines: Collects the bad lines. If not given, the first one raises.
        on_wait: See `retry_hub_read`.

    Raises:
        BadLineError: On a line that is not UTF-8 or, in .jsonl, not a JSON object with text in the text column, or a
            row of .parquet, .csv or .json that is bad; the message has file and place.
        ValueError: On a damaged file; the message has the file.
        ConnectionError: If the Hub does not answer, or refuses the file for minutes.
    """
    kind = file_kind(partition.path)
    if kind in TEXT_KINDS:
        documents = _read_text(partition, document_separator, skipped, bad_lines)
    elif is_on_hub(partition.path):
        # A read from the Hub is retried as a whole, so it must be complete before its first document is yielded.
        documents = retry_hub_read(lambda: list(read_table(partition)), is_known=True, on_wait=on_wait)
    else:
        documents = read_table(partition)
    for document in documents:
        if isinstance(document, BadLine):
            if bad_lines is None:
                raise BadLineError(str(document))
            bad_lines.add(document)
        elif document.continues or (document.text and not document.text.isspace()):
            yield document
        elif skipped is not None:
            skipped["whitespace" if document.text else "empty"] += 1


def read_table(partition: Partition) -> Iterator[Document | BadLine]:
    """Yield what is in a partition of any file but one of text, documents without text included."""
    kind = content_kind(partition.path, partition.text_column)
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
