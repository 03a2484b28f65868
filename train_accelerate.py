"""Train a GPT-2 from scratch.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --preset quickstart
    accelerate launch --config_file accelerate_configs/8xa100.yaml train_accelerate.py

The first takes minutes on a laptop and downloads nothing; the second reproduces GPT-2 124M on 10 B tokens of
FineWeb-Edu. Both end with a folder that `from_pretrained` and `pipeline` load.
"""

import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.mix import parse_mix
from modeling_gpt2repro.data.rows import BatchShape, validation_batches
from modeling_gpt2repro.data.shards import open_shards
from modeling_gpt2repro.data.sources import PYTHON_PROSE, hub_source
from modeling_gpt2repro.data.tokenizer import load_tokenizer, tokenizer_sha256
from modeling_gpt2repro.data.training_data import (
    TrainingData,
    data_from_mix,
    data_from_shards,
    data_from_stream,
    python_prose_shards,
)
from modeling_gpt2repro.evaluation.distributed import hellaswag_accuracies, validation_loss
from modeling_gpt2repro.evaluation.hellaswag_rows import HellaSwagRow, load_hellaswag
from modeling_gpt2repro.evaluation.samples import check_prompt, sample_texts
from modeling_gpt2repro.evaluation.validation import unigram_entropy, validation_numbers
from modeling_gpt2repro.hub.conversion import load_as_ours
from modeling_gpt2repro.hub.folder import FROM_SCRATCH, save_hub_folder
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.command_line import Problems, bad_input_exits, parse_command_line
from modeling_gpt2repro.training.hardware import device_name
from modeling_gpt2repro.training.launch import main_process_first, start_accelerator
from modeling_gpt2repro.training.monitor import Monitor
from modeling_gpt2repro.training.optimizer import build_optimizer
from modeling_gpt2repro.training.plot import plot_loss
from modeling_gpt2repro.training.presets import PRESETS
from modeling_gpt2repro.training.progress import TimedIterator, TrainProgress, is_due
from modeling_gpt2repro.training.record import changed_arguments, make_writable, recorded_arguments, write_run_record
from modeling_gpt2repro.training.schedule import learning_rate_at, set_learning_rate
from modeling_gpt2repro.training.step import train_step
from modeling_gpt2repro.training.words import end_block, start_block, stop_if_diverged, warn_of_slow_cpu


def main(argv: list[str] | None = None):
    """One training run, from the command line to the folder that talks."""
    args = parse_command_line(TrainArguments, argv, PRESETS, __doc__)  # field default < preset < command line
    with bad_input_exits():
        accelerator = start_accelerator(args)
        run = open_run(args, accelerator)
    progress, batches = run.progress, run.data.batches
    with closing(batches), closing(run.monitor):
        introduce(run)
        while progress.step < args.total_steps:
            if is_due(progress.step, args.eval_steps):
                evaluate(run)
            learning_rate = learning_rate_at(
                progress.step, args.total_steps, args.warmup_steps, args.learning_rate, args.final_learning_rate_ratio
            )
            set_learning_rate(run.optimizer, learning_rate)
            started = time.perf_counter()
            micro_batches = TimedIterator(batches.micro_batches(progress.step))
            loss, grad_norm = train_step(accelerator, run.model, run.optimizer, micro_batches, args.max_grad_norm)
            loss, grad_norm = loss.item(), grad_norm.item()  # waits for the device: the time is the step's own
            progress.advance(tokens=args.tokens_per_step, seconds=time.perf_counter() - started)
            run.monitor.trained(loss, grad_norm, learning_rate, micro_batches.seconds)
            stop_if_diverged(args, accelerator, progress, loss, grad_norm)
            if is_due(progress.step, args.save_steps) and progress.step < args.total_steps:
                save(run)
        evaluate(run)  # on the weights that are saved
        save(run)
        run.monitor.say(end_block(args, progress, export(run)))
    accelerator.end_training()


