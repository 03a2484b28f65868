"""Train a GPT-2 from scratch.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --preset quickstart
    accelerate launch --config_file accelerate_configs/8xa100.yaml train_accelerate.py

The first takes minutes on a laptop and downloads nothing; the second reproduces GPT-2 124M on 10 B tokens of
FineWeb-Edu. Both end with a folder that `from_pretrained` and `pipeline` load.
"""

import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, parse_flag_from_env
from torch import nn
from torch.optim import Optimizer
from transformers.utils.logging import disable_progress_bar

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.rows import BatchShape
from modeling_gpt2repro.data.shards import open_shards
from modeling_gpt2repro.data.sources import PYTHON_PROSE, hub_source
from modeling_gpt2repro.data.tokenizer import load_tokenizer
from modeling_gpt2repro.data.training_data import (
    TrainingData,
    data_from_shards,
    data_from_stream,
    python_prose_shards,
)
from modeling_gpt2repro.evaluation.hellaswag import count_correct, score_hellaswag, summarize_counts
from modeling_gpt2repro.evaluation.hellaswag_rows import HellaSwagRow, load_hellaswag
from modeling_gpt2repro.evaluation.samples import check_prompt, sample_texts
from modeling_gpt2repro.evaluation.validation import summed_loss, unigram_entropy, validation_numbers
from modeling_gpt2repro.hub.folder import save_hub_folder
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.command_line import bad_input_exits, parse_command_line
from modeling_gpt2repro.training.hardware import (
    cpu_lacks_bf16,
    device_name,
    estimate_cpu_seconds,
    flops_per_token,
    readable_duration,
    usable_cores,
)
from modeling_gpt2repro.training.monitor import Monitor
from modeling_gpt2repro.training.optimizer import build_optimizer
from modeling_gpt2repro.training.plot import plot_loss
from modeling_gpt2repro.training.presets import PRESETS
from modeling_gpt2repro.training.progress import TrainProgress, is_due
from modeling_gpt2repro.training.record import make_writable, write_run_record
from modeling_gpt2repro.training.schedule import learning_rate_at, set_learning_rate
from modeling_gpt2repro.training.step import train_step


