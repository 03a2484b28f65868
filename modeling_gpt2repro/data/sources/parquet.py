"""Parquet files, on disk or on the Hub: what is in them, and the text and id columns of a row group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.storage.hub_files import is_on_hub, open_hub_file, retry_hub_read

# Rows held as Python strings at a time: a row group may be as large as the file.
BATCH_ROWS = 1_000


def row_group_bytes(path: str, text_column: str) -> list[int]:
    """Of each row group, the bytes that its text takes without compression: some more or less than UTF-8 takes.

    Raises:
        ValueError: If the file is not whole, or has no such column of text.
    """
    metadata = _metadata(path)
    schema = metadata.schema.to_arrow_schema()
    if text_column not in schema.names:
        raise ValueError(
            f"{path} has no column {text_column!r}; it has {', '.join(schema.names)}: name one by --text_column."
        )
    kind = schema.field(text_column).type
    if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise ValueError(f"column {text_column!r} of {path} holds {kind}, not text: name another by --text_column.")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if not groups:
        return []
    places = [groups[0].column(place).path_in_schema for place in range(groups[0].num_columns)]
    return [group.column(places.index(text_column)).total_uncompressed_size for group in groups]


def read_row_group(path: str, row_group: int, text_column: str) -> Iterator[tuple[object, str | None]]:
    """Yield (id, text) of each row; the id is None where the file has no column of this name.

    Raises:
        ValueError: If the file is damaged.
    """
    with _opened(path, _metadata(path)) as parquet:
        columns = [text_column] + (["id"] if "id" in parquet.schema_arrow.names else [])
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[row_group], columns=columns):
            texts = batch.column(text_column).to_pylist()
            yield from zip(
                batch.column("id").to_pylist() if "id" in columns else [None] * len(texts), texts, strict=True
            )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _metadata(path: str) -> pq.FileMetaData:
    """The footer, read once; an address on the Hub names a commit, so it does not change."""
    return _read_metadata(path, None if is_on_hub(path) else os.stat(path).st_mtime_ns)


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
        raise  # of the Hub, not of the file; some are OSErrors, too
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({' '.join(str(error).split())}).") from error