@dataclass
class Run:
    """Everything a run consists of: what its functions below share."""

    args: TrainArguments
    accelerator: Accelerator
    data: TrainingData
    hellaswag: list[HellaSwagRow]
    model: nn.Module
    optimizer: Optimizer
    progress: TrainProgress
    monitor: Monitor
    yardsticks: dict[str, float] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.args.output_dir)

    @property
    def origin(self) -> str:
        """Where the weights come from, for the model card: as the run began, whatever it was resumed with."""
        began = recorded_arguments(self.output_dir).get("init_from")
        return (
            f"A GPT-2 trained on from {Path(began).name if Path(began).exists() else began}." if began else FROM_SCRATCH
        )

    @property
    def bare_model(self) -> GPT2ReproForCausalLM:
        """The model without compile and DDP, autocast kept: ragged evaluation batches recompile nothing."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def open_run(args: TrainArguments, accelerator: Accelerator) -> Run:
    """Open everything that the arguments name, and go on where the checkpoint stood, if there is one.

    Raises:
        ValueError: With every problem of the inputs, one a line.
    """
    output_dir = Path(args.output_dir)
    make_writable(output_dir)
    warn_of_slow_cpu(args, accelerator)
    data, hellaswag, problems = None, [], Problems()
    with problems.collected():
        checkpoint = checkpoints.find_resume_checkpoint(args.resume_from_checkpoint, output_dir)
        weights, their_tokenizer = open_weights(args, accelerator, checkpoint)
    with problems.collected():
        hellaswag = open_hellaswag(args, accelerator)
    with problems.collected():
        data = open_data(args, accelerator)
        check_prompt(args.sample_prompt, data.tokenizer, args.block_size)
    problems.raise_if_any()

    progress = TrainProgress()
    if checkpoint:
        state = checkpoints.read_state(checkpoint, data.identity)
        progress.load_state_dict(state["progress"])
        data.batches.load_state_dict(state["data"])
    model = build_model(args, data, weights, their_tokenizer)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    if checkpoint:
        checkpoints.load_optimizer(checkpoint, optimizer, accelerator.device)
    changed = changed_arguments(args)
    for name, (then, now) in changed.items():
        accelerator.print(f"This run began with {name} {then} and goes on with {now}.")
    if accelerator.is_main_process:
        checkpoints.clear_remains(output_dir)
        hardware = {"device": device_name(accelerator.device), "processes": accelerator.num_processes}
        write_run_record(args, {**hardware, "precision": accelerator.mixed_precision})
    resumed_step = progress.step if args.resume_from_checkpoint else None
    monitor = Monitor(accelerator, output_dir, args.total_steps, args.logging_steps, progress, resumed_step, changed)
    if args.report_to != "none":
        accelerator.init_trackers("gpt2repro", config={k: v for k, v in vars(args).items() if v is not None})
    return Run(args, accelerator, data, hellaswag, model, optimizer, progress, monitor)


def open_data(args: TrainArguments, accelerator: Accelerator) -> TrainingData:
    """Prepared shards, one folder or a mix of several, the text that Python carries, or a Hub dataset streamed."""
    shape = BatchShape(
        args.block_size,
        args.rows_per_step,
        args.per_device_train_batch_size,
        args.seed,
        accelerator.process_index,
        accelerator.num_processes,
        args.document_mask,
    )
    if args.shards is not None:
        return data_from_shards(open_shards(args.shards), shape)
    if args.mix is not None:
        return data_from_mix(parse_mix(args.mix), shape, args.eval_tokens)
    if args.dataset_name == PYTHON_PROSE:
        folder = Path(args.output_dir) / "data"
        recipe = (folder, args.tokenizer_vocab_size, args.block_size, args.validation_share)
        shards = main_process_first(accelerator, lambda: python_prose_shards(*recipe))
        return data_from_shards(shards, shape)
    source = hub_source(args.dataset_name, args.dataset_config_name, "train", args.dataset_revision, args.text_column)
    tokenizer = load_tokenizer(args.tokenizer or "gpt2")
    return data_from_stream(source, tokenizer, shape, args.validation_share, args.eval_tokens)


def open_hellaswag(args: TrainArguments, accelerator: Accelerator) -> list[HellaSwagRow]:
    """HellaSwag's validation rows; none where it is switched off or cannot be reached, which is said."""
    if args.hellaswag == "none":
        return []
    rows = []
    try:
        rows = main_process_first(accelerator, lambda: load_hellaswag(args.hellaswag))
    except ConnectionError as error:
        accelerator.print(f"HellaSwag is left out: {error}")
    found = accelerator.reduce(torch.tensor(len(rows), device=accelerator.device), reduction="sum")
    return rows if int(found) == len(rows) * accelerator.num_processes else []


