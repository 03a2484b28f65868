"""Tables that are read as a whole: .json (a list of objects, or an object of columns), .csv, .tsv and .arrow.

Read by libraries that change no text: `datasets` takes the words NA and null in a .csv for missing text, turns strings
in a .json into dates, and takes an object of columns for one document.
"""

import codecs
import csv
import json
import sys
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

import pyarrow as pa

from .files import file_kind, open_bytes
from .parquet import ROWS_PER_BATCH, check_names, check_text_column
from .text import MAX_LINE_BYTES, describe_not_utf8, read_lines, replace_lone_surrogates

Row = tuple[object, str | None]  # the id, None if there is none, and the text


class BadRow(NamedTuple):
    """A row that is no document."""

    position: int  # a byte of a .csv file; elsewhere the row's number
    problem: str  # the end of a sentence
    reason: str  # a few words


def read_csv(path: str, text_column: str) -> Iterator[Row | BadRow]:
    """Yield the rows of a .csv or .tsv file, as they are read.

    Bad ones are not UTF-8, have another number of fields than the first row, or do not follow the rules of .csv.

    Raises:
        ValueError: If it has no such column, its first row is bad, or a line is longer than MAX_LINE_BYTES.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    position = 0  # of the line that was read last
    not_utf8 = None  # what is, of the row that is being read

    def decoded_lines() -> Iterator[str]:
        nonlocal position, not_utf8
        for position, line in read_lines(path, 0, sys.maxsize):
            if line is None:
                raise ValueError(f"{path} has a line of more than {MAX_LINE_BYTES} bytes.")
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                place = position + error.start
                not_utf8 = not_utf8 or BadRow(place, describe_not_utf8(place, line[error.start]), "not UTF-8")
                yield line.decode(errors="replace")

    rows = csv.reader(decoded_lines(), delimiter="\t" if file_kind(path) == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num} does not follow the rules of .csv ({error}).") from error
    if not_utf8 is not None:
        raise ValueError(f"{path}: the first row {not_utf8.problem}")
    if text_column not in header:
        raise ValueError(missing_column(path, text_column, header))
    check_names(path, header, text_column)
    text = header.index(text_column)
    name = header.index("id") if "id" in header else None
    while True:
        not_utf8 = None
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # the reader begins again with the next line
            yield BadRow(position, f"does not follow the rules of .csv ({error}).", "not CSV")
            continue
        if not_utf8 is not None:
            yield not_utf8
        elif len(row) == len(header):
            yield (row[name] or None) if name is not None else None, row[text]
        elif row:  # else it is a blank line
            problem = f"ends a row of {len(row)} fields, and the first row has {len(header)}."
            yield BadRow(position, problem, "another number of fields")


def read_json(path: str, text_column: str) -> Iterator[Row | BadRow]:
    """Yield the rows of a .json file: a list of objects, or an object of columns. It is read into memory.

    Raises:
        ValueError: If it is neither.
    """
    with open_bytes(path) as file:
        data = file.read()
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    rows = _rows_of_columns(path, table, text_column) if isinstance(table, dict) else table
    if not isinstance(rows, list) or not any(isinstance(row, dict) for row in rows or [{}]):
        raise ValueError(f"{path} must hold a list of JSON objects, an object of columns, or one object per line.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            yield BadRow(number, "must be a JSON object.", "not a JSON object")
        elif text_column not in row:
            yield BadRow(number, missing_column("", text_column, row).lstrip(), "no text")
        elif not isinstance(text := row[text_column], str | None):
            yield BadRow(number, f"has {text_column!r} that is not text.", "no text")
        else:
            yield row.get("id"), replace_lone_surrogates(text) if text else text


def is_json_lines(path: str, text_column: str) -> bool:
    """Whether a .json file has an object a line, as .jsonl: its first line is a document, or a bad one before one."""
    with open_bytes(path) as file:
        lines = (line.strip() for line in iter(lambda: file.readline(MAX_LINE_BYTES), b""))
        first, second = islice(chain(filter(None, lines), (b"", b"")), 2)
    row = _json_object(first.removeprefix(codecs.BOM_UTF8))
    if row is not None and not isinstance(row.get(text_column), list | dict):
        return True
    # What spans several lines, such as {"text": and {"0": "a"}}, is no bad line.
    return first.endswith((b"}", b"]")) and _json_object(second) is not None


def read_arrow(path: str, text_column: str) -> Iterator[Row]:
    """Yield the rows of a file in Arrow's stream format, as `datasets` writes it, or in its file format.

    Raises:
        ValueError: If it is damaged, or has no such column of text.
    """
    try:
        with pa.memory_map(path) as file:
            try:
                reader = pa.ipc.open_stream(file)
                batches = iter(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            check_text_column(path, reader.schema, text_column)
            for batch in batches:
                batch.validate(full=True)  # a damaged one could crash Python
                for start in range(0, len(batch), ROWS_PER_BATCH):
                    part = batch.slice(start, ROWS_PER_BATCH)
                    texts = part.column(text_column).to_pylist()
                    ids = part.column("id").to_pylist() if "id" in part.schema.names else [None] * len(texts)
                    yield from zip(ids, texts, strict=True)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a whole arrow file ({' '.join(str(error).split())}).") from error


def missing_column(where: str, text_column: str, columns: list[str] | dict) -> str:
    """The error message for a text column that does not exist."""
    return f"{where} has no column {text_column!r}; it has {', '.join(columns) or 'none'}: name one by --text_column."


def _json_object(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _rows_of_columns(path: str, table: dict, text_column: str) -> list[dict]:
    """{"text": ["a", "b"]}, or pandas's {"text": {"0": "a", "1": "b"}} -> [{"text": "a"}, {"text": "b"}]."""
    columns = {}
    for name in {text_column, "id"} & table.keys():
        columns[name] = list(table[name].values()) if isinstance(table[name], dict) else table[name]
    if text_column not in columns:
        raise ValueError(missing_column(path, text_column, table))
    if not all(isinstance(column, list) and len(column) == len(columns[text_column]) for column in columns.values()):
        raise ValueError(f"{path}: the columns {', '.join(columns)} must be lists of one length.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
