"""Train a GPT-2 from scratch.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --preset quickstart
    accelerate launch --config_file accelerate_configs/8xa100.yaml train_accelerate.py

The first takes minutes on a laptop and downloads nothing; the second reproduces GPT-2 124M on 10 B tokens of
FineWeb-Edu. Both end with a folder that `from_pretrained` and `pipeline` load.
"""

import gc
import math
import shutil
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_compiled_module
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.batches.build import (
    TrainingData,
    build_mixed_data,
    build_shuffled_data,
    build_streamed_data,
    load_python_prose,
)
from modeling_gpt2repro.data.batches.mixture import parse_mix
from modeling_gpt2repro.data.batches.sequences import validation_batches
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources.resolve import PYTHON_PROSE, hub_source
from modeling_gpt2repro.data.tokenizer import load_tokenizer, tokenizer_sha256
from modeling_gpt2repro.evaluation.distributed import (
    evaluate_hellaswag,
    hellaswag_accuracies,
    validation_loss,
    without_autocast,
)
from modeling_gpt2repro.evaluation.generation import check_prompt, sample_continuations
from modeling_gpt2repro.evaluation.hellaswag.examples import PROTOCOLS, Example, load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.metrics import BASELINES
from modeling_gpt2repro.evaluation.hellaswag.samples import write_results
from modeling_gpt2repro.evaluation.hellaswag.tokenize import HellaSwagTask, prepare_hellaswag
from modeling_gpt2repro.evaluation.validation import unigram_entropy, validation_numbers
from modeling_gpt2repro.evaluation.validation_text import bytes_per_token
from modeling_gpt2repro.hub.background_upload import UploadQueue
from modeling_gpt2repro.hub.conversion import load_gpt2
from modeling_gpt2repro.hub.export import save_hub_folder
from modeling_gpt2repro.hub.model_card import base_model_sentence
from modeling_gpt2repro.pretrain.batch_size import find_batch_size
from modeling_gpt2repro.pretrain.messages import (
    cannot_save_message,
    end_message,
    explain_oom,
    start_message,
    too_many_skipped_message,
    unusable_steps_message,
    warn_of_slow_cpu,
)
from modeling_gpt2repro.pretrain.preflight import StepTimings, preflight_report, time_steps
from modeling_gpt2repro.runs.config import diff_config, make_writable, write_run_config
from modeling_gpt2repro.runs.figures import plot_loss
from modeling_gpt2repro.runs.logger import Monitor
from modeling_gpt2repro.runs.metrics import MetricsLog
from modeling_gpt2repro.runs.read import write_yardsticks
from modeling_gpt2repro.runtime.accelerator import (
    build_accelerator,
    call_main_process_first,
    nondeterministic,
    run_on_main_and_broadcast,
)
from modeling_gpt2repro.runtime.command_line import InputErrors, exit_on_input_error, parse_command_line
from modeling_gpt2repro.runtime.fsdp import is_sharded, load_full_state_dict
from modeling_gpt2repro.runtime.hardware import flops_and_peak, hardware_record, peak_memory_gb
from modeling_gpt2repro.runtime.signals import EXIT_CODE, StopRequest
from modeling_gpt2repro.storage.atomic import replace_dir
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.optimizer_state import load_optimizer, load_random, optimizer_tensors, random_tensors
from modeling_gpt2repro.training.outliers import OutlierDetector
from modeling_gpt2repro.training.presets import PRESETS
from modeling_gpt2repro.training.schedule import learning_rate_at, set_learning_rate
from modeling_gpt2repro.training.state import TimedIterator, TrainState, is_due
from modeling_gpt2repro.training.step import StepMetrics, train_step
from modeling_gpt2repro.training.validate import RUN_RECORD

FAILED_SAVES = 3  # in a row, after which a run stops
TRIES_OF_THE_LAST_SAVE, SECONDS_BETWEEN_TRIES = 20, 30  # ten minutes in which a person may make room
EVALUATED_PART = 100  # HellaSwag's rows, and batches of validation, from which a preflight reckons an evaluation