def open_weights(
    args: TrainArguments, accelerator: Accelerator, checkpoint: Path | None
) -> tuple[GPT2ReproForCausalLM | None, PreTrainedTokenizerBase | None]:
    """What the weights start from: the checkpoint, else `--init_from` with its tokenizer, else nothing.

    Raises:
        ValueError: If it is damaged, no GPT-2, or of another shape than the arguments'.
    """
    if checkpoint:
        with checkpoints.damage_is_told(checkpoint):
            model, tokenizer = GPT2ReproForCausalLM.from_pretrained(checkpoint), None
    elif args.init_from:
        model, tokenizer = main_process_first(accelerator, lambda: load_as_ours(args.init_from))
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


def introduce(run: Run):
    """Say what will happen, and what the losses are to be measured by."""
    args, accelerator, vocab_size = run.args, run.accelerator, run.bare_model.config.vocab_size
    run.yardsticks = {
        "guessing evenly, ln(vocabulary)": math.log(vocab_size),
        "guessing by frequency, unigram entropy": unigram_entropy(
            validation_batches(run.data.validation, args.eval_tokens, micro_batch_rows=64), vocab_size
        ),
    }
    run.monitor.say(start_block(args, accelerator, run.bare_model, run.data.summary, run.yardsticks, run.progress.step))


def evaluate(run: Run):
    """Validation loss, HellaSwag and samples of the model as it is, logged and shown."""
    args, accelerator, module = run.args, run.accelerator, run.bare_model
    started = time.perf_counter()
    micro_batch_rows = args.per_device_eval_batch_size or args.per_device_train_batch_size
    batches = run.data.validation_batches(args.eval_tokens, micro_batch_rows)
    loss, tokens = validation_loss(accelerator, module, batches)
    numbers = {**validation_numbers(loss, run.data.bytes_per_token), "validation_tokens": tokens}
    if run.hellaswag:
        numbers |= hellaswag_accuracies(accelerator, module, run.data.tokenizer, run.hellaswag)
    numbers["evaluation_seconds"] = time.perf_counter() - started
    run.monitor.evaluated(numbers)
    if args.num_samples and accelerator.is_main_process:
        texts = sample_texts(
            module, run.data.tokenizer, args.sample_prompt, args.num_samples, args.sample_tokens, args.seed
        )
        run.monitor.sampled(args.sample_prompt, texts)
    if accelerator.is_main_process:
        plot_loss(run.output_dir, run.yardsticks)
    accelerator.wait_for_everyone()


def save(run: Run):
    """A checkpoint: a Hub folder that the run can go on from."""
    checkpoints.save_checkpoint(
        run.accelerator,
        run.output_dir,
        lambda folder: save_hub_folder(run.bare_model, run.data.tokenizer, folder, run.origin),
        run.optimizer,
        run.progress,
        run.data.batches.state_dict(),
        run.data.identity,
        run.args.save_total_limit,
    )


def export(run: Run) -> Path:
    """The final model: the last checkpoint's Hub folder without the training state."""
    folder, aside = run.output_dir / "model", run.output_dir / ".model.partial"
    if run.accelerator.is_main_process:
        save_hub_folder(run.bare_model, run.data.tokenizer, aside, run.origin)
        checkpoints.put_in_place(aside, folder)
    run.accelerator.wait_for_everyone()
    return folder


if __name__ == "__main__":
    main()
