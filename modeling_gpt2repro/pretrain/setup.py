"""Open what a run needs besides weights and data: its folder, the Hub, HellaSwag, the logger; and close it."""

import gc
import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro.data.batches.build import TrainingData
from modeling_gpt2repro.data.batches.sequences import validation_batches
from modeling_gpt2repro.evaluation.hellaswag.examples import PROTOCOLS, Example, load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.metrics import BASELINES
from modeling_gpt2repro.evaluation.hellaswag.score import without_autocast
from modeling_gpt2repro.evaluation.hellaswag.tokenize import HellaSwagTask, prepare_hellaswag
from modeling_gpt2repro.evaluation.stories import story_floor
from modeling_gpt2repro.evaluation.validation import unigram_entropy
from modeling_gpt2repro.evaluation.validation_text import bytes_per_token
from modeling_gpt2repro.hub.background_upload import UploadQueue
from modeling_gpt2repro.runs.config import diff_arguments, write_run_config
from modeling_gpt2repro.runs.folder import BASELINES_FILE, METRICS_FILE, MODEL_FOLDER, RUN_CONFIG_FILE, STOPPED_FILE
from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import MetricsLog
from modeling_gpt2repro.runs.read import STORY_FLOOR, write_baselines
from modeling_gpt2repro.runs.reference import GPT2_LABEL, gpt2_loss_of_shards
from modeling_gpt2repro.runtime.collectives import call_main_process_first, run_on_main_and_broadcast
from modeling_gpt2repro.runtime.command_line import InputErrors, report_to_launcher
from modeling_gpt2repro.runtime.hardware import flops_and_peak, hardware_record
from modeling_gpt2repro.runtime.progress import escape_controls
from modeling_gpt2repro.runtime.signals import EXIT_CODE, StopSignal, public_command
from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.lock import FolderLock
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.state import TrainState
from modeling_gpt2repro.training.validate import check_output_dir

from .attention import attention_record
from .checkpointing import unwrapped_model
from .messages import (
    finished_message,
    learning_rate_message,
    start_message,
    stopped_message,
    too_many_skipped_message,
)
from .open_data import epochs_of_run

REQUEUE_FILE = "GPT2REPRO_REQUEUE_FILE"  # names a file that asks accelerate_configs/slurm.sbatch for another start


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
        uploads = UploadQueue(
            args.hub_repository,
            args.hub_strategy,
            output_dir,
            args.hub_private_repo,
            args.hub_wait_seconds,
            stock_twin=args.stock_twin,
        )
    if args.push_to_hub:
        is_resume = (output_dir / RUN_CONFIG_FILE).exists()
        message = run_on_main_and_broadcast(accelerator, lambda: uploads.check_access(is_resume))
        accelerator.print(f"Hub          {message}")
    return uploads


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
    """Tokenize this process's share of the examples, once for all evaluations; None without examples.

    Args:
        model: Unwrapped.
    """
    if not examples:
        return None
    with without_autocast(model):
        return prepare_hellaswag(
            model,
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


def leave_stopped_run(
    args: TrainArguments, accelerator: Accelerator, stop: StopSignal, step: int, steps_made: int, logger: RunLogger
) -> int:
    """Say why the run stopped after `step`, also in STOPPED_FILE; returns the exit code. All processes must call this.

    Args:
        steps_made: Since this start. Without any, a job that queues again might do so forever.
    """
    problem, by_signal = None, False
    for of_process in gather_object([(stop.problem, stop.signal_name is not None)]):
        problem, by_signal = problem or of_process[0], by_signal or of_process[1]
    message = stopped_message(stop, None if by_signal else problem, step)
    logger.print(message)
    report_to_launcher(message)
    if accelerator.is_main_process:
        marker = {"step": step, "steps_made": steps_made, "by_signal": by_signal, "message": message.strip()}
        logger.write_file(STOPPED_FILE, lambda: write_json(Path(args.output_dir) / STOPPED_FILE, marker))
        if REQUEUE_FILE in os.environ and steps_made and not by_signal:
            requeue_file = Path(os.environ[REQUEUE_FILE])
            logger.write_file(requeue_file.name, lambda: requeue_file.write_text(message, encoding="utf-8"))
    accelerator.wait_for_everyone()  # a process that left now would have the launcher end the others
    return EXIT_CODE


def build_logger(
    args: TrainArguments,
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    state: TrainState,
    checkpoint: Path | None,
    attention_message: str | None,
) -> RunLogger:
    """Build the logger, write run.json, and say which arguments have changed since the run, or `checkpoint`, began."""
    output_dir = Path(args.output_dir)
    if attention_message is not None:
        accelerator.print(attention_message)
    hardware = hardware_record(accelerator)
    command = public_command(accelerator.device)
    changed = {} if args.certify else diff_arguments(output_dir, asdict(args), hardware, command)
    for name, (then, now) in changed.items():
        if name != "command":  # its flags are named one by one
            accelerator.print(escape_controls(f"This run began with {name} {then} and continues with {now}."))
    schedule = checkpoints.read_state(checkpoint)["schedule"] if checkpoint is not None else {}
    if message := learning_rate_message(schedule, asdict(args), state.step):
        accelerator.print(message)
    resumed_step = state.step if args.resume_from_checkpoint and not args.is_trial else None
    log = MetricsLog(output_dir, resumed_step, enabled=accelerator.is_main_process, changed=changed)
    if args.report_to != "none" and not args.is_trial:
        # TensorBoard takes no lists.
        scalars = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in asdict(args).items()}
        accelerator.init_trackers("gpt2repro", config=scalars)
    if accelerator.is_main_process and not args.is_trial:
        checkpoints.remove_stale_files(output_dir)
        (output_dir / STOPPED_FILE).unlink(missing_ok=True)
        attention = attention_record(args, accelerator, unwrapped_model(accelerator, model).config)
        write_run_config(
            output_dir, asdict(args), hardware, attention, data.data_fingerprint, command, data.contamination
        )

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
    args: TrainArguments,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    data: TrainingData,
    step: int,
    logger: RunLogger,
):
    """Print what will happen, and write what the losses are to be compared with into the run's folder."""
    with logger.untimed():
        vocab_size = len(data.tokenizer)
        batches = validation_batches(data.validation, args.eval_tokens, micro_batch_size=64)
        baselines = {
            "guessing evenly, ln(vocabulary)": math.log(vocab_size),  # the loss of the first step, if all is well
            "guessing by frequency, unigram entropy": unigram_entropy(batches, vocab_size),
        }
        if data.stories:
            baselines[STORY_FLOOR] = story_floor(data.stories) / args.block_size  # a sequence is a story
        if args.shards and (loss := gpt2_loss_of_shards(args.shards, data.data_fingerprint["data"])) is not None:
            baselines[GPT2_LABEL] = loss
        if accelerator.is_main_process and not args.is_trial:
            logger.write_file(BASELINES_FILE, lambda: write_baselines(Path(args.output_dir), baselines, BASELINES))
        module = unwrapped_model(accelerator, model)
        shape = data.batches.micro_batch_shape
        epochs = epochs_of_run(args, data.batches)
        logger.print(start_message(args, accelerator, module, optimizer, data.summary, shape, epochs, baselines, step))


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
