"""From the name of a data set (local files, a Hub dataset, a text that needs no download) to its partitions."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.storage.hub_files import OnWait, dataset_commit, is_on_hub, retry_hub_read
from modeling_gpt2repro.storage.retry import without_signatures

from .documents import BadLines, Document, Partition, read_partition
from .files import TEXT_KINDS, file_kind, file_state, find_files, is_compressed
from .hub_rows import data_files, is_hub_rows, list_row_partitions, read_row_partition
from .partitions import list_partitions
from .python_docs import python_prose_documents
from .stories import STORIES, story_documents

PYTHON_PROSE = "python-prose"
# --dataset_name of a text for which nothing is downloaded -> its documents: what every Python carries, and what this
# package writes.
BUILT_IN_TEXTS: dict[str, Callable[[], list[Document]]] = {
    PYTHON_PROSE: python_prose_documents,
    STORIES: story_documents,
}


@dataclass(frozen=True)
class Source:
    """Partitions to read, and where they come from."""

    partitions: list[Partition]
    description: dict  # JSON; goes into the manifest of prepared shards and into run.json
    remarks: tuple[str, ...] = ()  # sentences on what is read, and how
    # Of local files, before anything of them was read: by path, see `file_state`.
    file_states: dict[str, list] = field(default_factory=dict)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text, roughly; 0 where they are not known."""
        return sum(partition.text_bytes for partition in self.partitions)

    def read(
        self,
        partition: Partition,
        skipped: Counter | None = None,
        bad_lines: BadLines | None = None,
        on_wait: OnWait = lambda reason: None,
    ) -> Iterator[Document]:
        """Yield the partition's documents, in their order; the other arguments are those of `read_partition`."""
        if self.description.get("dataset") == partition.path:  # not if a file is called "stories"
            return iter(BUILT_IN_TEXTS[partition.path]())
        if is_hub_rows(partition.path):
            return read_row_partition(partition, skipped, on_wait)
        return read_partition(partition, skipped, self.description.get("document_separator"), bad_lines, on_wait)


def built_in_source(name: str, block_size: int) -> Source:
    """One of BUILT_IN_TEXTS, as one partition; each training sequence of `block_size` tokens is one whole story."""
    description = {"dataset": name, "document_length": block_size} if name == STORIES else {"dataset": name}
    return Source([Partition(name, 0, 1)], description)


def local_source(
    patterns: list[str],
    text_column: str = "text",
    document_separator: str | None = None,
    skip_bad_lines: bool = False,
) -> Source:
    """Files on disk: see `find_files` and FILE_KINDS.

    Args:
        document_separator: Separates the documents of text files, see `read_partition`.
        skip_bad_lines: See `list_partitions`.

    Raises:
        ValueError: With every problem, one a line, or in one sentence if they are many.
    """
    names, not_read = find_files(patterns)
    file_states = {path: file_state(path) for path in names if os.path.isfile(path)}  # a missing one is reported below
    partitions = list_partitions(
        list(names), text_column, document_separator=document_separator, skip_bad_lines=skip_bad_lines
    )
    kinds = Counter(file_kind(path) for path in names)
    if skip_bad_lines and set(kinds) == {".arrow"}:
        raise ValueError(
            "skip_bad_lines (True) is not for .arrow files, which are read whole or not at all: leave it out."
        )
    num_texts = sum(kinds[kind] for kind in TEXT_KINDS)
    num_compressed = sum(map(is_compressed, names))
    counted = ", ".join(f"{number:,} {kind or 'without an extension'}" for kind, number in kinds.items())
    remarks = [f"reading files: {counted}", *not_read]
    if num_compressed:
        remarks.append(f"compressed, so that each is read as a whole by one worker: {num_compressed:,}")
    description = {"files": [name or os.path.basename(path) for path, name in names.items()]}
    description["text_column"] = text_column
    if num_texts:
        description["line_ends"] = "LF"  # kept because it changes the ids: older versions left CRLF as it was
    if document_separator is not None:
        description["document_separator"] = document_separator
    elif num_texts:
        remarks.append("each text file is one document, in pieces that are held out or not; see --document_separator")
    partitions = [replace(partition, file=names[partition.path]) for partition in partitions]
    return Source(partitions, description, tuple(remarks), file_states)


def hub_source(
    dataset: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_column: str = "text",
) -> Source:
    """A Hub dataset's split, at one commit: the row groups of its parquet files, or else what `datasets` streams.

    Raises:
        ValueError: If dataset, config, split or text column does not exist, or the Hub cannot be reached.
    """
    name = dataset + (f" ({config})" if config else "")
    try:
        commit = dataset_commit(dataset, revision)
        paths = retry_hub_read(lambda: data_files(dataset, config, split, commit))
        if all(path.endswith(".parquet") for path in paths):
            partitions = list_partitions(paths, text_column)
        else:
            partitions = list_row_partitions(dataset, config, split, commit, text_column)
            # The bytes of a shard's text are not known: each counts as an equal part of the files, which may be
            # compressed and hold more.
            size = retry_hub_read(lambda: sum(HfFileSystem().info(path)["size"] for path in paths if is_on_hub(path)))
            partitions = [replace(partition, text_bytes=size // len(partitions)) for partition in partitions]
    except ConnectionError as error:  # `datasets` raises it as well when it is offline
        raise ValueError(
            f"the Hub cannot be reached for {name} ({' '.join(str(error).split())}): without a network, train with "
            "--preset quickstart, or prepare data where there is one and give --shards DIR."
        ) from error
    except (OSError, ValueError, RuntimeError, HTTPError) as error:  # RuntimeError: a dataset that is a script
        reason = without_signatures(" ".join(str(error).split()))
        raise ValueError(f"the Hub's dataset {name} does not open: {reason}") from error
    return Source(
        partitions,
        {
            "dataset": dataset,
            "config": config,
            "split": split,
            "revision": commit,
            "files": len(paths),
            "text_column": text_column,
        },
    )
