"""User-facing messages of a training run: at its start, at its end, and where it has to give up."""

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_gpt2repro.data.sources.resolve import STORIES
from modeling_gpt2repro.evaluation.generation import check_prompt
from modeling_gpt2repro.runs.folder import LOSS_PICTURE, METRICS_FILE
from modeling_gpt2repro.runs.logger import one_line
from modeling_gpt2repro.runs.read import STORY_FLOOR, read_samples
from modeling_gpt2repro.runs.summary import describe_schedule
from modeling_gpt2repro.runtime.hardware import (
    device_name,
    estimate_cpu_seconds,
    flops_per_token,
    is_out_of_memory,
    readable_duration,
)
from modeling_gpt2repro.runtime.signals import StopSignal
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.optimization import describe_optimizer, scheduled_learning_rate
from modeling_gpt2repro.training.state import TrainState

GPT2_VOCABULARY = 50257
MAX_EPOCHS = 4  # "up to 4 epochs of repeated data yield negligible changes to loss" (Muennighoff et al. 2023, abstract)
SLOW_SECONDS = 3600
SLOWEST_CPU_FLOPS = 1e8  # below any: one that emulates bf16 takes seconds for 2e9 operations
SHORT_TEXT = 40  # new tokens, where texts have no length of their own
SHOWN_WIDTH, SHOWN_LINES = 100, 10  # of a sample at the end: a whole story


def size_is_known(args: TrainArguments) -> bool:
    """Whether the arguments alone say how large model and training are; else model or data have to be opened."""
    return not (args.init_from or args.shards or args.mix) and args.num_train_epochs is None


def warn_of_slow_cpu(args: TrainArguments, accelerator: Accelerator, vocab_size: int | None = None):
    """Print how long a large run would take on a CPU: at once if `size_is_known`, else when the vocabulary is."""
    if accelerator.device.type != "cpu" or args.certify or size_is_known(args) != (vocab_size is None):
        return
    if vocab_size is None:
        vocab_size = args.tokenizer_vocab_size if args.built_in_text else GPT2_VOCABULARY
    parameters = args.n_layer * 12 * args.n_embd**2 + vocab_size * args.n_embd  # without biases
    flops = args.train_tokens * flops_per_token(parameters, args.n_layer, args.n_embd, args.block_size)
    if flops < SLOW_SECONDS * SLOWEST_CPU_FLOPS:
        return  # without a measurement, which takes a third of a second
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    seconds = estimate_cpu_seconds(flops, dtype)
    if seconds > SLOW_SECONDS:
        advice = "--preset quickstart trains a small GPT-2 in minutes; for this one use a GPU."
        if args.preset in ("quickstart", "own-text"):
            length = "train_tokens" if args.num_train_epochs is None else "num_train_epochs"
            advice = f"Fewer --{length} take less time."
        accelerator.print(f"On this CPU that takes at least {readable_duration(seconds)}. {advice}\n")


