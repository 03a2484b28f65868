"""What a training run reads, however it was named: a prepared folder, a mix of them, or a source that is streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.contamination import describe_contamination
from modeling_gpt2repro.data.prepare.local import prepare_shards, train_tokenizer_on
from modeling_gpt2repro.data.shards.dataset import MANIFEST, SPLITS, TokenDataset, open_shards
from modeling_gpt2repro.data.sources.resolve import Source, built_in_source
from modeling_gpt2repro.data.sources.stories import Story
from modeling_gpt2repro.data.tokenizer import tokenizer_sha256
from modeling_gpt2repro.runtime.command_line import InputErrors

from .mixture import MixedBatches, load_mixture, mixed_validation
from .sequences import TokenSequences, validation_batches
from .shuffled import BatchConfig, ShuffledBatches, TrainingBatches
from .streaming import StreamedBatches


@dataclass
class TrainingData:
    """The data of a run: all that the training loop knows of it."""

    tokenizer: PreTrainedTokenizerFast  # what made the ids
    batches: TrainingBatches  # what each step trains on
    validation: TokenSequences  # sequences that are never trained on, the same on every process
    # Equal for two runs that train on the same sequences in the same order. Kept in checkpoints, so that a run is not
    # resumed on other data; does not depend on processes and micro-batches.
    data_fingerprint: dict
    summary: str  # one line about it for the start of the log
    contamination: str | None = None  # benchmark items in it, if it was prepared with --decontaminate
    stories: Sequence[Story] = ()  # whole ones that are never trained on, if the data are stories

    def validation_batches(self, tokens: int, micro_batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's part of the first `tokens` tokens of validation."""
        config = self.batches.config
        return validation_batches(
            self.validation,
            tokens,
            micro_batch_size,
            process_index=config.process_index,
            num_processes=config.num_processes,
            end_of_text=self.tokenizer.eos_token_id if config.document_mask else None,
        )


def build_shuffled_data(dataset: TokenDataset, config: BatchConfig, validation_tokens: int) -> TrainingData:
    """Train on one prepared folder, shuffled anew in each epoch; validation tokens are held in memory.

    Raises:
        ValueError: If a split holds less than one sequence; a line for each that does.
    """
    errors = InputErrors()
    train = errors.capture(TokenSequences, dataset.shard_files("train"), config.block_size, "training")
    validation = errors.capture(mixed_validation, [dataset], [1.0], config.block_size, validation_tokens)
    errors.raise_if_any()
    train_total, validation_total = (dataset.manifest["splits"][split]["tokens"] for split in SPLITS)
    return TrainingData(
        tokenizer=dataset.tokenizer,
        batches=ShuffledBatches(train, config, dataset.manifest["end_of_text_id"]),
        validation=validation,
        data_fingerprint={"data": dataset.fingerprint, **order_fingerprint(config)},
        summary=f"{train_total:,} training tokens in {dataset.folder}, {validation_total:,} for validation",
        contamination=describe_contamination(dataset.manifest),
    )


def build_mixed_data(shares: dict[str, float], config: BatchConfig, validation_tokens: int) -> TrainingData:
    """Train on several prepared folders, folder -> share, in these proportions, which hold for validation, too.

    Raises:
        ValueError: See `load_mixture` and `TokenSequences`.
    """
    datasets = load_mixture(shares)
    weights = list(shares.values())
    sources = [
        TokenSequences(dataset.shard_files("train"), config.block_size, name=f"training ({dataset.folder})")
        for dataset in datasets
    ]
    weighted = list(zip(datasets, weights, strict=True))
    data = [[dataset.fingerprint, share] for dataset, share in weighted]
    contamination = [describe_contamination(dataset.manifest) for dataset in datasets]
    return TrainingData(
        tokenizer=datasets[0].tokenizer,
        batches=MixedBatches(sources, weights, config, datasets[0].manifest["end_of_text_id"]),
        validation=mixed_validation(datasets, weights, config.block_size, validation_tokens),
        data_fingerprint={"data": data, **order_fingerprint(config)},
        summary=", ".join(f"{share:.1%} {dataset.folder}" for dataset, share in weighted),
        contamination="; ".join(contamination) if all(contamination) else None,
    )


def build_streamed_data(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    config: BatchConfig,
    validation_share: float,
    validation_tokens: int,
) -> TrainingData:
    """Train straight from a source; what `validation_tokens` takes of it is read and tokenized at once.

    Raises:
        ValueError: See `StreamedBatches` and `TokenSequences`.
    """
    batches = StreamedBatches(source, tokenizer, config, validation_share)
    name = source.description.get("dataset", "files")
    sizes = f"{len(batches.partitions):,} partitions in {batches.num_logical_shards} logical shards"
    return TrainingData(
        tokenizer=tokenizer,
        batches=batches,
        validation=batches.validation_sequences(validation_tokens),
        data_fingerprint={
            "data": source.description,
            "validation_share": validation_share,
            "tokenizer": tokenizer_sha256(tokenizer),
            **order_fingerprint(config),
        },
        summary=f"{name}, streamed: {sizes}",
    )


def order_fingerprint(config: BatchConfig) -> dict:
    """What decides which sequence comes when, whatever the processes and micro-batches; kept in checkpoints."""
    fingerprint = {"block_size": config.block_size, "rows_per_step": config.sequences_per_step, "seed": config.seed}
    if config.overfit_one_batch:
        fingerprint["overfit_one_batch"] = True
    # Checkpoints did not name their order while there was only one; a run of that order keeps it.
    return fingerprint if config.order == "argsort" else {**fingerprint, "order": config.order}


def saved_order(data_fingerprint: dict) -> str:
    """The `BatchConfig.order` that a saved fingerprint asks for."""
    return "keyed" if "order" in data_fingerprint else "argsort"


def load_built_in_text(
    name: str, folder: Path, vocab_size: int, block_size: int, validation_share: float
) -> TokenDataset:
    """One of BUILT_IN_TEXTS, with a tokenizer trained on it; prepared in `folder`, unless it is there already.

    Raises:
        ValueError: If there is too little of it, or `folder` holds something else.
    """
    source = built_in_source(name, block_size)
    if not (folder / MANIFEST).exists():
        tokenizer = train_tokenizer_on(source, vocab_size, max_length=block_size)
        prepare_shards(source, tokenizer, f"trained on {name}", folder, validation_share)
    dataset = open_shards(folder)
    if dataset.manifest["source"] != source.description:  # the run, or an interrupted start, began with another text
        held = dataset.manifest["source"]
        if held.get("dataset") == name:
            length = held.get("document_length")
            raise ValueError(
                f"{folder} holds {name} for --block_size {length}, not {block_size}: give that one, or another "
                "--output_dir."
            )
        advice = "give that --dataset_name, or" if "dataset" in held else "give"
        raise ValueError(
            f"{folder} holds {held.get('dataset', 'another text')}, not {name}: {advice} another --output_dir."
        )
    return dataset