def main(argv: list[str] | None = None):
    """One training run, from the command line to the folder that talks.

    Below stand what it shares, what happens in it, how its parts are opened, and the preflight.
    """
    args = parse_command_line(TrainArguments, argv, PRESETS, __doc__)  # field default < preset < command line
    with exit_on_input_error():
        accelerator = build_accelerator(args)
        run = open_run(args, accelerator)
    progress = run.progress
    if args.preflight:
        return preflight(run)
    with closing(run.data.batches), closing(run.monitor), closing(run.pushes), run.stop, explain_oom(args):
        introduce(run)
        while progress.step < args.total_steps and not run.stop.should_stop():
            if is_due(progress.step, args.eval_steps):
                evaluate(run)
            train(run)
            if is_due(progress.step, args.save_steps) and progress.step < args.total_steps:
                save(run)
        if progress.step < args.total_steps:
            leave(run)
        save(run, must=True)
        evaluate(run)  # the weights that were saved
        run.monitor.say(end_message(args, progress, export(run)))
        code = publish(run)
    end(run, code)


@dataclass
class TrainingRun:
    """Everything a run consists of: what its functions below share."""

    args: TrainArguments
    accelerator: Accelerator
    data: TrainingData
    hellaswag: HellaSwagTask | None
    model: nn.Module | None
    optimizer: Optimizer | None
    progress: TrainState
    guard: OutlierDetector
    monitor: Monitor
    pushes: UploadQueue
    origin: str  # where the weights come from, for the model card
    saved_step: int | None  # the last step whose checkpoint stands in the run's folder; 0 needs none
    stop: StopRequest = field(default_factory=StopRequest)
    failed_saves: int = 0  # in a row
    yardsticks: dict[str, float] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.args.output_dir)

    @property
    def bare_model(self) -> GPT2ReproForCausalLM:
        """The model without compile and DDP, autocast kept: ragged evaluation batches recompile nothing."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @cached_property
    def bytes_per_token(self) -> float:
        """Of the validation text that is scored; decoded once."""
        rows = self.data.validation
        return bytes_per_token(rows.shards, self.data.tokenizer, self.args.eval_tokens, rows.block_size)

    def whole_model(self, device: torch.device | str, keep: bool = True) -> GPT2ReproForCausalLM:
        """The bare model; where its parameters are spread over processes, a copy on the device that has them all.

        Args:
            keep: Whether this process needs it; all must ask.
        """
        if not is_sharded(self.bare_model):
            return self.bare_model
        with torch.device("meta"):
            whole = GPT2ReproForCausalLM(self.bare_model.config)
        load_full_state_dict(whole, self.bare_model, keep, device)
        whole.tie_weights()
        return whole

    def model_to_save(self) -> GPT2ReproForCausalLM:
        """The whole model, on the process that writes it, without taking memory from the training."""
        return self.whole_model("cpu", keep=self.accelerator.is_main_process)


def introduce(run: TrainingRun):
    """Say what will happen, and what the losses are to be measured by."""
    args, accelerator, vocab_size = run.args, run.accelerator, run.bare_model.config.vocab_size
    run.yardsticks = {
        "guessing evenly, ln(vocabulary)": math.log(vocab_size),
        "guessing by frequency, unigram entropy": unigram_entropy(
            validation_batches(run.data.validation, args.eval_tokens, micro_batch_size=64), vocab_size
        ),
    }
    if accelerator.is_main_process and not args.preflight:
        with run.monitor.warn_on_io_error("yardsticks.json"):
            write_yardsticks(run.output_dir, run.yardsticks, BASELINES)
    shape, step = run.data.batches.micro_batch_shape, run.progress.step
    with run.monitor.apart():
        run.monitor.say(start_message(args, accelerator, run.bare_model, run.data.summary, shape, run.yardsticks, step))


def train(run: TrainingRun):
    """One optimizer step, logged and shown; and what was pushed meanwhile."""
    note_skipped(run, run.monitor.trained(*take_step(run)))
    for sentence in run.pushes.news():
        run.monitor.say(sentence)


def take_step(run: TrainingRun) -> tuple[StepMetrics, float, float]:
    """One optimizer step at the rate of its number; its numbers, the rate, and how long it waited for data."""
    args, progress, optimizer = run.args, run.progress, run.optimizer
    learning_rate = learning_rate_at(
        progress.step, args.total_steps, args.warmup_steps, args.learning_rate, args.final_learning_rate_ratio
    )
    set_learning_rate(optimizer, learning_rate)
    micro_batches = TimedIterator(run.data.batches.micro_batches(progress.step))
    limits = (args.tokens_per_step, args.max_grad_norm, run.guard)
    numbers = train_step(run.accelerator, run.model, optimizer, micro_batches, *limits)
    progress.advance(args.tokens_per_step)
    return numbers, learning_rate, micro_batches.seconds


def evaluate(run: TrainingRun):
    """Validation loss, HellaSwag and samples of the model as it is, logged and shown; less, if the run is to stop."""
    args, accelerator = run.args, run.accelerator
    note_skipped(run, run.monitor.read())
    with run.monitor.apart():
        started, module = time.perf_counter(), run.whole_model(accelerator.device)
        micro_batch_size = args.per_device_eval_batch_size or args.per_device_train_batch_size
        batches = run.data.validation_batches(args.eval_tokens, micro_batch_size)
        with accelerator.autocast():  # which a copy of a sharded model does not bring along
            loss, tokens = validation_loss(accelerator, module, batches)
        numbers = {**validation_numbers(loss, run.bytes_per_token), "validation_tokens": tokens}
        if run.hellaswag and not run.stop.should_stop():
            accuracies, results = evaluate_hellaswag(accelerator, module, run.hellaswag)
            numbers |= accuracies
            if accelerator.is_main_process:
                with run.monitor.warn_on_io_error("hellaswag.jsonl"):
                    write_results(run.output_dir / "hellaswag.jsonl", results, run.hellaswag.rows)
        numbers["evaluation_seconds"] = time.perf_counter() - started
        run.monitor.evaluated(numbers)
        if args.num_samples and accelerator.is_main_process and not run.stop.signal_name:
            lengths = (args.num_samples, args.sample_tokens, args.seed)
            with accelerator.autocast():
                texts = sample_continuations(module, run.data.tokenizer, args.sample_prompts, *lengths)
            for prompt, of_prompt in zip(args.sample_prompts, texts, strict=True):
                run.monitor.sampled(prompt, of_prompt)
        if accelerator.is_main_process:
            with run.monitor.warn_on_io_error("loss.png"):
                plot_loss(run.output_dir)
        accelerator.wait_for_everyone()


def note_skipped(run: TrainingRun, steps: list[int]):
    """Log the rows of steps whose update was skipped, and stop where too many come in a row."""
    for step in steps:
        rows = gather_object([run.data.batches.sample_ids(step - 1)])
        run.monitor.say(f"step {step:>6}: skipped, its loss or gradient norm is not usable; its rows: metrics.jsonl")
        run.monitor.record({"event": "skipped", "rows_by_process": rows}, step)
        if run.progress.skipped(step) >= run.args.max_skipped:
            raise SystemExit(too_many_skipped_message(run.args, run.progress) if run.accelerator.is_main_process else 1)


def save(run: TrainingRun, must: bool = False):
    """A checkpoint: a Hub folder that the run can go on from.

    Args:
        must: No later one makes up for it: where it fails it is tried again for some minutes, then the run ends.
    """
    accelerator, progress = run.accelerator, run.progress
    note_skipped(run, run.monitor.read())
    if run.saved_step == progress.step:
        return
    with run.monitor.apart():
        if not must and progress.last_skipped == progress.step:
            run.monitor.say(f"step {progress.step:>6}: no checkpoint, because this step was skipped")
            return
        started = time.perf_counter()
        keep = checkpoints.RetentionPolicy(run.args.save_total_limit, run.args.keep_every)
        folder = run.output_dir / checkpoints.checkpoint_name(progress.step)
        problem = write_checkpoint(run, folder, keep)
        run.monitor.record({"save_seconds": time.perf_counter() - started})
    run.failed_saves = run.failed_saves + 1 if problem else 0
    if not problem:
        run.saved_step = progress.step
        run.pushes.offer(folder)
    else:
        run.monitor.say(f"step {progress.step:>6}: no checkpoint ({problem}); the one before stays")
        run.pushes.make_room()
        if run.failed_saves >= (TRIES_OF_THE_LAST_SAVE if must else FAILED_SAVES):
            raise SystemExit(cannot_save_message(run.args, problem) if accelerator.is_main_process else 1)
        if must:
            run.monitor.say(f"It is tried again every {SECONDS_BETWEEN_TRIES} s: make room in {run.output_dir}.")
            time.sleep(SECONDS_BETWEEN_TRIES)
            save(run, must)


def write_checkpoint(run: TrainingRun, folder: Path, keep: checkpoints.RetentionPolicy) -> str | None:
    """Write everything that a run goes on from; why it could not be written, if so."""
    accelerator, module = run.accelerator, run.model_to_save()
    state = {
        "progress": run.progress.state_dict(),
        "data": checkpoints.join_states(gather_object([run.data.batches.state_dict()])),
        "guard": run.guard.state_dict(),
        "origin": run.origin,
        "identity": run.data.data_fingerprint,
    }
    return checkpoints.save_checkpoint(
        accelerator,
        folder,
        lambda folder: save_hub_folder(module, run.data.tokenizer, folder, run.origin, run.output_dir),
        optimizer_tensors(run.bare_model, run.optimizer, keep=accelerator.is_main_process),
        random_tensors(accelerator),
        state,
        keep,
    )


def leave(run: TrainingRun):
    """End early, as a signal asked for, with a checkpoint and the command that goes on."""
    save(run, must=True)
    by = run.stop.signal_name or "a signal to another process"
    command = run.stop.resume_command
    run.monitor.say(f"\nStopped by {by} after step {run.progress.step}. Go on with:\n\n    {command}\n")
    run.accelerator.wait_for_everyone()
    end(run, EXIT_CODE)


def export(run: TrainingRun) -> Path:
    """The final model: the last checkpoint's Hub folder without the training state."""
    module, folder, aside = run.model_to_save(), run.output_dir / "model", run.output_dir / ".model.partial"
    if run.accelerator.is_main_process:
        try:
            save_hub_folder(module, run.data.tokenizer, aside, run.origin, run.output_dir)
            numbers = run.monitor.log.path  # which its card draws on
            shutil.copyfile(numbers, aside / numbers.name)
            replace_dir(aside, folder)
        except (OSError, SafetensorError) as error:
            raise SystemExit(cannot_save_message(run.args, str(error))) from error
    run.accelerator.wait_for_everyone()
    return folder


