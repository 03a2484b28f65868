"""Units to tokens, validation split off, and all of it in one process; `tokenize_units.py` has it in several."""

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.prepare.assemble import Progress, write_shards
from modeling_gpt2repro.data.prepare.spec import PrepareSpec, make_spec
from modeling_gpt2repro.data.prepare.token_cache import TokenizedPartition
from modeling_gpt2repro.data.prepare.workspace import finish_job, start_job
from modeling_gpt2repro.data.shards.dataset import TokenDataset, open_shards
from modeling_gpt2repro.data.sources.documents import Document, Partition
from modeling_gpt2repro.data.sources.resolve import Source

from .tokenizer import save_tokenizer, text_encoder


def is_validation(document_id: str, share: float) -> bool:
    """Whether a document belongs to validation: by its id's hash, whatever stands around it and whoever asks."""
    digest = hashlib.sha256(document_id.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def tokenize_documents(
    documents: Iterable[Document], encode: Callable[[str], np.ndarray], end_of_text: int, validation_share: float
) -> TokenizedPartition:
    """Encode documents, each after an end-of-text token; pieces that go on from the one before have none."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    text_bytes = {"train": 0, "validation": 0}
    mark, previous = np.array([end_of_text], dtype=np.uint16), None
    for document in documents:
        split = "validation" if is_validation(document.id, validation_share) else "train"
        if not (document.continues and split == previous):
            parts[split].append(mark)
        parts[split].append(encode(document.text))
        text_bytes[split] += len(document.text.encode())
        previous = split
    ids = {split: np.concatenate(arrays) if arrays else np.empty(0, np.uint16) for split, arrays in parts.items()}
    return TokenizedPartition(ids, text_bytes)


def tokenize_partition(
    source: Source, unit: Partition, encode: Callable[[str], np.ndarray], plan: PrepareSpec
) -> TokenizedPartition:
    """Read a unit, encode it, and count what was left out."""
    skipped = Counter()
    tokenized = tokenize_documents(source.read(unit, skipped), encode, plan.end_of_text_id, plan.validation_share)
    tokenized.skipped = dict(skipped)
    return tokenized


def prepare_shards(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_name: str,
    output_dir: str | Path,
    validation_share: float,
    max_tokens: int | None = None,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    on_progress: Progress = lambda units, total_units, tokens: None,
    layout: str = "plain",
) -> TokenDataset:
    """Tokenize a source into `output_dir` within this process: shards, tokenizer and, last of all, the manifest.

    Args:
        validation_share: Part of the documents, by hash of their ids, that go to the validation split.
        max_tokens: Stop after so many training tokens.
        shard_tokens: Tokens a shard, 2 bytes each; 100 M as in the lecture.
        workers: Threads; the tokenizers and parquet readers leave Python's lock while they work.
        on_progress: Called after each unit with units done, units in all, and training tokens so far.
        layout: How shards are named, one of `LAYOUTS`.

    Raises:
        ValueError: If `output_dir` is in use, or the text is unusable, or none of it falls to a split.
    """
    output_dir = Path(output_dir)
    options = {"max_tokens": max_tokens, "shard_tokens": shard_tokens, "layout": layout}
    plan = make_prepare_spec(source, tokenizer, tokenizer_name, validation_share, **options)
    start_job(output_dir, plan)
    save_tokenizer(tokenizer, output_dir / "tokenizer")
    encode = text_encoder(tokenizer)
    tokenized = in_order(lambda unit: tokenize_partition(source, unit, encode, plan), source.partitions, workers)
    with closing(tokenized):
        write_shards(output_dir, plan, tokenized, on_progress)
    finish_job(output_dir)
    return open_shards(output_dir)


def make_prepare_spec(
    source: Source, tokenizer: PreTrainedTokenizerFast, tokenizer_name: str, validation_share: float, **options
) -> PrepareSpec:
    """The plan for a source and a tokenizer, which is named by the hash of what a reader of its folder will load."""
    with TemporaryDirectory() as folder:
        sha256 = save_tokenizer(tokenizer, Path(folder))
    identity = {"name": tokenizer_name, "vocab_size": len(tokenizer), "sha256": sha256}
    return make_spec(source, identity, tokenizer.eos_token_id, validation_share, **options)


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
