"""Open what the arguments name: the Hub, weights, HellaSwag, data, the logger; and close the run at its end."""

import gc
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro.data.batches.build import (
    TrainingBatches,
    TrainingData,
    build_mixed_data,
    build_shuffled_data,
    build_streamed_data,
    load_python_prose,
    saved_order,
)
from modeling_gpt2repro.data.batches.mixture import MixedBatches, parse_mix
from modeling_gpt2repro.data.batches.sequences import validation_batches
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources.resolve import PYTHON_PROSE, hub_source
from modeling_gpt2repro.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_sha256
from modeling_gpt2repro.evaluation.generation import check_prompt
from modeling_gpt2repro.evaluation.hellaswag.examples import PROTOCOLS, Example, load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.metrics import BASELINES
from modeling_gpt2repro.evaluation.hellaswag.score import without_autocast
from modeling_gpt2repro.evaluation.hellaswag.tokenize import HellaSwagTask, prepare_hellaswag
from modeling_gpt2repro.evaluation.load_model import check_tied_weights
from modeling_gpt2repro.evaluation.validation import unigram_entropy
from modeling_gpt2repro.evaluation.validation_text import bytes_per_token
from modeling_gpt2repro.hub.background_upload import UploadQueue
from modeling_gpt2repro.hub.conversion import load_gpt2
from modeling_gpt2repro.hub.model_card import FROM_SCRATCH, Origin, derived_origin
from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro.runs.config import diff_arguments, write_run_config
from modeling_gpt2repro.runs.folder import BASELINES_FILE, DATA_FOLDER, METRICS_FILE, MODEL_FOLDER, RUN_CONFIG_FILE
from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import MetricsLog
from modeling_gpt2repro.runs.read import write_baselines
from modeling_gpt2repro.runtime.collectives import call_main_process_first, run_on_main_and_broadcast
from modeling_gpt2repro.runtime.command_line import InputErrors
from modeling_gpt2repro.runtime.hardware import flops_and_peak, hardware_record
from modeling_gpt2repro.runtime.signals import StopSignal
from modeling_gpt2repro.storage.lock import FolderLock
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.state import TrainState
from modeling_gpt2repro.training.validate import check_output_dir, check_sizes

from .checkpointing import unwrapped_model
from .messages import (
    finished_message,
    learning_rate_message,
    start_message,
    too_many_skipped_message,
    warn_of_slow_cpu,
)

SHAPE = ("n_layer", "n_head", "n_embd")


@dataclass(frozen=True)
class InitialWeights:
    """What a run starts from."""

    checkpoint: Path | None  # the folder to resume from; None for a new run
    model: GPT2ReproForCausalLM | None  # the weights of the checkpoint or of `--init_from`; None for fresh ones
    tokenizer: PreTrainedTokenizerBase | None  # that of `--init_from`
    origin: Origin  # where they come from, for the model card


def lock_output_dir(args: TrainArguments, accelerator: Accelerator, lock: FolderLock):
    """Lock the run's folder, on the main process, before anything is written or deleted in it.

    Raises:
        ValueError: On all processes, if another program is using it, or a run was begun there while this one waited.
        SystemExit: With code 130, if Ctrl-C ends the wait.
    """

    def acquire():
        lock.acquire()
        InputErrors(check_output_dir(args)).raise_if_any()

    try:
        run_on_main_and_broadcast(accelerator, acquire)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def build_upload_queue(args: TrainArguments, accelerator: Accelerator) -> UploadQueue:
    """Build what pushes to the Hub, on the main process, after a trial of whether it can.

    Raises:
        ValueError: If it cannot, or the Hub is unreachable and the run has not begun yet.
    """
    output_dir = Path(args.output_dir)
    if not args.push_to_hub or not accelerator.is_main_process:
        uploads = UploadQueue(None, "end", output_dir)
    else:
        uploads = UploadQueue(args.hub_repository, args.hub_strategy, output_dir, args.hub_private_repo)
    if args.push_to_hub:
        is_resume = (output_dir / RUN_CONFIG_FILE).exists()
        message = run_on_main_and_broadcast(accelerator, lambda: uploads.check_access(is_resume))
        accelerator.print(f"Hub          {message}")
    return uploads


def load_initial_weights(args: TrainArguments, accelerator: Accelerator) -> InitialWeights:
    """Load the checkpoint to resume from, or else the model of `--init_from`, if there is either.

    Raises:
        ValueError: If it is damaged, not a GPT-2, untied although its config says tied, or of another shape than the
            arguments' (see `take_shape`).
    """
    checkpoint = find_checkpoint(args, accelerator)
    model, tokenizer, origin = None, None, FROM_SCRATCH
    if checkpoint is not None:
        with checkpoints.raise_if_corrupt(checkpoint):
            model = GPT2ReproForCausalLM.from_pretrained(checkpoint)
    elif args.init_from:
        model, tokenizer = call_main_process_first(accelerator, lambda: load_gpt2(args.init_from))
        origin = derived_origin("A GPT-2 fine-tuned from", args.init_from)
    if model is not None:
        check_tied_weights(model, str(checkpoint or args.init_from))
        take_shape(args, model, source=str(checkpoint or args.init_from))
        model = model.float()  # whatever it was saved in: bf16 has 8 bits, too few to add a small update to a weight
    return InitialWeights(checkpoint, model, tokenizer, origin)


