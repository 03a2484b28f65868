"""Parquet files, on disk or on the Hub: the size of their row groups, and the text and id columns of one of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.storage.hub_files import is_on_hub, open_hub_file, retry_hub_read

ROWS_PER_BATCH = 1_000  # held as Python strings at a time: a row group may be as large as the file


def row_group_bytes(path: str, text_column: str) -> list[int]:
    """Uncompressed bytes of the text column in each row group: roughly the UTF-8 bytes of its text.

    Raises:
        ValueError: If the file is damaged, or has no such column of text.
    """
    metadata = _metadata(path)
    schema = metadata.schema.to_arrow_schema()
    check_text_column(path, schema, text_column)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if not groups:
        return []
    # A nested column is stored as several, so an index in the schema is not one in the row group.
    stored = [groups[0].column(index).path_in_schema for index in range(groups[0].num_columns)]
    text_index = stored.index(text_column)
    return [group.column(text_index).total_uncompressed_size for group in groups]


def check_text_column(path: str, schema: pa.Schema, text_column: str):
    """Raise a ValueError unless a file of this schema has such a column, and of text."""
    if text_column not in schema.names:
        raise ValueError(
            f"{path} has no column {text_column!r}; it has {', '.join(schema.names)}: name one by --text_column."
        )
    column_type = schema.field(text_column).type
    value_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    if value_type not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(
            f"column {text_column!r} of {path} holds {column_type}, not text: name another by --text_column."
        )


def read_row_group(
    path: str, row_group: int, text_column: str, rows_per_batch: int = ROWS_PER_BATCH
) -> Iterator[tuple[object, str | None]]:
    """Yield (id, text) of each row; the id is None if the file has no column of this name.

    Raises:
        ValueError: If the file is damaged.
    """
    with _opened(path, _metadata(path)) as parquet:
        has_ids = "id" in parquet.schema_arrow.names
        columns = [text_column, "id"] if has_ids else [text_column]
        for batch in parquet.iter_batches(rows_per_batch, row_groups=[row_group], columns=columns):
            texts = batch.column(text_column).to_pylist()
            ids = batch.column("id").to_pylist() if has_ids else [None] * len(texts)
            yield from zip(ids, texts, strict=True)


def _metadata(path: str) -> pq.FileMetaData:
    """The footer, read once for each version of a file; an address on the Hub names a commit, so it has only one."""
    return _read_metadata(path, modified_ns=None if is_on_hub(path) else os.stat(path).st_mtime_ns)


@lru_cache(maxsize=256)
def _read_metadata(path: str, modified_ns: int | None) -> pq.FileMetaData:
    def read() -> pq.FileMetaData:
        with _opened(path) as parquet:
            return parquet.metadata

    return retry_hub_read(read)


@contextmanager
def _opened(path: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    try:
        with open_hub_file(path) if is_on_hub(path) else open(path, "rb") as file:
            yield pq.ParquetFile(file, metadata=metadata)
    except HTTPError:
        raise  # the connection failed, not the file; some of these are OSErrors, too
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({' '.join(str(error).split())}).") from error
