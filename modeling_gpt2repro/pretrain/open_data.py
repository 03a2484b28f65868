"""Open the data of a run, and derive from their size how long it is."""

from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator

from modeling_gpt2repro.data.batches.build import (
    TrainingData,
    build_mixed_data,
    build_shuffled_data,
    build_streamed_data,
    load_built_in_text,
    saved_order,
)
from modeling_gpt2repro.data.batches.mixture import MixedBatches, parse_mix
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, TrainingBatches
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources.resolve import STORIES, hub_source
from modeling_gpt2repro.data.tokenizer import load_tokenizer, save_tokenizer
from modeling_gpt2repro.evaluation.generation import check_prompt
from modeling_gpt2repro.evaluation.stories import held_out_stories
from modeling_gpt2repro.runs.folder import DATA_FOLDER
from modeling_gpt2repro.runtime.collectives import call_main_process_first, run_on_main_and_broadcast
from modeling_gpt2repro.runtime.command_line import InputErrors
from modeling_gpt2repro.storage.hub_files import is_on_hub
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments

from .initial_weights import InitialWeights
from .messages import warn_of_slow_cpu


def data_order(start: InitialWeights | None) -> str:
    """The `BatchConfig.order` of the run: keyed, unless it resumes a run that began in another order."""
    if start is None or start.checkpoint is None:
        return BatchConfig.order
    return saved_order(checkpoints.read_state(start.checkpoint)["identity"])


def load_data(args: TrainArguments, accelerator: Accelerator, start: InitialWeights | None) -> TrainingData | None:
    """Open prepared shards, a mix of several folders, a text that needs no download, or a Hub dataset to stream.

    Args:
        start: What the run starts from, or None if that could not be opened. A checkpoint decides the data's order.

    Returns:
        The data; None if the context length is that of a model that could not be opened.

    Raises:
        ValueError: If they cannot be read, or a prompt for samples does not fit into the context.
    """
    if args.block_size is None:  # the model could not be opened, which is reported with the other errors
        return None
    config = BatchConfig(
        block_size=args.block_size,
        sequences_per_step=args.sequences_per_step,
        micro_batch_size=args.per_device_train_batch_size,
        seed=args.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        document_mask=args.document_mask,
        order=data_order(start),
        overfit_one_batch=args.overfit_one_batch,
    )
    if args.shards is not None:
        args.shards = pin_addresses(accelerator, [args.shards])[args.shards]
        shards = call_main_process_first(accelerator, lambda: open_shards(args.shards), each_machine=True)
        data = build_shuffled_data(shards, config, args.eval_tokens)
    elif args.mix is not None:
        args.mix = pin_mix(accelerator, args.mix)
        shares = parse_mix(args.mix)
        data = call_main_process_first(
            accelerator, lambda: build_mixed_data(shares, config, args.eval_tokens), each_machine=True
        )
    elif name := args.built_in_text:
        folder = Path(args.output_dir) / DATA_FOLDER
        recipe = (args.tokenizer_vocab_size, args.block_size, args.validation_share)
        shards = call_main_process_first(accelerator, lambda: load_built_in_text(name, folder, *recipe))
        data = build_shuffled_data(shards, config, args.eval_tokens)
        if name == STORIES:
            data.stories = held_out_stories(shards.manifest["validation_share"])
    else:
        source = hub_source(
            args.dataset_name, args.dataset_config_name, "train", args.dataset_revision, args.text_column
        )
        tokenizer = load_tokenizer(args.tokenizer or "gpt2")
        with TemporaryDirectory() as folder:
            save_tokenizer(tokenizer, Path(folder))  # if it cannot be saved, the run must not find out at a checkpoint
        data = build_streamed_data(source, tokenizer, config, args.validation_share, args.eval_tokens)
    if args.overfit_one_batch:
        data.summary += f"; every step trains on the same {args.sequences_per_step:,} sequences of them"
    errors = InputErrors()
    for prompt in args.sample_prompts:
        errors.capture(check_prompt, prompt, data.tokenizer, args.block_size)
    errors.raise_if_any()
    return data


def pin_addresses(accelerator: Accelerator, names: list[str]) -> dict[str, str]:
    """Folder or address -> itself, or if it is on the Hub, the address with the commit that all processes then open.

    Raises:
        ValueError: If the Hub has no such dataset, or cannot be reached.
    """
    if not any(map(is_on_hub, names)):
        return {name: name for name in names}
    from modeling_gpt2repro.data.shards.hub_shards import pin_address

    return run_on_main_and_broadcast(
        accelerator, lambda: {name: pin_address(name) if is_on_hub(name) else name for name in names}
    )


def pin_mix(accelerator: Accelerator, mix: str) -> str:
    """The mix with the commits of what is on the Hub."""
    shares = parse_mix(mix)
    pinned = pin_addresses(accelerator, list(shares))
    return ",".join(f"{pinned[name]}:{share}" for name, share in shares.items())


def set_lengths(args: TrainArguments, accelerator: Accelerator, data: TrainingData):
    """Derive from the size of the data what the arguments leave open.

    Raises:
        ValueError: If the epochs are less than one step.
    """
    if args.train_tokens is None:
        sequences = sum(size for _, size in folder_sizes(args, data.batches).values())
        args.set_lengths(tokens_per_epoch=sequences * args.block_size)
    warn_of_slow_cpu(args, accelerator, len(data.tokenizer))


def folder_sizes(args: TrainArguments, batches: TrainingBatches) -> dict[str, tuple[float, int]]:
    """Folder -> (share of the training, number of sequences); empty for a stream, whose size is not known."""
    if isinstance(batches, MixedBatches):
        sizes = map(len, batches.sources)
        return {folder: (share, size) for (folder, share), size in zip(parse_mix(args.mix).items(), sizes, strict=True)}
    size = batches.sequences_per_epoch
    return {} if size is None else {args.shards or args.dataset_name: (1.0, size)}


def epochs_of_run(args: TrainArguments, batches: TrainingBatches) -> dict[str, float]:
    """Folder -> how often the whole run reads it; empty for a stream."""
    steps = 1 if args.overfit_one_batch else args.total_steps  # with different data
    sequences = steps * args.sequences_per_step
    return {folder: share * sequences / size for folder, (share, size) in folder_sizes(args, batches).items()}
