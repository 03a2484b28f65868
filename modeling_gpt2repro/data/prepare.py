"""Units to shards: read, tokenize, split off validation, write in order."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from .documents import Document, Unit
from .shard_writer import ShardWriter, begin_preparation, write_manifest
from .shards import PreparedShards, open_shards
from .sources import Source
from .tokenizer import save_tokenizer, text_encoder


@dataclass
class TokenizedUnit:
    """What became of one unit: per split its ids (n,) uint16, documents, and UTF-8 bytes of text."""

    ids: dict[str, np.ndarray]
    text_bytes: dict[str, int]


def validates(document_id: str, share: float) -> bool:
    """Whether a document belongs to validation: by its id's hash, whatever stands around it and whoever asks."""
    digest = hashlib.sha256(document_id.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def tokenize_documents(
    documents: Iterable[Document], encode: Callable[[str], np.ndarray], end_of_text: int, validation_share: float
) -> TokenizedUnit:
    """Encode documents, each after an end-of-text token; pieces that go on from the one before have none."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    text_bytes = {"train": 0, "validation": 0}
    mark, previous = np.array([end_of_text], dtype=np.uint16), None
    for document in documents:
        split = "validation" if validates(document.id, validation_share) else "train"
        if not (document.continues and split == previous):
            parts[split].append(mark)
        parts[split].append(encode(document.text))
        text_bytes[split] += len(document.text.encode())
        previous = split
    ids = {split: np.concatenate(arrays) if arrays else np.empty(0, np.uint16) for split, arrays in parts.items()}
    return TokenizedUnit(ids, text_bytes)


def prepare_shards(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_name: str,
    output_dir: str | Path,
    validation_share: float,
    max_tokens: int | None = None,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    on_progress: Callable[[int, int, int], None] = lambda units, total_units, tokens: None,
) -> PreparedShards:
    """Tokenize a source into `output_dir`: shards, tokenizer and, last of all, the manifest.

    Args:
        validation_share: Part of the documents, by hash of their ids, that go to the validation split.
        max_tokens: Stop after so many training tokens.
        shard_tokens: Tokens a shard, 2 bytes each; 100 M as in the lecture.
        workers: Threads; the tokenizers and parquet readers leave Python's lock while they work.
        on_progress: Called after each unit with units done, units in all, and training tokens so far.

    Raises:
        ValueError: If `output_dir` is in use, or the text is unusable, or none of it falls to a split.
    """
    output_dir = Path(output_dir)
    begin_preparation(output_dir)
    sha256 = save_tokenizer(tokenizer, output_dir / "tokenizer")
    encode = text_encoder(tokenizer)
    end_of_text = tokenizer.eos_token_id
    train = ShardWriter(output_dir, "train", shard_tokens, end_of_text, max_tokens)
    writers = {"train": train, "validation": ShardWriter(output_dir, "validation", shard_tokens, end_of_text)}

    def tokenized(unit: Unit) -> TokenizedUnit:
        return tokenize_documents(source.read(unit), encode, end_of_text, validation_share)

    with closing(in_order(tokenized, source.units, workers)) as units:
        for done, unit in enumerate(units, start=1):
            for split, writer in writers.items():
                writer.append(unit.ids[split], unit.text_bytes[split])
            on_progress(done, len(source.units), train.tokens)
            if train.is_full:
                break
    if not any(writer.tokens for writer in writers.values()):
        raise ValueError("there is no text in the source: every document is empty.")
    for split, wanted in (("train", 1 - validation_share), ("validation", validation_share)):
        if wanted and not writers[split].tokens:
            raise ValueError(
                f"none of the text fell to the {split} split (validation_share {validation_share}): give more text, or "
                "another --validation_share."
            )
    write_manifest(
        output_dir,
        {
            "source": source.description,
            "tokenizer": {"name": tokenizer_name, "vocab_size": len(tokenizer), "sha256": sha256},
            "end_of_text_id": end_of_text,
            "validation_share": validation_share,
            "splits": {split: writer.finish() for split, writer in writers.items()},
        },
    )
    return open_shards(output_dir)


def in_order(work: Callable, items: Iterable, workers: int) -> Iterator:
    """Results of `work` over `items`, in the items' order; at most two a worker are under way, so memory stays put."""
    if workers == 1:
        yield from map(work, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(work, item) for item in itertools.islice(items, 2 * workers))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in itertools.islice(items, 1))
        finally:
            for future in waiting:
                future.cancel()