def find_checkpoint(args: TrainArguments, accelerator: Accelerator) -> Path | None:
    """The folder that `--resume_from_checkpoint` names, every file of it verified; damaged ones are reported."""
    output_dir = Path(args.output_dir)
    checkpoint, damaged = run_on_main_and_broadcast(
        accelerator, lambda: checkpoints.find_resume_checkpoint(args.resume_from_checkpoint, output_dir)
    )
    for sentence in damaged:
        accelerator.print(sentence)
    if checkpoint is not None and not checkpoint.is_dir():  # this is another machine, with a cache of its own
        checkpoint = checkpoints.open_named_checkpoint(args.resume_from_checkpoint)
    return checkpoint


def take_shape(args: TrainArguments, model: GPT2ReproForCausalLM, source: str):
    """Take the shape and context that the arguments leave open from the loaded model.

    Raises:
        ValueError: If the arguments name another shape, or a context longer than the model's.
    """
    shape = {name: getattr(model.config, name) for name in SHAPE}
    for name, size in {**shape, "block_size": model.config.n_positions}.items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if any(getattr(args, name) != size for name, size in shape.items()):
        flags = " ".join(f"--{name} {size}" for name, size in shape.items())
        raise ValueError(f"{source} has another shape than was asked for: give {flags}.")
    if args.block_size > model.config.n_positions:
        raise ValueError(
            f"block_size ({args.block_size}) must be at most the {model.config.n_positions} positions of {source}."
        )
    InputErrors(check_sizes(args)).raise_if_any()


def check_model(
    args: TrainArguments,
    model: GPT2ReproForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    init_tokenizer: PreTrainedTokenizerBase | None,
):
    """Set the attention implementation, and compare the tokenizers of the data and of `--init_from`.

    Raises:
        ValueError: If the attention implementation is not installed, or the tokenizers give different ids.
    """
    if init_tokenizer is not None and tokenizer_sha256(init_tokenizer) != tokenizer_sha256(tokenizer):
        raise ValueError(
            f"init_from ({args.init_from}) has another tokenizer than the data: prepare the data with --tokenizer "
            f"{args.init_from}."
        )
    try:
        model.set_attn_implementation(args.attn_implementation)
    except ImportError as error:
        raise ValueError(f"attn_implementation ({args.attn_implementation}) is not installed: {error}") from error


def data_order(start: InitialWeights | None) -> str:
    """The `BatchConfig.order` of the run: keyed, unless it resumes a run that began in another order."""
    if start is None or start.checkpoint is None:
        return BatchConfig.order
    return saved_order(checkpoints.read_entry(start.checkpoint, "identity"))


def load_data(args: TrainArguments, accelerator: Accelerator, start: InitialWeights | None) -> TrainingData | None:
    """Open prepared shards, a mix of several folders, the text that Python ships, or a Hub dataset to stream.

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
    )
    if args.shards is not None:
        data = build_shuffled_data(open_shards(args.shards), config)
    elif args.mix is not None:
        data = build_mixed_data(parse_mix(args.mix), config, args.eval_tokens)
    elif args.dataset_name == PYTHON_PROSE:
        folder = Path(args.output_dir) / DATA_FOLDER
        recipe = (args.tokenizer_vocab_size, args.block_size, args.validation_share)
        shards = call_main_process_first(accelerator, lambda: load_python_prose(folder, *recipe))
        data = build_shuffled_data(shards, config)
    else:
        source = hub_source(
            args.dataset_name, args.dataset_config_name, "train", args.dataset_revision, args.text_column
        )
        tokenizer = load_tokenizer(args.tokenizer or "gpt2")
        with TemporaryDirectory() as folder:
            save_tokenizer(tokenizer, Path(folder))  # if it cannot be saved, the run must not find out at a checkpoint
        data = build_streamed_data(source, tokenizer, config, args.validation_share, args.eval_tokens)
    errors = InputErrors()
    for prompt in args.sample_prompts:
        errors.capture(check_prompt, prompt, data.tokenizer, args.block_size)
    errors.raise_if_any()
    return data


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
    sequences = args.total_steps * args.sequences_per_step
    return {folder: share * sequences / size for folder, (share, size) in folder_sizes(args, batches).items()}


def load_hellaswag_examples(args: TrainArguments, accelerator: Accelerator) -> list[Example]:
    """Load HellaSwag's validation examples; empty if switched off or, with a message, if it cannot be reached."""
    if args.hellaswag == "none":
        return []
    examples = []
    try:
        examples = call_main_process_first(accelerator, lambda: load_hellaswag(args.hellaswag))
    except ConnectionError as error:
        accelerator.print(f"HellaSwag is left out (--hellaswag {args.hellaswag}): {error}")
    # All processes score or none does: one that found nothing would keep the others waiting.
    total = accelerator.reduce(torch.tensor(len(examples), device=accelerator.device), reduction="sum")
    return examples if int(total) == len(examples) * accelerator.num_processes else []


