"""Where text comes from: files on disk or on the Hub, cut into units that are read independently of each other.

A unit is a row group of a parquet file, or 64 MiB of a .txt or .jsonl file. Reading one twice gives the same documents.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

RANGE_BYTES = 64 * 2**20
# A text file is handed on in pieces of about this many characters, so that a part of it can serve for validation.
PIECE_CHARACTERS = 2_000
FILE_KINDS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One document, or a piece of one.

    Args:
        id: The same whatever the machine, the folder and the number of workers; decides who validates.
        text: Never empty.
        continues: The text goes on from the piece before: no end-of-text in between.
    """

    id: str
    text: str
    continues: bool = False


@dataclass(frozen=True)
class Unit:
    """What one worker reads at a time: `start` to `stop` are bytes of a .txt or .jsonl, row groups of a .parquet."""

    path: str
    start: int
    stop: int
    text_column: str = "text"

    @property
    def name(self) -> str:
        """File name and place in it, the same on every machine."""
        return f"{PurePosixPath(Path(self.path).as_posix()).name}:{self.start}"


def list_units(paths: list[str], text_column: str = "text") -> list[Unit]:
    """Cut files (local paths or `hf://` addresses) into units, in their order.

    Raises:
        ValueError: With every problem, one a line: not there, of an unknown kind, empty, without the text column.
    """
    units, problems = [], []
    for path in paths:
        try:
            units += _units_of(path, text_column)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return units


def _units_of(path: str, text_column: str) -> list[Unit]:
    if Path(path).suffix not in FILE_KINDS:
        raise ValueError(f"{path} is not of a kind that can be read: {', '.join(FILE_KINDS)}.")
    if not path.startswith("hf://"):
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}.")
        if Path(path).stat().st_size == 0:
            raise ValueError(f"{path} is empty.")
    if path.endswith(".parquet"):
        schema, row_groups = _parquet_layout(path)
        if text_column not in schema:
            raise ValueError(
                f"{path} has no column {text_column!r}; it has {', '.join(schema)}: name one by --text_column."
            )
        return [Unit(path, group, group + 1, text_column) for group in range(row_groups)]
    with _open(path) as file:
        size = file.seek(0, 2)
    return [Unit(path, start, min(start + RANGE_BYTES, size), text_column) for start in range(0, size, RANGE_BYTES)]


def read_unit(unit: Unit) -> Iterator[Document]:
    """Yield the unit's documents, without empty ones.

    Raises:
        ValueError: On text that is not UTF-8 or a line that is not a JSON object with the text column, with its place.
        OSError: Where the file cannot be read.
    """
    if unit.path.endswith(".parquet"):
        documents = _read_row_group(unit)
    elif unit.path.endswith(".jsonl"):
        documents = _read_json_lines(unit)
    else:
        documents = _read_text(unit)
    return (document for document in documents if document.text)


def _read_row_group(unit: Unit) -> Iterator[Document]:
    import pyarrow.parquet as pq

    with _open(unit.path) as file:
        parquet = pq.ParquetFile(file, metadata=_parquet_metadata(unit.path))
        columns = [unit.text_column] + (["id"] if "id" in parquet.schema_arrow.names else [])
        row = 0
        for batch in parquet.iter_batches(columns=columns, row_groups=range(unit.start, unit.stop)):
            texts = batch.column(unit.text_column).to_pylist()
            ids = batch.column("id").to_pylist() if "id" in columns else [None] * len(texts)
            for text, name in zip(texts, ids, strict=True):
                yield Document(str(name) if name is not None else f"{unit.name}:{row}", text or "")
                row += 1


def _read_json_lines(unit: Unit) -> Iterator[Document]:
    for place, line in _lines(unit):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row[unit.text_column]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{unit.path}: the line at byte {place} must be a JSON object with a {unit.text_column!r} field."
            ) from error
        if not isinstance(text, str):
            raise ValueError(f"{unit.path}: {unit.text_column!r} in the line at byte {place} is not text.")
        yield Document(str(row.get("id", f"{Path(unit.path).name}:{place}")), text)


def _read_text(unit: Unit) -> Iterator[Document]:
    """A .txt file is one document. Its pieces end where whitespace with a line break begins: GPT-2's BPE never merges
    across such a place, so the pieces' ids are those of the whole."""
    name, text, piece = Path(unit.path).name, "", 0
    for _, line in _lines(unit):
        text += line
        whole = text.rstrip()
        if len(whole) >= PIECE_CHARACTERS and "\n" in text[len(whole) :]:
            yield Document(f"{name}:{unit.start}:{piece}", whole, continues=unit.start + piece > 0)
            text, piece = text[len(whole) :], piece + 1
    yield Document(f"{name}:{unit.start}:{piece}", text, continues=unit.start + piece > 0)


def _lines(unit: Unit) -> Iterator[tuple[int, str]]:
    """Lines that begin inside the unit's bytes, with their places."""
    with _open(unit.path) as file:
        place = unit.start
        if place:
            file.seek(place - 1)
            place += len(file.readline()) - 1
        while place < unit.stop and (line := file.readline()):
            try:
                yield place, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{unit.path} is not UTF-8 (byte {place + error.start} is 0x{line[error.start]:02x}): convert it."
                ) from error
            place += len(line)


def _open(path: str):
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        # Parquet readers ask for the ranges they need; a cache that reads ahead would double the download.
        return HfFileSystem().open(path, "rb", **({"cache_type": "none"} if path.endswith(".parquet") else {}))
    return open(path, "rb")


@lru_cache(maxsize=256)
def _parquet_metadata(path: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(path) as file:
        try:
            return pq.ParquetFile(file).metadata
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a complete parquet file ({error}).") from error


def _parquet_layout(path: str) -> tuple[list[str], int]:
    metadata = _parquet_metadata(path)
    return metadata.schema.to_arrow_schema().names, metadata.num_row_groups