def publish(run: TrainingRun) -> int:
    """Push the final model, if that was asked for; returns the exit code, which is not 0 where it is not on the Hub."""
    return run.pushes.finish(run.output_dir / "model", run.monitor.say, lambda: run.stop.signal_name is not None)


def end(run: TrainingRun, code: int = 0):
    """Close the trackers, let the processes part, and leave with the exit code if there is one.

    DDP goes before the process group: as the last to hold it, it would end the group's threads while it keeps them from
    running Python, and one of them may have a tensor to free (torch 2.13 with gloo: 3 of 9 runs hung on a busy core).
    """
    run.model = run.optimizer = None
    run.accelerator.free_memory()
    gc.collect()
    run.accelerator.end_training()
    if code:
        raise SystemExit(code)


def open_run(args: TrainArguments, accelerator: Accelerator) -> TrainingRun:
    """Open everything that the arguments name, and go on where the checkpoint stood, if there is one.

    Raises:
        ValueError: With every problem of the inputs, one a line.
    """
    output_dir = Path(args.output_dir)
    make_writable(output_dir)
    warn_of_slow_cpu(args, accelerator)
    data, hellaswag, problems = None, [], InputErrors()
    with problems.capture():
        pushes = open_pushes(args, accelerator)
    with problems.capture():
        checkpoint = open_checkpoint(args, accelerator)
        weights, their_tokenizer = open_weights(args, accelerator, checkpoint)
    with problems.capture():
        hellaswag = open_hellaswag(args, accelerator)
    with problems.capture():
        data = open_data(args, accelerator)
    for prompt in args.sample_prompts if data else ():
        with problems.capture():
            check_prompt(prompt, data.tokenizer, args.block_size)
    problems.raise_if_any()

    model = build_model(args, data, weights, their_tokenizer)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    if args.find_batch_size:
        take_largest_batch(args, accelerator, data, model)
    accelerator.gradient_accumulation_steps, _ = data.batches.micro_batch_shape
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    place = (accelerator.process_index, accelerator.num_processes)
    with without_autocast(bare):
        task = prepare_hellaswag(bare, data.tokenizer, hellaswag, PROTOCOLS, None, *place) if hellaswag else None

    progress, guard = TrainState(), OutlierDetector(accelerator.device, args.skip_outliers)
    origin = base_model_sentence(args.init_from)
    if checkpoint:
        state = checkpoints.read_state(checkpoint, data.data_fingerprint)
        origin = state["origin"]
        progress.load_state_dict(state["progress"])
        data.batches.load_state_dict(state["data"])
        guard.load_state_dict(state["guard"])
        with checkpoints.raise_if_corrupt(checkpoint):
            load_optimizer(checkpoint / checkpoints.STATE_FOLDER, bare, optimizer)
            load_random(checkpoint / checkpoints.STATE_FOLDER, accelerator)
    monitor = open_monitor(args, accelerator, progress, flops_and_peak(bare, args.block_size, accelerator))
    if accelerator.is_main_process and not args.preflight:
        checkpoints.remove_stale_files(output_dir)
        write_run_config(args, hardware_record(accelerator), data.data_fingerprint)
    parts = (model, optimizer, progress, guard, monitor, pushes, origin)
    here = checkpoint is None or checkpoint.parent.resolve() == output_dir.resolve()
    return TrainingRun(args, accelerator, data, task, *parts, saved_step=progress.step if here else None)