def start_message(
    args: TrainArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    optimizer: Optimizer,
    data_summary: str,
    micro_batch_shape: tuple[int, int],
    epochs: dict[str, float],
    baselines: dict[str, float],
    step: int,
) -> str:
    """What will happen, from `step` on.

    Args:
        micro_batch_shape: Micro-batches of a step on each process, and sequences of each.
        epochs: Folder -> how often the run reads it; empty if that is not known.
        baselines: Name -> loss to compare with, in nats per token.
        step: The step that the run resumes from; 0 for a new one.
    """
    config = model.config
    num_processes = accelerator.num_processes
    count, size = micro_batch_shape
    factors = [
        counted(num_processes, "process", "processes"),
        counted(count, "micro-batch", "micro-batches"),
        counted(size, "sequence"),
        counted(args.block_size, "token"),
    ]
    batch = " x ".join(factors)
    empty = num_processes * count * size - args.sequences_per_step
    if empty:
        batch += f", less {counted(empty, 'sequence')} left empty to divide evenly"
    floor = {}
    if STORY_FLOOR in baselines:
        nats = f"{baselines[STORY_FLOOR]:.3f} nats per token, {baselines[STORY_FLOOR] * args.block_size:.1f} a story"
        floor = {"floor": f"no model can do better than {nats}"}
    guesses = [f"{name} {loss:.2f}" for name, loss in baselines.items() if name != STORY_FLOOR]
    compiler = accelerator.state.dynamo_plugin.backend.value.lower()
    precision = accelerator.mixed_precision.replace("no", "fp32")
    lines = {
        "device": f"{num_processes} x {device_name(accelerator.device)}",
        "precision": f"{precision}, attention: {config._attn_implementation}, compile: {compiler}",
        "model": f"{model.num_parameters():,} parameters: {config.n_layer} layers, {config.n_head} heads, "
        f"width {config.n_embd}" + (f", fine-tuned from {args.init_from}" if args.init_from else ""),
        "data": data_summary,
        "tokenizer": f"{config.vocab_size:,} ids",
        "training": f"{args.total_steps:,} steps of {args.tokens_per_step:,} tokens: {batch}",
        "epochs": epochs_line(epochs),
        **({} if args.recipe == "lecture" else {"recipe": args.recipe_summary}),
        "optimizer": describe_optimizer(optimizer),
        "schedule": f"learning rate {describe_schedule(args.schedule)}",
        "baselines": "; ".join(guesses) + " (nats per token)",
        **floor,
        "writing to": args.output_dir + (f", resuming from step {step}" if step else ""),
    }
    text = table(lines)
    if args.warmup_steps >= args.total_steps:
        text += (
            f"\nThe warm-up ({args.warmup_tokens:,} tokens) is as long as the training: shorten --warmup_tokens, "
            "or the learning rate never reaches its peak.\n"
        )
    return text + repetition_warning(epochs)


def epochs_line(epochs: dict[str, float]) -> str:
    """{'data/mine': 4.16} -> '4.16 of the training data'; of a mix, each folder's."""
    if len(epochs) == 1:
        return f"{next(iter(epochs.values())):,.2f} of the training data"
    return ", ".join(f"{count:,.2f} of {folder}" for folder, count in epochs.items()) or "unknown: streamed"


def repetition_warning(epochs: dict[str, float]) -> str:
    """A warning about folders that the run reads more than MAX_EPOCHS times (rounded), or ""."""
    often = [f"{folder} {count:,.1f} times" for folder, count in epochs.items() if round(count) > MAX_EPOCHS]
    if not often:
        return ""
    # An epoch of a mix is all folders together: the small one with the large share is read more often than others.
    advice = f"--num_train_epochs {MAX_EPOCHS}, or" if len(epochs) == 1 else "it a smaller share of the mix, or"
    return (
        f"\nThe run reads {', and '.join(often)}. Up to {MAX_EPOCHS} times, text is worth nearly as much as new text "
        "(Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264); far beyond that, it is memorized: give "
        f"{advice} more text.\n"
    )


def learning_rate_message(before: dict, now: dict, step: int) -> str | None:
    """If the arguments of a resumed run make the learning rate jump: from which value to which, and how to avoid it.

    A cosine that ends later is higher everywhere, so a longer run does not continue at the rate at which it stopped.

    Args:
        before: The `SCHEDULE` with which the run came to `step`; {} if it is not known.
        now: That from there on.
    """
    if not before or before["learning_rate"] != now["learning_rate"]:  # a new rate was given on purpose
        return None
    old = scheduled_learning_rate(before, step)
    new = scheduled_learning_rate(now, step)
    if math.isclose(old, new, rel_tol=0.01):
        return None
    factor, advice = "", ""
    if old and new:  # a schedule may end at 0
        factor = f" ({new / old:.2g} x)"
        advice = f" To continue at the old rate, give --learning_rate {now['learning_rate'] * old / new:.3g}."
    return (
        f"The learning rate jumps after step {step:,} from {old:.2e} to {new:.2e}{factor}, because its schedule has "
        f"changed: the loss may rise for a while.{advice}"
    )


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """(1, 'token') -> '1 token'; (2, 'token') -> '2 tokens'."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def table(lines: dict[str, str]) -> str:
    """Names and values in two columns."""
    return "".join(f"{name:<12} {value}\n" for name, value in lines.items())


def finished_message(args: TrainArguments, state: TrainState) -> str:
    """Says that a run has all its steps, and how to train longer."""
    return (
        f"{args.output_dir} is finished, and nothing is left to do: its model was trained for {state.step:,} steps; to "
        f"train it longer, resume with --train_tokens {state.tokens + args.tokens_per_step} or more."
    )


def end_message(args: TrainArguments, state: TrainState, model_folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the run has produced, where it is, what the model writes, and how to have it write more."""
    output_dir = Path(args.output_dir)
    prompt = args.sample_prompts[0]
    room = args.block_size - check_prompt(prompt, tokenizer, args.block_size)
    new_tokens = room if args.built_in_text == STORIES else min(room, SHORT_TEXT)  # a story ends by itself
    return f"""
trained      {state.step:,} steps, {state.tokens:,} tokens in {readable_duration(state.train_seconds)}
model        {model_folder}
loss plot    {output_dir / LOSS_PICTURE}
numbers      {output_dir / METRICS_FILE}
{before_and_after(read_samples(output_dir, prompt))}
Make it talk:

    from transformers import pipeline
    talk = pipeline("text-generation", model={model_folder.as_posix()!r}, trust_remote_code=True)
    print(talk({prompt!r}, max_new_tokens={new_tokens}, do_sample=True, top_k=50)[0]["generated_text"])
"""


