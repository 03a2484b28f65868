"""Cut files into partitions, which are read independently of each other.

A partition is a row group of a .parquet file (some rows of a large one), 16 MiB of a text or .jsonl file, or a whole
file that can only be read from its beginning.
"""

import codecs
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from modeling_gpt2repro.storage.hub_files import is_on_hub

from .documents import BadLine, BadLineError, Document, Partition, content_kind, read_table
from .files import TABLE_KINDS, TEXT_KINDS, file_kind, is_compressed, open_bytes, raise_problems, shorten
from .parquet import row_ranges
from .text import BLOCK_BYTES, WHOLE_FILE, compile_separator, find_document_cut, has_separator

COMPRESSION_RATIO = 3  # English text by gzip or zstd, roughly
LISTING_THREADS = 4  # the footers of parquet files on the Hub are waited for, not computed


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
    kind = content_kind(path, text_column)
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


def _check_first_row(partition: Partition, skip_bad_lines: bool):
    """Raise on a missing text column now, not after hours of work."""
    rows = read_table(partition)
    first = next(rows, None)
    if isinstance(first, BadLine) and not (skip_bad_lines and any(isinstance(row, Document) for row in rows)):
        raise BadLineError(str(first))
