"""What a run says at its start, at its end, and where it has to give up."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from .arguments import TrainArguments
from .hardware import device_name, estimate_cpu_seconds, flops_per_token, readable_duration
from .progress import TrainProgress


def warn_of_slow_cpu(args: TrainArguments, accelerator: Accelerator):
    """Say at once what a large run would take on a CPU, before anything is read or downloaded."""
    if accelerator.device.type != "cpu":
        return
    parameters = args.n_layer * 12 * args.n_embd**2 + 50257 * args.n_embd  # GPT-2's vocabulary; biases left out
    flops = args.train_tokens * flops_per_token(parameters, args.n_layer, args.n_embd, args.block_size)
    seconds = estimate_cpu_seconds(flops, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32)
    if seconds > 3600:
        accelerator.print(
            f"On this CPU that takes at least {readable_duration(seconds)}. --preset quickstart trains a small GPT-2 "
            "in minutes; for this one use a GPU.\n"
        )


def start_block(
    args: TrainArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    data_summary: str,
    yardsticks: dict[str, float],
    step: int,
) -> str:
    """What will happen, and what the losses are to be measured by.

    Args:
        model: Unwrapped.
        yardsticks: Name -> loss in nats per token.
        step: Where the run goes on from; 0 for a new one.
    """
    config, processes = model.config, accelerator.num_processes
    batch = [
        (processes, "process", "processes"),
        (args.gradient_accumulation_steps, "micro-batch", "micro-batches"),
        (args.per_device_train_batch_size, "row", "rows"),
        (args.block_size, "token", "tokens"),
    ]
    lines = {
        "device": f"{processes} x {device_name(accelerator.device)}",
        "precision": f"{accelerator.mixed_precision}, attention: {config._attn_implementation}, compile: "
        + accelerator.state.dynamo_plugin.backend.value.lower(),
        "model": f"{model.num_parameters():,} parameters: {config.n_layer} layers, {config.n_head} heads, "
        f"width {config.n_embd}",
        "data": data_summary,
        "tokenizer": f"{config.vocab_size:,} ids",
        "training": f"{args.total_steps:,} steps of {args.tokens_per_step:,} tokens: "
        + " x ".join(f"{count} {one if count == 1 else many}" for count, one, many in batch),
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


def end_block(args: TrainArguments, progress: TrainProgress, model_folder: Path) -> str:
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
    print(talk({args.sample_prompt!r}, max_new_tokens=40, do_sample=True, top_k=50)[0]["generated_text"])
"""


def stop_if_diverged(
    args: TrainArguments, accelerator: Accelerator, progress: TrainProgress, loss: float, grad_norm: float
):
    """End before weights that are no numbers can be saved over good ones; all processes see the same loss."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    told = (
        f"the loss is {loss} and the gradient's norm {grad_norm} at step {progress.step}; the last checkpoint in "
        f"{args.output_dir} is from before. Go on from there with --resume_from_checkpoint latest and a lower "
        f"--learning_rate than {args.learning_rate}."
    )
    raise SystemExit(told if accelerator.is_main_process else 1)