def open_pushes(args: TrainArguments, accelerator: Accelerator) -> UploadQueue:
    """What pushes to the Hub, on the main process; whether it can was tried.

    Raises:
        ValueError: If it cannot, or the Hub is away and the run has not begun yet.
    """
    pushes = UploadQueue(None, "end", Path(args.output_dir))
    if args.push_to_hub:
        if accelerator.is_main_process:
            pushes = UploadQueue(args.hub_repository, args.hub_strategy, Path(args.output_dir), args.hub_private_repo)
        goes_on = (Path(args.output_dir) / RUN_RECORD).exists()
        found = run_on_main_and_broadcast(accelerator, lambda: pushes.check(goes_on))
        accelerator.print(f"Hub          {found}")
    return pushes


def open_checkpoint(args: TrainArguments, accelerator: Accelerator) -> Path | None:
    """What `--resume_from_checkpoint` names, every file of it checked; what had to be passed over is said."""
    find = partial(checkpoints.find_resume_checkpoint, args.resume_from_checkpoint, Path(args.output_dir))
    checkpoint, passed_over = run_on_main_and_broadcast(accelerator, find)
    for sentence in passed_over:
        accelerator.print(sentence)
    if checkpoint and not checkpoint.is_dir():  # another machine, with a cache of its own
        checkpoint = checkpoints.open_named_checkpoint(args.resume_from_checkpoint)
    return checkpoint


