"""Units to shards: read, tokenize, split off validation, write in order."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from .documents import Document, Unit
from .shards import PreparedShards, ShardWriter, clear_unfinished, open_shards, write_manifest
from .sources import Source
from .tokenizer import save_tokenizer, text_encoder


@dataclass
class TokenizedUnit:
    """What became of one unit: per split its ids (n,) uint16, documents, and UTF-8 bytes of text."""

    ids: dict[str, np.ndarray]
    documents: dict[str, int]
    text_bytes: dict[str, int]


def validates(document_id: str, share: float) -> bool:
    """Whether a document belongs to validation: by its id's hash, whatever stands around it and whoever asks."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big") < share * 2**64


def tokenize_documents(
    documents: Iterable[Document], encode: Callable[[str], np.ndarray], end_of_text: int, validation_share: float
) -> TokenizedUnit:
    """Encode documents, each after an end-of-text token; pieces that go on from the one before have none."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    counts, text_bytes = {"train": 0, "validation": 0}, {"train": 0, "validation": 0}
    mark, previous = np.array([end_of_text], dtype=np.uint16), None
    for document in documents:
        split = "validation" if validates(document.id, validation_share) else "train"
        if not (document.continues and split == previous):
            parts[split].append(mark)
            counts[split] += 1
        parts[split].append(encode(document.text))
        text_bytes[split] += len(document.text.encode())
        previous = split
    ids = {split: np.concatenate(arrays) if arrays else np.empty(0, np.uint16) for split, arrays in parts.items()}
    return TokenizedUnit(ids, counts, text_bytes)


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
        ValueError: If `output_dir` is in use, or the text is unusable.
    """
    output_dir = Path(output_dir)
    clear_unfinished(output_dir)
    sha256 = save_tokenizer(tokenizer, output_dir / "tokenizer")
    encode = text_encoder(tokenizer)
    writers = {split: ShardWriter(output_dir, split, shard_tokens) for split in ("train", "validation")}

    def tokenized(unit: Unit) -> TokenizedUnit:
        return tokenize_documents(source.read(unit), encode, tokenizer.eos_token_id, validation_share)

    for done, unit in enumerate(in_order(tokenized, source.units, workers), start=1):
        for split, writer in writers.items():
            ids = unit.ids[split]
            if split == "train" and max_tokens is not None:
                ids = ids[: max_tokens - writer.tokens]
            writer.append(ids)
            writer.documents += unit.documents[split]
            writer.text_bytes += unit.text_bytes[split]
        on_progress(done, len(source.units), writers["train"].tokens)
        if max_tokens is not None and writers["train"].tokens >= max_tokens:
            break
    if writers["train"].tokens == 0:
        raise ValueError("there is no text in the source: every document is empty.")
    write_manifest(
        output_dir,
        {
            "source": source.description,
            "tokenizer": {"name": tokenizer_name, "vocab_size": len(tokenizer), "sha256": sha256},
            "end_of_text_id": tokenizer.eos_token_id,
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
