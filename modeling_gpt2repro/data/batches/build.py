"""What a training run reads, however it was named: batches, validation rows, tokenizer, and who they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.prepare.local import prepare_shards
from modeling_gpt2repro.data.shards.dataset import MANIFEST, TokenDataset, open_shards
from modeling_gpt2repro.data.sources.resolve import PYTHON_PROSE, Source, python_prose_source
from modeling_gpt2repro.data.tokenizer import tokenizer_sha256, train_tokenizer

from .mixture import MixedBatches, mixed_validation, open_mix
from .shuffled import BatchConfig, ShuffledBatches, TokenSequences, validation_batches
from .streaming import StreamedBatches


@dataclass
class TrainingData:
    """The data of a run.

    Args:
        batches: `micro_batches(step)`, `state_dict()`, `load_state_dict(state)`.
        validation: Rows that are never trained on.
        data_fingerprint: Equal for two runs that read the same rows in the same order.
        summary: One line for a person.
    """

    tokenizer: PreTrainedTokenizerFast
    batches: ShuffledBatches | StreamedBatches  # MixedBatches are shuffled ones, too
    validation: TokenSequences
    data_fingerprint: dict
    summary: str

    def validation_batches(self, tokens: int, micro_batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's part of the first `tokens` tokens of validation."""
        return validation_batches(
            self.validation, tokens, micro_batch_size, self.batches.shape, self.tokenizer.eos_token_id
        )


def data_from_shards(shards: TokenDataset, shape: BatchConfig) -> TrainingData:
    """Seeded permutations of prepared rows.

    Raises:
        ValueError: If a split holds less than one row; both are told.
    """
    rows, problems = {}, []
    for split, name in (("train", "training"), ("validation", "validation")):
        try:
            rows[split] = TokenSequences(shards.shards(split), shape.block_size, name)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    train, validation = (shards.manifest["splits"][split]["tokens"] for split in ("train", "validation"))
    return TrainingData(
        shards.tokenizer,
        ShuffledBatches(rows["train"], shape, shards.manifest["end_of_text_id"]),
        rows["validation"],
        {"data": shards.fingerprint, **order_identity(shape)},
        f"{train:,} training tokens in {shards.folder}, {validation:,} for validation",
    )


def data_from_mix(shares: dict[str, float], shape: BatchConfig, validation_tokens: int) -> TrainingData:
    """Rows of several prepared folders, name -> share, in these proportions; of validation, too.

    Raises:
        ValueError: See `open_mix` and `TokenSequences`.
    """
    mix, weights = open_mix(shares), list(shares.values())
    rows = [TokenSequences(shards.shards("train"), shape.block_size, f"training ({shards.folder})") for shards in mix]
    return TrainingData(
        mix[0].tokenizer,
        MixedBatches(rows, weights, shape, mix[0].manifest["end_of_text_id"]),
        mixed_validation(mix, weights, shape.block_size, validation_tokens),
        {
            "data": [[shards.fingerprint, share] for shards, share in zip(mix, weights, strict=True)],
            **order_identity(shape),
        },
        ", ".join(f"{share:.1%} {shards.folder}" for shards, share in zip(mix, weights, strict=True)),
    )


def data_from_stream(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    shape: BatchConfig,
    validation_share: float,
    validation_tokens: int,
) -> TrainingData:
    """Rows straight from a source; the validation rows are read at once.

    Raises:
        ValueError: See `StreamedBatches` and `TokenSequences`.
    """
    batches = StreamedBatches(source, tokenizer, shape, validation_share)
    identity = {
        "data": source.description,
        "validation_share": validation_share,
        "tokenizer": tokenizer_sha256(tokenizer),
        **order_identity(shape),
    }
    name = source.description.get("dataset", "files")
    summary = f"{name}, streamed: {len(batches.units):,} units in {batches.lanes} lanes"
    return TrainingData(tokenizer, batches, batches.validation_rows(validation_tokens), identity, summary)


def order_identity(shape: BatchConfig) -> dict:
    """What decides the order of rows, whatever the processes and micro-batches."""
    return {"block_size": shape.block_size, "rows_per_step": shape.sequences_per_step, "seed": shape.seed}


def python_prose_shards(folder: Path, vocab_size: int, block_size: int, validation_share: float) -> TokenDataset:
    """The text that Python carries, prepared in `folder` with a tokenizer trained on it; opened if it is there already.

    Raises:
        ValueError: If there is too little of it, or `folder` holds something else.
    """
    if not (folder / MANIFEST).exists():
        source = python_prose_source()
        texts = (document.text for unit in source.units for document in source.read(unit))
        tokenizer = train_tokenizer(texts, vocab_size, max_length=block_size)
        prepare_shards(source, tokenizer, f"trained on {PYTHON_PROSE}", folder, validation_share)
    return open_shards(folder)