def open_weights(
    args: TrainArguments, accelerator: Accelerator, checkpoint: Path | None
) -> tuple[GPT2ReproForCausalLM | None, PreTrainedTokenizerBase | None]:
    """What the weights start from: the checkpoint, else `--init_from` with its tokenizer, else nothing.

    Raises:
        ValueError: If it is damaged, no GPT-2, or of another shape than the arguments'.
    """
    if checkpoint:
        with checkpoints.raise_if_corrupt(checkpoint):
            model, tokenizer = GPT2ReproForCausalLM.from_pretrained(checkpoint), None
    elif args.init_from:
        model, tokenizer = call_main_process_first(accelerator, lambda: load_gpt2(args.init_from))
    else:
        return None, None
    source = checkpoint or args.init_from
    shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd")}
    if any(getattr(args, name) != size for name, size in shape.items()):
        flags = " ".join(f"--{name} {size}" for name, size in shape.items())
        raise ValueError(f"{source} has another shape than was asked for: give {flags}.")
    positions = model.config.n_positions
    if args.block_size > positions:
        raise ValueError(f"block_size ({args.block_size}) must be at most the {positions} positions of {source}.")
    return model.float(), tokenizer  # whatever it was saved in: a small update is lost in bf16


def open_data(args: TrainArguments, accelerator: Accelerator) -> TrainingData:
    """Prepared shards, one folder or a mix of several, the text that Python carries, or a Hub dataset streamed."""
    shape = BatchConfig(
        args.block_size,
        args.sequences_per_step,
        args.per_device_train_batch_size,
        args.seed,
        accelerator.process_index,
        accelerator.num_processes,
        args.document_mask,
    )
    if args.shards is not None:
        return build_shuffled_data(open_shards(args.shards), shape)
    if args.mix is not None:
        return build_mixed_data(parse_mix(args.mix), shape, args.eval_tokens)
    if args.dataset_name == PYTHON_PROSE:
        folder = Path(args.output_dir) / "data"
        recipe = (folder, args.tokenizer_vocab_size, args.block_size, args.validation_share)
        shards = call_main_process_first(accelerator, lambda: load_python_prose(*recipe))
        return build_shuffled_data(shards, shape)
    source = hub_source(args.dataset_name, args.dataset_config_name, "train", args.dataset_revision, args.text_column)
    tokenizer = load_tokenizer(args.tokenizer or "gpt2")
    return build_streamed_data(source, tokenizer, shape, args.validation_share, args.eval_tokens)