def main(argv: list[str] | None = None):
    args = parse_command_line(TrainArguments, argv, PRESETS, __doc__)  # field default < preset < command line
    accelerator = start_accelerator(args)
    with bad_input_exits():
        run = open_run(args, accelerator)
    progress, model, optimizer, batches = run.progress, run.model, run.optimizer, run.data.batches
    introduce(run)

    while progress.step < args.total_steps:
        if is_due(progress.step, args.eval_steps):
            evaluate(run)
        learning_rate = learning_rate_at(
            progress.step, args.total_steps, args.warmup_steps, args.learning_rate, args.final_learning_rate_ratio
        )
        set_learning_rate(optimizer, learning_rate)
        started = time.perf_counter()
        micro_batches = batches.micro_batches(progress.step)
        loss, grad_norm = train_step(accelerator, model, optimizer, micro_batches, args.max_grad_norm)
        loss, grad_norm = loss.item(), grad_norm.item()  # waits for the device, so that the time is the step's own
        progress.advance(tokens=args.tokens_per_step, seconds=time.perf_counter() - started)
        run.monitor.trained(loss, grad_norm, learning_rate)
        if is_due(progress.step, args.save_steps) and progress.step < args.total_steps:
            save(run)

    evaluate(run)  # on the weights that are saved
    save(run)
    say_goodbye(run, export(run))
    close(run)


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
        return Path(self.args.output_dir)

    @property
    def module(self) -> GPT2ReproForCausalLM:
        """The model without compile and DDP, autocast kept: ragged evaluation batches recompile nothing."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def start_accelerator(args: TrainArguments) -> Accelerator:
    """The accelerator, with the accumulation that `tokens_per_step` asks for, compiled where that is wanted."""
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    disable_progress_bar()  # transformers' bars for each save, not ours
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    on_cuda = torch.cuda.is_available() and not on_cpu
    compiled = args.torch_compile if args.torch_compile is not None else on_cuda
    wants_bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    accelerator = Accelerator(
        mixed_precision="no" if on_cpu and wants_bf16 and cpu_lacks_bf16() else None,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dynamo_backend="inductor" if compiled else None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )
    if wants_bf16 and accelerator.mixed_precision == "no":
        accelerator.print("This processor has no bf16 instructions: fp32 is taken, which is several times faster here.")
    with bad_input_exits():
        if accelerator.num_processes != args.num_processes:
            raise ValueError(
                f"the launcher started {args.num_processes} processes, but each sees {accelerator.num_processes}: they "
                "would train separately. On CPUs launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
                f"--num_processes {args.num_processes}; on GPUs check that each process has one."
            )
    return accelerator


def open_run(args: TrainArguments, accelerator: Accelerator) -> Run:
    """Open everything that the arguments name, and go on where the checkpoint stood, if there is one."""
    output_dir = Path(args.output_dir)
    make_writable(output_dir)
    checkpoint = checkpoints.find_resume_checkpoint(args.resume_from_checkpoint, output_dir)
    data = open_data(args, accelerator)
    check_prompt(args.sample_prompt, data.tokenizer, args.block_size)
    progress = TrainProgress()
    if checkpoint:
        state = checkpoints.read_state(checkpoint, data.identity)
        progress.load_state_dict(state["progress"])
        data.batches.load_state_dict(state["data"])
    model = build_model(args, data, checkpoint)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
    hellaswag = open_hellaswag(args, accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    if checkpoint:
        checkpoints.load_optimizer(checkpoint, optimizer, accelerator.device)
    monitor = Monitor(
        accelerator, output_dir, args.total_steps, args.logging_steps, progress, progress.step if checkpoint else None
    )
    if accelerator.is_main_process:
        hardware = {"device": device_name(accelerator.device), "processes": accelerator.num_processes}
        write_run_record(args, {**hardware, "precision": accelerator.mixed_precision})
    if args.report_to != "none":
        accelerator.init_trackers("gpt2repro", config={k: v for k, v in vars(args).items() if v is not None})
    return Run(args, accelerator, data, hellaswag, model, optimizer, progress, monitor)


def open_data(args: TrainArguments, accelerator: Accelerator) -> TrainingData:
    """Prepared shards, the text that Python carries, or a Hub dataset streamed."""
    shape = BatchShape(
        args.block_size,
        args.rows_per_step,
        args.per_device_train_batch_size,
        args.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    if args.shards is not None:
        return data_from_shards(open_shards(args.shards), shape)
    if args.dataset_name == PYTHON_PROSE:
        folder = Path(args.output_dir) / "data"
        with accelerator.main_process_first():
            shards = python_prose_shards(folder, args.tokenizer_vocab_size, args.validation_share)
        return data_from_shards(shards, shape)
    source = hub_source(args.dataset_name, args.dataset_config_name, "train", args.dataset_revision, args.text_column)
    tokenizer = load_tokenizer(args.tokenizer)
    return data_from_stream(source, tokenizer, shape, args.validation_share, args.eval_tokens)


def open_hellaswag(args: TrainArguments, accelerator: Accelerator) -> list[HellaSwagRow]:
    """HellaSwag's validation rows; none where it is switched off or cannot be reached, which is said."""
    if args.hellaswag == "none":
        return []
    try:
        with accelerator.main_process_first():
            return load_hellaswag(args.hellaswag)
    except ConnectionError as error:
        accelerator.print(f"HellaSwag is left out: {error}")
        return []


def build_model(args: TrainArguments, data: TrainingData, checkpoint: Path | None) -> GPT2ReproForCausalLM:
    """A model with fresh weights, the same on every process, or with the checkpoint's."""
    if checkpoint:
        model = GPT2ReproForCausalLM.from_pretrained(checkpoint, attn_implementation=args.attn_implementation)
        shape = (model.config.n_layer, model.config.n_head, model.config.n_embd, model.config.n_positions)
        wanted = (args.n_layer, args.n_head, args.n_embd, args.block_size)
        if shape != wanted:
            raise ValueError(
                f"{checkpoint} has n_layer, n_head, n_embd, block_size {shape}, not {wanted}: give the same."
            )
        return model
    torch.manual_seed(args.seed)
    config = GPT2ReproConfig(
        vocab_size=len(data.tokenizer),
        n_positions=args.block_size,
        n_embd=args.n_embd,
        n_layer=args.n_layer,
        n_head=args.n_head,
        bos_token_id=data.tokenizer.bos_token_id,
        eos_token_id=data.tokenizer.eos_token_id,
        attn_implementation=args.attn_implementation,
    )
    return GPT2ReproForCausalLM(config)


