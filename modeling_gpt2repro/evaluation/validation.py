"""Validation loss over a fixed number of tokens: the same text for every model, run and number of processes.

    python -m modeling_gpt2repro.evaluation.validation --model runs/gpt2-124m/model --shards data/edu
    python -m modeling_gpt2repro.evaluation.validation --shards data/edu --output gpt2.json   # stock GPT-2 124M
    accelerate launch --multi_gpu -m modeling_gpt2repro.evaluation.validation --shards data/edu --dtype bfloat16

Any causal language model can be scored; validation_text.py explains how one with another tokenizer is.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.shards.hub_shards import pin_address
from modeling_gpt2repro.data.tokenizer import tokenizer_sha256
from modeling_gpt2repro.runtime.collectives import call_main_process_first, run_on_main_and_broadcast
from modeling_gpt2repro.runtime.command_line import exit_on_input_error, parse_command_line
from modeling_gpt2repro.runtime.hardware import to_device
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.runtime.network import choose_gloo_interface
from modeling_gpt2repro.runtime.progress import SteadyBar
from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.hub_files import is_on_hub

from .load_model import load_causal_lm, max_context
from .validation_arguments import ValidationArguments
from .validation_text import ValidationText, load_validation_text, text_batches

DEFAULT_BLOCK_SIZE = 1024  # GPT-2's context; a model with a longer one would predict from more text than the others


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], device: torch.device
) -> tuple[float, int]:
    """Mean next-token loss in nats per token over the batches of all processes, and the number of those tokens.

    Args:
        model: Any module whose output has `.logits` (B, T, V), or a `ModelWithLoss`, which needs no memory for them.
            Put into eval mode and back. Unwrapped, because processes may have different numbers of batches.
        batches: This process's share: `input_ids` and `shift_labels`, (B, T) each, and what else the model takes.
    """
    was_training = model.training
    model.eval()
    # A sum and not a mean, so that processes with different numbers of tokens can be added up exactly.
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    tokens = 0
    try:
        for batch in batches:
            inputs = {name: to_device(values, device) for name, values in batch.items()}
            labels = inputs.pop("shift_labels")  # already the next tokens: nothing is shifted here
            total += summed_loss(model, inputs, labels)
            tokens += labels.numel()
    finally:
        model.train(was_training)
    total, tokens = reduce(torch.stack([total, torch.full_like(total, tokens)]), reduction="sum").tolist()
    return total / tokens, int(tokens)


def summed_loss(model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label) over a batch: labels (B, T) -> a scalar."""
    if isinstance(model, ModelWithLoss):
        return model(labels, num_items_in_batch=1, **inputs, use_cache=False).loss
    logits = model(**inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def validation_numbers(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """The loss as nats per token, as perplexity, and as bits per byte, which alone compares across tokenizers."""
    # Perplexity: among how many equally likely tokens the model is undecided. exp(710) exceeds a float.
    numbers = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token:
        numbers["validation_bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return numbers


def unigram_entropy(batches: Iterable[dict[str, torch.Tensor]], vocab_size: int) -> float:
    """Loss of predicting the targets by their own frequencies, in nats per token: what any use of context must beat."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in batches:
        counts += np.bincount(batch["shift_labels"].numpy().ravel(), minlength=vocab_size)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def score_text(model: nn.Module, text: ValidationText, batch_size: int, device: torch.device) -> float:
    """Mean loss in nats per token over the sequences of all processes; the main process shows a bar.

    Raises:
        ValueError: If memory runs out.
    """
    state = PartialState()
    with SteadyBar(total=text.tokens, unit="token", unit_scale=True, disable=not state.is_main_process) as bar:

        def with_progress() -> Iterator[dict[str, torch.Tensor]]:
            for batch in text_batches(text, batch_size, state.process_index, state.num_processes):
                yield batch
                bar.update(min(batch["shift_labels"].numel() * state.num_processes, text.tokens - bar.n))

        try:
            loss, _ = validation_loss(model, with_progress(), device)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--per_device_eval_batch_size ({batch_size}) needs more memory than {device} has: halve it."
            ) from error
    return loss


def main(argv: list[str] | None = None) -> None:
    args = parse_command_line(ValidationArguments, argv, description=__doc__)
    with exit_on_input_error():
        choose_gloo_interface()
        state = PartialState(cpu=args.device == "cpu")
        device = state.device if state.num_processes > 1 else torch.device(args.device)
        if is_on_hub(args.shards):
            args.shards = run_on_main_and_broadcast(state, lambda: pin_address(args.shards))  # one commit for all
        shards = call_main_process_first(state, lambda: open_shards(args.shards), each_machine=True)
        model, tokenizer = call_main_process_first(
            state, lambda: load_causal_lm(args.model, args.dtype, device, args.trust_remote_code)
        )
        block_size = resolve_block_size(model, args.block_size)
        same_tokenizer = isinstance(tokenizer, PreTrainedTokenizerFast) and (
            tokenizer_sha256(tokenizer) == tokenizer_sha256(shards.tokenizer)
        )
        text = load_validation_text(
            shards.shards("validation"),
            shards.tokenizer,
            tokens=args.eval_tokens,
            block_size=block_size,
            other_tokenizer=None if same_tokenizer else tokenizer,
        )
        started = time.perf_counter()
        loss = score_text(model, text, args.per_device_eval_batch_size, device)
        if not math.isfinite(loss):
            raise ValueError(f"--model {args.model} has a loss of {loss}: try --dtype float32, or check its weights.")
    if state.is_main_process:
        numbers = validation_numbers(loss, text.text_bytes / text.tokens)
        report = {
            "model": args.model,
            "shards": args.shards,
            "shards_fingerprint": shards.fingerprint,
            "results": numbers | {"validation_tokens": text.tokens, "text_bytes": text.text_bytes},
            "block_size": block_size,
            "split_tokens": text.split_tokens,
            "encoded_again": text.encoded_again,
            "seconds": round(time.perf_counter() - started, 3),
            "arguments": asdict(args),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        print(table(report))
        if args.output:
            write_json(Path(args.output), report)
    state.destroy_process_group()


def resolve_block_size(model: nn.Module, requested: int | None) -> int:
    """Tokens of a sequence: as requested, else the model's context, at most GPT-2's.

    Raises:
        ValueError: If the model cannot read so many.
    """
    context = max_context(model)
    if requested and context and requested > context:
        raise ValueError(f"--block_size ({requested}) must be at most the model's context ({context}).")
    return requested or min(context or DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE)


def table(report: dict) -> str:
    """The results as text, with what they compare with."""
    numbers = report["results"]
    lines = [
        f"\n{report['model']} on the validation split of {report['shards']}: {report['seconds']:.0f} s",
        f"nats per token   {numbers['validation_loss']:.4f}",
        f"perplexity       {numbers['validation_perplexity']:.2f}",
        f"bits per byte    {numbers['validation_bits_per_byte']:.4f}",
        f"tokens           {numbers['validation_tokens']:,} in sequences of {report['block_size']:,}",
        f"text             {numbers['text_bytes']:,} bytes",
    ]
    if report["encoded_again"]:
        lines.append(
            f"\nThese are the model's own tokens, of the text of {report['split_tokens']:,} tokens of the shards. "
            "Compare models\nwith other tokenizers by bits per byte, not by nats per token."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