def before_and_after(samples: list[tuple[int, str]]) -> str:
    """The first of the (step, text) that a run has sampled beside the last; "" if there are not two."""
    if len(samples) < 2:
        return ""
    (first_step, first), (last_step, last) = samples[0], samples[-1]
    return f"""
At step {first_step:,} it wrote:

{shortened(first)}

Now, at step {last_step:,}, it writes:

{shortened(last)}
"""


def shortened(text: str) -> str:
    """A few lines of a text, as an indented block."""
    indent = 4 * " "
    return textwrap.fill(
        one_line(text),
        SHOWN_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        max_lines=SHOWN_LINES,
        placeholder=" ...",
    )


def stopped_message(stop: StopSignal, problem: str | None, step: int) -> str:
    """Why the run stopped early, and the command that resumes it; `problem` is that of any process."""
    if problem is not None:
        reason = f"Stopped after step {step}: {problem} When it can be read again, resume with:"
    else:
        reason = f"Stopped by {stop.signal_name or 'a signal to another process'} after step {step}. Resume with:"
    return f"\n{reason}\n\n    {stop.resume_command}\n"


def too_many_skipped_message(args: TrainArguments, state: TrainState) -> str:
    """Why a run stops whose steps are all skipped, and what to do."""
    first = state.last_skipped - state.skipped_in_a_row + 1
    return (
        f"the updates of {state.skipped_in_a_row} steps in a row (from step {first} on) were skipped, because the loss "
        f"or the gradient norm was not usable; their sequences are listed in {args.output_dir}/{METRICS_FILE}. Resume "
        "from the last checkpoint with --resume_from_checkpoint latest and a lower --learning_rate than "
        f"{args.learning_rate}; if only these sequences are at fault, with a larger --max_skipped than "
        f"{args.max_skipped}."
    )


def cannot_save_message(args: TrainArguments, problem: str) -> str:
    """Why a run stops that cannot write its checkpoints."""
    return (
        f"no checkpoint can be written to {args.output_dir} ({problem}): free some space there, or make it writable, "
        "then resume from the last one with --resume_from_checkpoint latest."
    )


def cannot_export_message(args: TrainArguments, problem: str) -> str:
    """Why a run that has all its steps ends without its final model, and how to get it."""
    return (
        f"the final model cannot be written to {args.output_dir} ({problem}): free some space there, or make it "
        "writable, then give the same command with --resume_from_checkpoint latest, which writes it from the last "
        "checkpoint."
    )


@contextmanager
def explain_oom(args: TrainArguments) -> Iterator[None]:
    """Where memory runs out in training or evaluation, exit with code 1 and one sentence on what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = args.per_device_train_batch_size
        advice = "a smaller --block_size or model, or a device with more memory"
        if size > 1:
            count = -(-args.sequences_per_step // (size // 2 * args.num_processes))
            advice = (
                f"--per_device_train_batch_size {size // 2}; a step then takes {count} micro-batches on each process "
                "and gives the same numbers"
            )
        if args.per_device_eval_batch_size:
            advice += f" (and less than --per_device_eval_batch_size {args.per_device_eval_batch_size} in evaluations)"
        reason = (str(error).splitlines() or [""])[0]
        raise SystemExit(
            f"Memory ran out with --per_device_train_batch_size {size} ({reason}): resume with "
            f"--resume_from_checkpoint latest and {advice}."
        ) from error
