"""Validation loss over a fixed number of tokens: the same rows for every model, run and number of processes.

    python -m modeling_gpt2repro.evaluation.validation --model runs/gpt2-124m/model --shards data/edu
    python -m modeling_gpt2repro.evaluation.validation --shards data/edu --output gpt2.json   # stock GPT-2 124M
    accelerate launch --multi_gpu -m modeling_gpt2repro.evaluation.validation --shards data/edu --dtype bfloat16

Any causal language model is scored, one with another tokenizer on the same text: `validation_text.py` says how.
"""

import json
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
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.storage.atomic import atomic_write

from .load_model import load_causal_lm, max_context
from .validation_arguments import ValidationArguments
from .validation_text import ValidationText, open_validation_text, row_batches

LARGEST_BLOCK = 1024  # GPT-2's context; with more, models of a longer one would be told more


@torch.no_grad()
def summed_loss(
    model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], device: torch.device
) -> tuple[torch.Tensor, int]:
    """Sum of the next-token losses of `batches`, in nats, and how many tokens they are.

    Sums rather than means, so that processes with different numbers of rows can be added up exactly.

    Args:
        model: Any module whose output has `.logits` (B, T, V).
        batches: `input_ids` and `shift_labels`, (B, T) each, and what else the model takes.

    Returns:
        The sum in fp64, a scalar on `device` (fp32 on MPS, which has no fp64), and the count.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    tokens = 0
    try:
        for batch in batches:
            inputs = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
            labels = inputs.pop("shift_labels")
            logits = model(**inputs, use_cache=False).logits
            losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
            total += losses.to(total.dtype).sum()
            tokens += labels.numel()
    finally:
        model.train(was_training)
    return total, tokens


def validation_numbers(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """Name the loss: nats per token, perplexity, and bits per byte, which compares across tokenizers."""
    numbers = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token:
        numbers["validation_bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return numbers


def unigram_entropy(batches: Iterable[dict[str, torch.Tensor]], vocab_size: int) -> float:
    """Nats per token that guessing the targets by their own frequencies costs: what any model of context must beat."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in batches:
        counts += np.bincount(batch["shift_labels"].numpy().ravel(), minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def score_text(model: nn.Module, text: ValidationText, batch_rows: int, device: torch.device) -> float:
    """Mean loss in nats per token over the rows of all processes; the first one shows a bar.

    Raises:
        ValueError: If memory runs out.
    """
    state = PartialState()
    with tqdm(total=text.tokens, unit="token", unit_scale=True, disable=not state.is_main_process) as bar:

        def shown() -> Iterator[dict[str, torch.Tensor]]:
            for batch in row_batches(text, batch_rows, state.process_index, state.num_processes):
                yield batch
                bar.update(min(batch["shift_labels"].numel() * state.num_processes, text.tokens - bar.n))

        try:
            total, _ = summed_loss(model, shown(), device)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--per_device_eval_batch_size ({batch_rows}) is more than {device} has memory for: halve it."
            ) from error
    return reduce(total, reduction="sum").item() / text.tokens


def main(argv: list[str] | None = None) -> None:
    """The command. Like a script it combines rooms; what it calls knows its own only."""
    from modeling_gpt2repro.data.shards.dataset import open_shards
    from modeling_gpt2repro.runtime.collectives import call_main_process_first
    from modeling_gpt2repro.runtime.command_line import exit_on_input_error, parse_command_line

    from ..data.tokenizer import tokenizer_sha256

    args = parse_command_line(ValidationArguments, argv, description=__doc__)
    with exit_on_input_error():
        state = PartialState(cpu=args.device == "cpu")
        device = state.device if state.num_processes > 1 else torch.device(args.device)
        shards = open_shards(args.shards)
        model, tokenizer = call_main_process_first(
            state, lambda: load_causal_lm(args.model, args.dtype, device, args.trust_remote_code)
        )
        fast = isinstance(tokenizer, PreTrainedTokenizerFast)
        same_ids = fast and tokenizer_sha256(tokenizer) == tokenizer_sha256(shards.tokenizer)
        block_size = block_size_of(model, args.block_size)
        other_tokenizer = None if same_ids else tokenizer
        text = open_validation_text(
            shards.shards("validation"), shards.tokenizer, args.eval_tokens, block_size, other_tokenizer
        )
        started = time.perf_counter()
        loss = score_text(model, text, args.per_device_eval_batch_size, device)
        if not math.isfinite(loss):
            raise ValueError(f"--model {args.model} has a loss of {loss}: try float32, or check its weights.")
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
            with atomic_write(Path(args.output)) as file:
                file.write(json.dumps(report, indent=2).encode() + b"\n")
    state.destroy_process_group()


def block_size_of(model: nn.Module, asked: int | None) -> int:
    """Tokens a row: what is asked for, else the model's context, at most GPT-2's.

    Raises:
        ValueError: If the model cannot read so many.
    """
    longest = max_context(model)
    if asked and longest and asked > longest:
        raise ValueError(f"--block_size ({asked}) must be at most the model's context ({longest}).")
    return asked or min(longest or LARGEST_BLOCK, LARGEST_BLOCK)


def table(report: dict) -> str:
    """The numbers, and what they compare with."""
    numbers = report["results"]
    lines = [
        f"\n{report['model']} on the validation split of {report['shards']}: {report['seconds']:.0f} s",
        f"nats per token   {numbers['validation_loss']:.4f}",
        f"perplexity       {numbers['validation_perplexity']:.2f}",
        f"bits per byte    {numbers['validation_bits_per_byte']:.4f}",
        f"tokens           {numbers['validation_tokens']:,} in rows of {report['block_size']:,}",
        f"text             {numbers['text_bytes']:,} bytes",
    ]
    if report["encoded_again"]:
        lines.append(
            f"\nThese are the model's own tokens, of the text of {report['split_tokens']:,} tokens of the shards. With "
            "models of other\ntokenizers compare bits per byte, not nats per token."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
