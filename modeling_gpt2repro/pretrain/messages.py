"""What a run says at its start, at its end, and where it has to give up."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from modeling_gpt2repro.runtime.hardware import (
    device_name,
    estimate_cpu_seconds,
    flops_per_token,
    is_out_of_memory,
    readable_duration,
)
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.state import TrainState


def warn_of_slow_cpu(args: TrainArguments, accelerator: Accelerator):
    """Say at once what a large run would take on a CPU, before anything is read or downloaded."""
    if accelerator.device.type != "cpu":
        return
    ids = args.tokenizer_vocab_size if args.dataset_name == "python-prose" else 50257  # GPT-2's, as most data have
    parameters = args.n_layer * 12 * args.n_embd**2 + ids * args.n_embd  # biases left out
    flops = args.train_tokens * flops_per_token(parameters, args.n_layer, args.n_embd, args.block_size)
    seconds = estimate_cpu_seconds(flops, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32)
    if seconds > 3600:
        advice = "--preset quickstart trains a small GPT-2 in minutes; for this one use a GPU."
        if args.preset == "quickstart":
            advice = "With fewer --train_tokens it is done sooner."
        accelerator.print(f"On this CPU that takes at least {readable_duration(seconds)}. {advice}\n")


def start_message(
    args: TrainArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    data_summary: str,
    micro_batch_shape: tuple[int, int],
    yardsticks: dict[str, float],
    step: int,
) -> str:
    """What will happen, and what the losses are to be measured by.

    Args:
        model: Unwrapped.
        micro_batch_shape: Micro-batches of a step on each process, and rows of each.
        yardsticks: Name -> loss in nats per token.
        step: Where the run goes on from; 0 for a new one.
    """
    config, processes = model.config, accelerator.num_processes
    count, rows = micro_batch_shape
    batch = [
        (processes, "process", "processes"),
        (count, "micro-batch", "micro-batches"),
        (rows, "row", "rows"),
        (args.block_size, "token", "tokens"),
    ]
    empty = processes * count * rows - args.sequences_per_step
    lines = {
        "device": f"{processes} x {device_name(accelerator.device)}",
        "precision": f"{accelerator.mixed_precision}, attention: {config._attn_implementation}, compile: "
        + accelerator.state.dynamo_plugin.backend.value.lower(),
        "model": f"{model.num_parameters():,} parameters: {config.n_layer} layers, {config.n_head} heads, "
        f"width {config.n_embd}",
        "data": data_summary,
        "tokenizer": f"{config.vocab_size:,} ids",
        "training": f"{args.total_steps:,} steps of {args.tokens_per_step:,} tokens: "
        + " x ".join(f"{count} {one if count == 1 else many}" for count, one, many in batch)
        + (f", less {empty} {'row' if empty == 1 else 'rows'} left empty to divide evenly" if empty else ""),
        "yardsticks": "; ".join(f"{name} {loss:.2f}" for name, loss in yardsticks.items()) + " (nats per token)",
        "writing to": args.output_dir + (f", going on from step {step}" if step else ""),
    }
    text = "".join(f"{name:<12} {value}\n" for name, value in lines.items())
    if args.warmup_steps >= args.total_steps:
        text += (
            f"\nThe warm-up ({args.warmup_tokens:,} tokens) is as long as the training: shorten --warmup_tokens, "
            "or the learning rate never reaches its peak.\n"
        )
    return text


def end_message(args: TrainArguments, progress: TrainState, model_folder: Path) -> str:
    """What came out, where it is, and how to make it talk."""
    output_dir = Path(args.output_dir)
    return f"""
trained      {progress.step:,} steps, {progress.tokens:,} tokens in {readable_duration(progress.train_seconds)}
model        {model_folder}
loss plot    {output_dir / "loss.png"}
numbers      {output_dir / "metrics.jsonl"}

Make it talk:

    from transformers import pipeline
    talk = pipeline("text-generation", model="{model_folder.as_posix()}", trust_remote_code=True)
    print(talk({args.sample_prompts[0]!r}, max_new_tokens=40, do_sample=True, top_k=50)[0]["generated_text"])
"""


def too_many_skipped_message(args: TrainArguments, progress: TrainState) -> str:
    """Why a run stops whose steps are all skipped, and what to do."""
    first = progress.last_skipped - progress.skipped_in_a_row + 1
    return (
        f"the updates of {progress.skipped_in_a_row} steps in a row (from step {first} on) were skipped, because the "
        f"loss or the gradient's norm was not usable; their rows stand in {args.output_dir}/metrics.jsonl. Go on from "
        f"the last checkpoint with --resume_from_checkpoint latest and a lower --learning_rate than "
        f"{args.learning_rate}; if only these rows are at fault, with a larger --max_skipped than {args.max_skipped}."
    )


def unusable_steps_message(args: TrainArguments, skipped: int, steps: int) -> str:
    """What a preflight says of steps that would have been skipped."""
    return (
        f"the loss or the gradient's norm of {skipped} of {steps} steps was not usable: try a lower --learning_rate "
        f"than {args.learning_rate}, or look at the data."
    )


def cannot_save_message(args: TrainArguments, problem: str) -> str:
    """Why a run stops that cannot write its checkpoints."""
    return (
        f"no checkpoint can be written to {args.output_dir} ({problem}): make room there, then go on from the last one "
        "with --resume_from_checkpoint latest."
    )


@contextmanager
def explain_oom(args: TrainArguments) -> Iterator[None]:
    """Around training and evaluation: what to try where memory ran out, in one sentence; exit code 1."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        rows = args.per_device_train_batch_size
        advice = "a smaller --block_size or model, or a device with more memory"
        if rows > 1:
            count = -(-args.sequences_per_step // (rows // 2 * args.num_processes))
            advice = (
                f"--per_device_train_batch_size {rows // 2}; a step then takes {count} micro-batches on each process "
                "and gives the same numbers"
            )
        if args.per_device_eval_batch_size:
            advice += f" (and less than --per_device_eval_batch_size {args.per_device_eval_batch_size} in evaluations)"
        told = (str(error).splitlines() or [""])[0]
        raise SystemExit(
            f"Memory ran out with --per_device_train_batch_size {rows} ({told}): go on with --resume_from_checkpoint "
            f"latest and {advice}."
        ) from error
