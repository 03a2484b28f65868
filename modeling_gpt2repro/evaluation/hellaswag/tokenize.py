"""HellaSwag's rows made ready for a model: tokenized and put into batches once, scored as often as wanted."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro.evaluation.load_model import max_context

from .examples import PROTOCOLS, Example, example_texts
from .prefix_sharing import PrefixGroup, group_by_prefix, supports_prefix_sharing

LOGITS_BYTES = 2 * 10**9  # of a batch, so that a GPU of 8 GB has room: 9,948 tokens of GPT-2's vocabulary
Key = tuple[int, str]  # a row's position in the list of rows, and the protocol


class Continuation(NamedTuple):
    """One ending, ready for the model: a row of tokens, of which the last `scored` are the ending's."""

    tokens: Sequence[int]  # at most the model's longest input + 1, as the last one is only predicted
    scored: int
    length: int  # what acc_norm divides by: tokens or characters, by protocol


class Request(NamedTuple):
    """Part of a batch: endings of one row, what the model reads for them, and how many tokens that is."""

    key: Key
    endings: tuple[int, ...]
    work: PrefixGroup | Continuation
    size: int


@dataclass(frozen=True)
class HellaSwagTask:
    """This process's share of the rows: every `num_processes`-th.

    Contexts are kept once for four endings, in 4-byte numbers: 1,000 rows in both protocols take 4 MB.
    """

    rows: Sequence[Example]  # of all processes
    protocols: tuple[str, ...]
    lengths: Mapping[Key, tuple[int, ...]]  # of the four endings; the keys are this process's, in the order of the rows
    batches: Sequence[Sequence[Request]]
    batch_tokens: int
    as_trees: bool  # an item's work is a PrefixGroup or, where the model cannot be given one, a Continuation


def prepare_hellaswag(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    protocols: Sequence[str] = PROTOCOLS,
    batch_tokens: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> HellaSwagTask:
    """Tokenize this process's share of the rows and plan its batches.

    Args:
        model: Says how long its context is, and whether four endings can share theirs; its weights may change later.
        batch_tokens: Tokens that a batch B * T may have, padding included; a single sequence may be longer, and is then
            a batch of its own. By the model's device and vocabulary if None.

    Raises:
        ValueError: If nothing of an ending can be scored.
    """
    max_length = max_context(model)
    keys = [(row, protocol) for row in range(process_index, len(rows), num_processes) for protocol in protocols]
    as_trees = supports_prefix_sharing(model)
    lengths, queue = {}, []
    for key in keys:
        choices = tokenize_example(rows[key[0]], key[1], tokenizer, max_length)
        lengths[key] = tuple(choice.length for choice in choices)
        queue += build_requests(key, choices, as_trees)
    batch_tokens = batch_tokens or default_batch_tokens(next(model.parameters()).device, len(tokenizer))
    return HellaSwagTask(rows, tuple(protocols), lengths, fill_batches(queue, batch_tokens), batch_tokens, as_trees)


def tokenize_example(
    row: Example, protocol: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Continuation]:
    """Tokenize a row's endings as the protocol's own code does; what exceeds `max_length` is cut off on the left."""

    def encode(*texts: str) -> list[list[int]]:
        # A literal <|endoftext|> is text here, not the token. The harness keeps what a tokenizer puts around any text,
        # such as Llama's <s>; GPT-2's puts nothing.
        options = {"add_special_tokens": protocol == "lm-eval", "split_special_tokens": True, "verbose": False}
        return tokenizer(list(texts), **options)["input_ids"]

    context, endings = example_texts(row, protocol)
    if protocol == "completion":
        start, *ends = encode(context, *(f" {ending}" for ending in endings))
        wholes = [start + end for end in ends]
    else:
        # GPT-2's tokens begin with a space: where the context ends in one, it is the ending's.
        start, *wholes = encode(context.rstrip(), *(f"{context} {ending}" for ending in endings))
        wholes = [start + whole[len(start) :] for whole in wholes]  # the context's tokens are those it has by itself
    choices = []
    for ending, whole in zip(endings, wholes, strict=True):
        tokens = array("i", whole if max_length is None else whole[-max_length - 1 :])
        scored = min(len(whole) - len(start), len(tokens) - 1)  # a first token has nothing to be predicted from
        if scored < 1:
            raise ValueError(f"row {row.ind}: the ending {ending!r} after {context!r:.60} has no token to score.")
        choices.append(Continuation(tokens, scored, scored if protocol == "completion" else len(ending)))
    return choices


def build_requests(key: Key, choices: Sequence[Continuation], as_trees: bool) -> list[Request]:
    """One item with all endings behind one context, where the model takes trees and they have one; else one each."""
    if as_trees:
        tree = group_by_prefix([choice.tokens for choice in choices], [choice.scored for choice in choices])
        if tree.context:
            return [Request(key, tuple(range(len(choices))), tree, tree.inputs)]
    return [
        Request(
            key,
            (number,),
            group_by_prefix([choice.tokens], [choice.scored]) if as_trees else choice,
            len(choice.tokens) - 1,
        )
        for number, choice in enumerate(choices)
    ]


def fill_batches(items: Sequence[Request], batch_tokens: int) -> list[list[Request]]:
    """The largest come first, so that memory runs out at once or not at all; like sizes stand together."""
    queue = sorted(items, key=lambda item: item.size, reverse=True)
    batches, start = [], 0
    while start < len(queue):
        batches.append(queue[start : start + max(1, batch_tokens // queue[start].size)])
        start += len(batches[-1])
    return batches


def default_batch_tokens(device: torch.device, vocab_size: int) -> int:
    """What a batch may hold where nobody says: on a CPU more only pads more, an accelerator wants to be filled.

    But its logits, were each token to predict one, stay below 2 GB in fp32; their softmax takes as much again.
    """
    return 512 if device.type == "cpu" else min(16384, LOGITS_BYTES // (4 * vocab_size))