def open_hellaswag(args: TrainArguments, accelerator: Accelerator) -> list[Example]:
    """HellaSwag's validation rows; none where it is switched off or cannot be reached, which is said."""
    if args.hellaswag == "none":
        return []
    rows = []
    try:
        rows = call_main_process_first(accelerator, lambda: load_hellaswag(args.hellaswag))
    except ConnectionError as error:
        accelerator.print(f"HellaSwag is left out: {error}")
    found = accelerator.reduce(torch.tensor(len(rows), device=accelerator.device), reduction="sum")
    return rows if int(found) == len(rows) * accelerator.num_processes else []


def build_model(
    args: TrainArguments,
    data: TrainingData,
    model: GPT2ReproForCausalLM | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> GPT2ReproForCausalLM:
    """The model that was opened, or one with fresh weights, the same on every process.

    Raises:
        ValueError: If its tokenizer is not the data's, or the attention implementation is not there.
    """
    if tokenizer is not None and tokenizer_sha256(tokenizer) != tokenizer_sha256(data.tokenizer):
        raise ValueError(
            f"init_from ({args.init_from}) has another tokenizer than the data: prepare the data with --tokenizer "
            f"{args.init_from}."
        )
    if model is None:
        torch.manual_seed(args.seed)
        config = GPT2ReproConfig(
            vocab_size=len(data.tokenizer),
            n_positions=args.block_size,
            n_embd=args.n_embd,
            n_layer=args.n_layer,
            n_head=args.n_head,
            bos_token_id=data.tokenizer.bos_token_id,
            eos_token_id=data.tokenizer.eos_token_id,
        )
        model = GPT2ReproForCausalLM(config)
    try:
        model.set_attn_implementation(args.attn_implementation)
    except ImportError as error:
        raise ValueError(f"attn_implementation ({args.attn_implementation}) is not installed: {error}") from error
    return model


def take_largest_batch(args: TrainArguments, accelerator: Accelerator, data: TrainingData, model: nn.Module):
    """Put the largest batch that fits into the arguments and the data; the rows of a step stay as they are."""
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    if is_sharded(bare):  # one process that runs out of memory would leave the others waiting for its part
        raise ValueError("find_batch_size needs whole models: with FSDP give --per_device_train_batch_size.")
    # Compiled anew: accelerate, asked to keep the compiled one, takes DDP out of it for good.
    module = torch.compile(bare) if is_compiled_module(model) else bare
    most = -(-args.sequences_per_step // accelerator.num_processes)
    rows = find_batch_size(accelerator, module, args.block_size, bare.config.vocab_size, most)
    args.per_device_train_batch_size = rows
    data.batches.config = replace(data.batches.config, micro_batch_size=rows)
    accelerator.print(f"The largest batch that fits: --per_device_train_batch_size {rows}.")


def open_monitor(
    args: TrainArguments, accelerator: Accelerator, progress: TrainState, speed: tuple[int, float | None]
) -> Monitor:
    """The log and what is shown of it; a run that goes on says what has changed in its arguments."""
    output_dir, changed = Path(args.output_dir), diff_config(args)
    for name, (then, now) in changed.items():
        accelerator.print(f"This run began with {name} {then} and goes on with {now}.")
    resumed_step = progress.step if args.resume_from_checkpoint and not args.preflight else None
    log = MetricsLog(output_dir, resumed_step, accelerator.is_main_process, changed)
    if args.report_to != "none" and not args.preflight:
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers("gpt2repro", config=plain)  # TensorBoard takes no lists
    return Monitor(accelerator, args.total_steps, args.logging_steps, progress, log, *speed)


def preflight(run: TrainingRun):
    """A few steps, part of an evaluation and a checkpoint, none of which is kept; then what the whole run will take."""
    args, accelerator, monitor = run.args, run.accelerator, run.monitor
    with closing(run.data.batches), closing(monitor), explain_oom(args):
        introduce(run)
        skipped = []

        def step() -> float:
            numbers, _, waited = take_step(run)
            skipped.append(bool(numbers.skipped))  # waits for the device
            return waited

        first, median, waited = time_steps(step)
        plain = None
        if torch.are_deterministic_algorithms_enabled():
            with nondeterministic(is_compiled_module(run.model)):
                _, plain, _ = time_steps(step)
        started, module = time.perf_counter(), run.whole_model(accelerator.device)
        rows = args.per_device_eval_batch_size or args.per_device_train_batch_size
        part = min(args.eval_tokens, EVALUATED_PART * rows * args.block_size * accelerator.num_processes)
        with accelerator.autocast():
            validation_loss(accelerator, module, run.data.validation_batches(part, rows))
        evaluation = (time.perf_counter() - started) * args.eval_tokens / part
        if run.hellaswag:
            few = run.hellaswag.rows[:EVALUATED_PART]
            started = time.perf_counter()
            hellaswag_accuracies(accelerator, module, run.data.tokenizer, few)
            evaluation += (time.perf_counter() - started) * len(run.hellaswag.rows) / len(few)
        memory = peak_memory_gb(accelerator.device)
        started, folder = time.perf_counter(), run.output_dir / checkpoints.PREFLIGHT
        problem = write_checkpoint(run, folder, checkpoints.RetentionPolicy())
        seconds = time.perf_counter() - started
        if accelerator.is_main_process:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            measured = StepTimings(first, median, waited, evaluation, seconds, size, memory, plain)
            per_epoch = run.data.batches.sequences_per_epoch
            epochs = per_epoch and args.total_steps * args.sequences_per_step / per_epoch
            report, problems = preflight_report(args, measured, monitor.flops_per_token, monitor.peak_flops, epochs)
            shutil.rmtree(folder, ignore_errors=True)
            problems += [cannot_save_message(args, problem)] if problem else []
            problems += [unusable_steps_message(args, sum(skipped), len(skipped))] if any(skipped) else []
            monitor.say("\n".join([report, *problems]))
            if problems:
                raise SystemExit(1)
    end(run)


if __name__ == "__main__":
    main()
