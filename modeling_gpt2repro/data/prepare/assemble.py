"""Assemble tokenized partitions, in their order, into shards and the manifest."""

import itertools
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from modeling_gpt2repro.data.contamination import contamination_counts
from modeling_gpt2repro.data.shards.dataset import FORMAT, MANIFEST, SPLITS
from modeling_gpt2repro.data.shards.writer import ShardWriter
from modeling_gpt2repro.data.sources.documents import BadLine
from modeling_gpt2repro.data.sources.files import shorten
from modeling_gpt2repro.data.sources.text import LINE_ENDS
from modeling_gpt2repro.data.tokenize import TokenizedPartition
from modeling_gpt2repro.storage.atomic import explain_disk_full, write_json

from .spec import PrepareSpec
from .token_cache import CACHE_DIR, finished_partitions, read_errors, read_partition_file, required_partitions
from .workspace import LOGS

# Called with the number of finished partitions, of all partitions, and of training tokens so far.
OnProgress = Callable[[int, int, int], None]


class UnusableText(ValueError):
    """There is nothing to train on, or nothing to validate with."""


def assemble(folder: Path, spec: PrepareSpec, on_progress: OnProgress = lambda done, total, tokens: None):
    """Write the shards and the manifest from the cached partitions, which stay.

    Raises:
        ValueError: If a partition is not finished, the text is unusable, or the disk is full.
    """
    if changed := spec.with_present_files().changed_files(spec):
        raise ValueError(
            f"{shorten(changed)} changed while it was read: run the same command again, and only what differs is "
            "tokenized again."
        )
    finished = finished_partitions(folder, spec.numbers)
    required = required_partitions(finished, len(spec.partitions), spec.max_tokens)
    if required is None:
        errors = read_errors(folder) or [f"see the logs in {folder / LOGS}."]
        raise ValueError(
            f"{len(finished):,} of {len(spec.partitions):,} partitions are finished, which is not enough: "
            f"{' '.join(errors)} Run the same command again to continue."
        )
    tokenized = (read_partition_file(finished[index][1]) for index in required)
    try:
        write_shards(folder, spec, tokenized, on_progress)
    except UnusableText:
        shutil.rmtree(folder / CACHE_DIR)  # another spec is needed, which can reuse none of it
        raise


def write_shards(folder: Path, spec: PrepareSpec, tokenized: Iterable[TokenizedPartition], on_progress: OnProgress):
    """Write tokenized partitions as shards, and then the manifest.

    Raises:
        UnusableText: If there is no text, or a split has none.
        ValueError: If the disk is full.
    """
    train = ShardWriter(
        folder, "train", spec.shard_tokens, spec.end_of_text_id, max_tokens=spec.max_tokens, layout=spec.layout
    )
    validation = ShardWriter(folder, "validation", spec.shard_tokens, spec.end_of_text_id, layout=spec.layout)
    writers = {"train": train, "validation": validation}
    skipped = Counter()
    bad_lines = Counter()
    first_bad_line = None
    compared = 0
    contaminated = []
    normalized = set()  # files whose line endings became \n
    used = 0
    try:
        with explain_disk_full(folder):
            for index, partition in enumerate(tokenized):
                room = math.inf if spec.max_tokens is None else spec.max_tokens - train.tokens
                compared += sum(start < room for start in partition.compared)
                contaminated += [document for document in partition.contaminated if document[0] < room]
                for split, writer in writers.items():
                    writer.append(partition.ids[split], partition.text_bytes[split], partition=index)
                if partition.skipped.pop(LINE_ENDS, 0):
                    normalized.add(spec.partitions[index].path)
                skipped.update(partition.skipped)
                bad_lines.update(partition.bad_lines)
                if partition.first_bad_line and first_bad_line is None:
                    first_bad_line = BadLine(spec.partitions[index], *partition.first_bad_line)
                used = index + 1
                on_progress(used, len(spec.partitions), train.tokens)
                if train.is_full:
                    break
            check_splits(writers, spec.validation_share)
            splits = {split: writer.finish() for split, writer in writers.items()}
            left_out = {"skipped": dict(sorted(skipped.items()))}
            if first_bad_line:
                place = f"{first_bad_line.partition.file_name}: {first_bad_line.place}"
                first = f"{place} {first_bad_line.problem}"
                left_out["bad_lines"] = {"counts": dict(sorted(bad_lines.items())), "first": first}
            if spec.decontamination:
                left_out["contamination"] = contamination_counts(
                    spec.decontamination, spec.benchmark_items, compared, contaminated
                )
            write_manifest(folder, spec, splits, used, left_out, len(normalized))
    finally:
        for writer in writers.values():
            writer.abandon()


def check_splits(writers: dict[str, ShardWriter], validation_share: float):
    """Raise `UnusableText` if there is nothing to train on or to validate with."""
    if not any(writer.tokens for writer in writers.values()):
        raise UnusableText("there is no text in the source: every document is empty.")
    for split, share in (("train", 1 - validation_share), ("validation", validation_share)):
        if share and not writers[split].tokens:
            raise UnusableText(
                f"none of the text fell to the {split} split (validation_share {validation_share}): give more text, "
                "documents with ids of their own, or another --validation_share."
            )


def write_manifest(
    folder: Path,
    spec: PrepareSpec,
    splits: dict[str, dict],
    num_partitions: int,
    left_out: dict,
    num_normalized: int = 0,
):
    """Write manifest.json, last of all and atomically: a folder without one is not a prepared folder."""
    paths = [partition.path for partition in spec.partitions[:num_partitions]]
    files = []
    for path, group in itertools.groupby(paths):
        # Of a local path only the name, because folders differ between machines; a Hub address unchanged.
        files.append({"file": path if "://" in path else os.path.basename(path), "units": len(list(group))})
    manifest = {
        "format": FORMAT,
        "source": spec.source,
        "tokenizer": spec.tokenizer,
        "end_of_text_id": spec.end_of_text_id,
        "validation_share": spec.validation_share,
        "layout": spec.layout,
        "units": {"count": num_partitions, "files": files},
        **left_out,
        "splits": {split: splits[split] for split in SPLITS},
    }
    if num_normalized:
        manifest["files_with_other_line_ends"] = num_normalized
    write_json(folder / MANIFEST, manifest)