def introduce(run: Run):
    """Say what will happen, and what the losses are to be measured by."""
    args, accelerator, config, say = run.args, run.accelerator, run.module.config, run.monitor.say
    parameters = run.module.num_parameters()
    run.yardsticks = {
        "guessing evenly, ln(vocabulary)": math.log(config.vocab_size),
        "guessing by frequency, unigram entropy": unigram_entropy(
            run.data.validation_batches(args.eval_tokens, 64), config.vocab_size
        ),
    }
    compiled = accelerator.state.dynamo_plugin.backend.value.lower()
    say(
        f"""device       {accelerator.num_processes} x {device_name(accelerator.device)}
precision    {accelerator.mixed_precision}, compile: {compiled}, attention: {config._attn_implementation}
model        {parameters:,} parameters: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}
data         {run.data.summary}
tokenizer    {config.vocab_size:,} ids
training     {args.total_steps:,} steps of {args.tokens_per_step:,} tokens: {accelerator.num_processes} processes x \
{args.gradient_accumulation_steps} micro-batches x {args.per_device_train_batch_size} rows x {args.block_size} tokens
yardsticks   {"; ".join(f"{name} {loss:.2f}" for name, loss in run.yardsticks.items())} (nats per token)
writing to   {run.output_dir}{f", going on from step {run.progress.step}" if run.progress.step else ""}
"""
    )
    if accelerator.device.type == "cpu":
        counted = parameters - config.n_positions * config.n_embd
        flops = flops_per_token(counted, config.n_layer, config.n_embd, config.n_positions)
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        seconds = estimate_cpu_seconds(flops * args.train_tokens, dtype) / accelerator.num_processes
        if seconds > 3600:
            say(
                f"On this CPU that takes at least {readable_duration(seconds)}. --preset quickstart trains a small "
                "GPT-2 in minutes; for this one use a GPU.\n"
            )


def evaluate(run: Run):
    """Validation loss, HellaSwag and samples of the model as it is, logged and shown."""
    args, accelerator, module = run.args, run.accelerator, run.module
    started = time.perf_counter()
    micro_batch_rows = args.per_device_eval_batch_size or args.per_device_train_batch_size
    batches = run.data.validation_batches(args.eval_tokens, micro_batch_rows)
    total, tokens = summed_loss(module, batches, accelerator.device)
    total, tokens = accelerator.reduce(torch.stack([total, torch.full_like(total, tokens)]), reduction="sum").tolist()
    numbers = validation_numbers(total / tokens, run.data.bytes_per_token)
    numbers["validation_tokens"] = int(tokens)
    if run.hellaswag:
        numbers |= hellaswag_numbers(run)
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


def hellaswag_numbers(run: Run) -> dict[str, float]:
    """Accuracies in both protocols; each process scores its part of the rows, and the counts are added up."""
    accelerator, tokenizer = run.accelerator, run.data.tokenizer
    place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    counts = count_correct(score_hellaswag(run.module, tokenizer, run.hellaswag, **place))
    for protocol in counts:
        for name, count in counts[protocol].items():
            count = torch.tensor(count, device=accelerator.device)
            counts[protocol][name] = int(accelerator.reduce(count, reduction="sum"))
    summary = summarize_counts(counts)
    return {
        f"hellaswag_{protocol.replace('-', '_')}_{name}": numbers[name]
        for protocol, numbers in summary.items()
        for name in ("acc", "acc_norm")
    }


def save(run: Run):
    """A checkpoint: a Hub folder that the run can go on from."""
    checkpoints.save_checkpoint(
        run.accelerator,
        run.output_dir,
        lambda folder: save_hub_folder(run.module, run.data.tokenizer, folder),
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
        for old in (aside, folder):
            shutil.rmtree(old, ignore_errors=True)
        save_hub_folder(run.module, run.data.tokenizer, aside)
        os.replace(aside, folder)
    run.accelerator.wait_for_everyone()
    return folder


def close(run: Run):
    """End the reading ahead, the bar, the trackers and the process group."""
    run.data.batches.close()
    run.monitor.close()


def say_goodbye(run: Run, folder: Path):
    """What came out, where it is, and how to make it talk."""
    progress = run.progress
    run.monitor.say(
        f"""
trained      {progress.step:,} steps, {progress.tokens:,} tokens in {readable_duration(progress.train_seconds)}
model        {folder}
loss plot    {run.output_dir / "loss.png"}
numbers      {run.monitor.log.path}

Make it talk:

    from transformers import pipeline
    talk = pipeline("text-generation", model="{folder.as_posix()}", trust_remote_code=True)
    print(talk({run.args.sample_prompt!r}, max_new_tokens=40, do_sample=True, top_k=50)[0]["generated_text"])
"""
    )


if __name__ == "__main__":
    main()