def prepare_hellaswag_task(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> HellaSwagTask | None:
    """Tokenize this process's share of the examples, once for all evaluations; None without examples."""
    if not examples:
        return None
    module = unwrapped_model(accelerator, model)
    with without_autocast(module):
        return prepare_hellaswag(
            module,
            tokenizer,
            examples,
            protocols=PROTOCOLS,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )


def leave_finished_run(
    args: TrainArguments, accelerator: Accelerator, data: TrainingData, uploads: UploadQueue, state: TrainState
) -> int:
    """Print that nothing is left to do, and push the model if the Hub still lacks it; returns the exit code."""
    accelerator.print(finished_message(args, state))
    with closing(data.batches), closing(uploads), StopSignal() as stop:
        model_folder = Path(args.output_dir) / MODEL_FOLDER
        return uploads.push_final(model_folder, accelerator.print, lambda: stop.signal_name is not None)


def build_logger(
    args: TrainArguments,
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    state: TrainState,
    checkpoint: Path | None,
) -> RunLogger:
    """Build the logger, write run.json, and say which arguments have changed since the run, or `checkpoint`, began."""
    output_dir = Path(args.output_dir)
    changed = diff_arguments(output_dir, asdict(args))
    for name, (then, now) in changed.items():
        accelerator.print(f"This run began with {name} {then} and continues with {now}.")
    schedule = checkpoints.read_entry(checkpoint, "schedule", {}) if checkpoint is not None else {}
    if message := learning_rate_message(schedule, asdict(args), state.step):
        accelerator.print(message)
    resumed_step = state.step if args.resume_from_checkpoint and not args.preflight else None
    log = MetricsLog(output_dir, resumed_step, enabled=accelerator.is_main_process, changed=changed)
    if args.report_to != "none" and not args.preflight:
        # TensorBoard takes no lists.
        scalars = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in asdict(args).items()}
        accelerator.init_trackers("gpt2repro", config=scalars)
    if accelerator.is_main_process and not args.preflight:
        checkpoints.remove_stale_files(output_dir)
        write_run_config(output_dir, asdict(args), hardware_record(accelerator), data.data_fingerprint)

    def on_skipped(step: int):
        """Log the sequences of a step whose update was skipped; stop the run when too many are skipped in a row."""
        sample_ids = gather_object([data.batches.sample_ids(step - 1)])
        logger.print(f"step {step:>6}: skipped, its loss or gradient norm is not usable; its sequences: {METRICS_FILE}")
        logger.record(step, {"event": "skipped", "rows_by_process": sample_ids})
        if state.record_skip(step) >= args.max_skipped:
            raise SystemExit(too_many_skipped_message(args, state) if accelerator.is_main_process else 1)

    flops_per_token, peak_flops = flops_and_peak(unwrapped_model(accelerator, model), args.block_size, accelerator)
    logger = RunLogger(
        accelerator,
        log,
        total_steps=args.total_steps,
        tokens_per_step=args.tokens_per_step,
        logging_steps=args.logging_steps,
        first_step=state.step,
        on_skipped=on_skipped,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops,
        train_seconds=state.train_seconds,
    )
    return logger


def log_run_summary(
    args: TrainArguments, accelerator: Accelerator, model: nn.Module, data: TrainingData, step: int, logger: RunLogger
):
    """Print what will happen, and write what the losses are to be compared with into the run's folder."""
    with logger.untimed():
        vocab_size = len(data.tokenizer)
        batches = validation_batches(data.validation, args.eval_tokens, micro_batch_size=64)
        baselines = {
            "guessing evenly, ln(vocabulary)": math.log(vocab_size),  # the loss of the first step, if all is well
            "guessing by frequency, unigram entropy": unigram_entropy(batches, vocab_size),
        }
        if accelerator.is_main_process and not args.preflight:
            with logger.warn_on_io_error(step, BASELINES_FILE):
                write_baselines(Path(args.output_dir), baselines, BASELINES)
        module = unwrapped_model(accelerator, model)
        shape = data.batches.micro_batch_shape
        epochs = epochs_of_run(args, data.batches)
        logger.print(start_message(args, accelerator, module, data.summary, shape, epochs, baselines, step))


def validation_bytes_per_token(args: TrainArguments, data: TrainingData) -> float:
    """UTF-8 bytes per token of the validation text, which make bits per byte of a loss in nats per token."""
    return bytes_per_token(data.validation.shards, data.tokenizer, args.eval_tokens, args.block_size)


def shutdown(accelerator: Accelerator, exit_code: int):
    """Close the trackers and the process group, and leave with the exit code, if it is not 0.

    The caller must have dropped model and optimizer: DDP has to go before the process group. As the last to hold the
    group, it would end the group's threads while it keeps them from running Python, and one of them may have a tensor
    to free (torch 2.13 with gloo: 3 of 9 runs hung on a busy core).
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    if exit_code:
        raise SystemExit(exit_code)
