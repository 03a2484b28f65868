"""What became of the units, in their order, to shards and the manifest."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from modeling_gpt2repro.data.shards.dataset import FORMAT, MANIFEST, SPLITS
from modeling_gpt2repro.data.shards.writer import ShardWriter
from modeling_gpt2repro.storage.atomic import atomic_write, explain_disk_full

from .spec import PrepareSpec
from .token_cache import TokenizedPartition


class UnusableText(ValueError):
    """There is nothing to train on, or nothing to validate with."""


# Called after each unit with units done, units in all, and training tokens so far.
Progress = Callable[[int, int, int], None]


def write_shards(folder: Path, plan: PrepareSpec, units: Iterable[TokenizedPartition], on_progress: Progress):
    """Write what became of the plan's units, in their order, as shards, and then the manifest.

    Raises:
        ValueError: If there is no text, none of it fell to a split, or the disk is full.
    """
    options = (plan.shard_tokens, plan.end_of_text_id)
    train = ShardWriter(folder, "train", *options, plan.max_tokens, plan.layout)
    writers = {"train": train, "validation": ShardWriter(folder, "validation", *options, layout=plan.layout)}
    skipped, done = Counter(), 0
    try:
        with explain_disk_full(folder):
            for done, unit in enumerate(units, start=1):
                for split, writer in writers.items():
                    writer.append(unit.ids[split], unit.text_bytes[split], unit=done - 1)
                skipped = None if skipped is None or unit.skipped is None else skipped + Counter(unit.skipped)
                on_progress(done, len(plan.units), train.tokens)
                if train.is_full:
                    break
            check_splits(writers, plan.validation_share)
            splits = {split: writer.finish() for split, writer in writers.items()}
            write_manifest(folder, plan, splits, done, skipped)
    finally:
        for writer in writers.values():
            writer.abandon()


def check_splits(writers: dict[str, ShardWriter], validation_share: float):
    """Raise `UnusableText` where there is nothing to train on or to validate with."""
    if not any(writer.tokens for writer in writers.values()):
        raise UnusableText("there is no text in the source: every document is empty.")
    for split, wanted in (("train", 1 - validation_share), ("validation", validation_share)):
        if wanted and not writers[split].tokens:
            raise UnusableText(
                f"none of the text fell to the {split} split (validation_share {validation_share}): give more text, or "
                "another --validation_share."
            )


def write_manifest(folder: Path, plan: PrepareSpec, splits: dict, units: int, skipped: Counter | None):
    """Write the manifest last, whole or not at all: a folder without one is not a prepared folder."""
    files = [(path, len(list(group))) for path, group in itertools.groupby(unit.path for unit in plan.units[:units])]
    manifest = {
        "format": FORMAT,
        "source": plan.source,
        "tokenizer": plan.tokenizer,
        "end_of_text_id": plan.end_of_text_id,
        "validation_share": plan.validation_share,
        "layout": plan.layout,
        "units": {"count": units, "files": [{"file": _file_name(path), "units": count} for path, count in files]},
        "skipped": None if skipped is None else dict(sorted(skipped.items())),
        "splits": {split: splits[split] for split in SPLITS},
    }
    with atomic_write(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _file_name(path: str) -> str:
    """An address as it is; of a local file not the folder, which differs between machines."""
    return path if "://" in path else os.path.basename(path)
