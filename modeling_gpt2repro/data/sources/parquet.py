"""Parquet files, on disk or on the Hub: ranges of their rows, and the text and id columns of one range."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.storage.hub_files import is_on_hub, open_hub_file, retry_hub_read
from modeling_gpt2repro.storage.retry import is_refusal

ROWS_PER_BATCH = 1_000  # held as Python strings at a time: a row group may be as large as the file
# Read from disk at a time. By default, pyarrow reads the whole column of a row group into memory, which is right for
# the Hub, where each request takes time.
BUFFER_BYTES = 2**20
# A row group is cut into ranges of rows, each of at least this many bytes of text, so that several workers can share a
# large one. Reading a range decodes the rows before it as well, at about 700 MB/s, so there are few ranges, and none on
# the Hub, where those rows would have to be downloaded.
RANGE_BYTES = 32 * 2**20
MAX_RANGES = 16

NOT_UTF8 = object()  # takes the place of a string that cannot be decoded


@dataclass(frozen=True)
class RowRange:
    """Rows of one row group."""

    row_group: int
    first: int  # counted within the row group
    stop: int | None  # one after the last; None for all of the row group
    text_bytes: int  # uncompressed bytes of the text column: roughly the UTF-8 bytes of its text


def row_ranges(path: str, text_column: str, range_bytes: int = RANGE_BYTES) -> list[RowRange]:
    """Cut a file into ranges of rows: its row groups, or parts of the large ones.

    Raises:
        ValueError: If the file is damaged, or has no such column of text.
    """
    metadata = retry_hub_read(lambda: _metadata(path))
    schema = metadata.schema.to_arrow_schema()
    check_text_column(path, schema, text_column)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if not groups:
        return []
    # A nested column is stored as several, so an index in the schema is not one in the row group.
    stored = [groups[0].column(index).path_in_schema for index in range(groups[0].num_columns)]
    text_index = stored.index(text_column)
    ranges = []
    for number, group in enumerate(groups):
        size = group.column(text_index).total_uncompressed_size
        parts = 1 if is_on_hub(path) else max(1, min(size // range_bytes, MAX_RANGES, group.num_rows))
        if parts == 1:
            ranges.append(RowRange(number, 0, None, size))
        else:
            cuts = [group.num_rows * part // parts for part in range(parts + 1)]
            ranges += [RowRange(number, first, stop, size // parts) for first, stop in pairwise(cuts)]
    return ranges


def check_text_column(path: str, schema: pa.Schema, text_column: str):
    """Raise a ValueError unless a file of this schema has such a column, and of text."""
    if text_column not in schema.names:
        raise ValueError(
            f"{path} has no column {text_column!r}; it has {', '.join(schema.names)}: name one by --text_column."
        )
    check_names(path, schema.names, text_column)
    column_type = schema.field(text_column).type
    value_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    if value_type not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(
            f"column {text_column!r} of {path} holds {column_type}, not text: name another by --text_column."
        )


def check_names(path: str, columns: list[str], text_column: str):
    """Raise a ValueError if there are several columns of the name of the one that is read."""
    for name in (text_column, "id"):
        if columns.count(name) > 1:
            raise ValueError(f"{path} has {columns.count(name)} columns {name!r}: rename all of them but one.")


def read_rows(
    path: str,
    row_group: int,
    text_column: str,
    first_row: int = 0,
    stop_row: int | None = None,
    rows_per_batch: int = ROWS_PER_BATCH,
) -> Iterator[tuple[int, object, object]]:
    """Yield (number, id, text) of each row of a range; the id is None if the file has no column of this name.

    NOT_UTF8 takes the place of a string that is not UTF-8.

    Raises:
        ValueError: If the file is damaged.
    """
    with _opened(path, _metadata(path)) as parquet:
        has_ids = "id" in parquet.schema_arrow.names
        columns = [text_column, "id"] if has_ids else [text_column]
        number = 0  # of the batch's first row
        for batch in parquet.iter_batches(rows_per_batch, row_groups=[row_group], columns=columns):
            first = max(first_row - number, 0)
            stop = len(batch) if stop_row is None else min(stop_row - number, len(batch))
            if first < stop:
                rows = batch.slice(first, stop - first)
                texts = _to_pylist(rows.column(text_column))
                ids = _to_pylist(rows.column("id")) if has_ids else [None] * len(texts)
                yield from zip(range(number + first, number + stop), ids, texts, strict=True)
            number += len(batch)
            if stop_row is not None and number >= stop_row:
                return


def _to_pylist(column: pa.Array) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        column = column.cast(pa.binary_view() if column.type == pa.string_view() else pa.large_binary())
        return [value if value is None else _decode(value) for value in column.to_pylist()]


def _decode(value: bytes) -> object:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return NOT_UTF8


def _metadata(path: str) -> pq.FileMetaData:
    """The footer, read once for each version of a file; an address on the Hub names a commit, so it has only one."""
    return _read_metadata(path, modified_ns=None if is_on_hub(path) else os.stat(path).st_mtime_ns)


@lru_cache(maxsize=256)
def _read_metadata(path: str, modified_ns: int | None) -> pq.FileMetaData:
    with _opened(path) as parquet:
        return parquet.metadata


@contextmanager
def _opened(path: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    try:
        with open_hub_file(path) if is_on_hub(path) else open(path, "rb") as file:
            yield pq.ParquetFile(file, metadata=metadata, buffer_size=0 if is_on_hub(path) else BUFFER_BYTES)
    except HTTPError:
        raise  # the connection failed, not the file; some of these are OSErrors, too
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if is_on_hub(path) and is_refusal(error):
            raise  # the Hub's answer, as the error of a file system
        raise ValueError(f"{path} is not a whole parquet file ({' '.join(str(error).split())}).") from error
