"""HellaSwag for one model: examples tokenized and planned into batches once, to be scored as often as wanted.

The columns "context", "ending" and "tokens" of the table in score.py are decided here and in examples.py.
"""

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

CPU_BATCH_TOKENS = 512  # a CPU is busy with few tokens; larger batches only hold more padding
ACCELERATOR_BATCH_TOKENS = 16_384  # about 16 sequences of GPT-2's 1,024 tokens
LOGITS_BYTES = 2 * 10**9  # limit for the logits of a batch, so that a GPU of 8 GB has room for them and their softmax
Key = tuple[int, str]  # an example's index in the list of examples, and the protocol


class Continuation(NamedTuple):
    """Context and one ending as a sequence of tokens, of which the last `num_scored` are the ending's."""

    tokens: Sequence[int]  # at most the model's context + 1: the last token is only predicted, never read
    num_scored: int
    length: int  # what acc_norm divides by: tokens ("completion") or characters ("lm-eval")


class Request(NamedTuple):
    """The unit of batching: one or all endings of an example, and the number of tokens the model reads for them."""

    key: Key
    endings: tuple[int, ...]
    sequence: PrefixGroup | Continuation
    num_tokens: int


@dataclass(frozen=True)
class HellaSwagTask:
    """What one process scores: every `num_processes`-th example, tokenized and in batches.

    A context is kept once for its four endings, in 4-byte integers: 1,000 examples in both protocols take 4 MB.
    """

    examples: Sequence[Example]  # of all processes
    protocols: tuple[str, ...]
    lengths: Mapping[Key, tuple[int, ...]]  # of the four endings; keys of this process, in the order of the examples
    batches: Sequence[Sequence[Request]]
    batch_tokens: int
    shares_prefixes: bool  # whether the requests hold PrefixGroups; Continuations otherwise


def prepare_hellaswag(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    protocols: Sequence[str] = PROTOCOLS,
    batch_tokens: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> HellaSwagTask:
    """Tokenize this process's examples and plan their batches.

    Args:
        model: Determines the longest sequence, and whether four endings can share one context. Its weights may change
            before the task is scored.
        batch_tokens: Most tokens B * T of a batch, padding included; a longer sequence is a batch of its own. By
            default as many as suit the model's device and vocabulary.

    Raises:
        ValueError: If an ending has no token that can be scored.
    """
    max_length = max_context(model)
    shares_prefixes = supports_prefix_sharing(model)
    lengths = {}
    requests = []
    for index in range(process_index, len(examples), num_processes):
        for protocol in protocols:
            key = (index, protocol)
            continuations = tokenize_example(examples[index], protocol, tokenizer, max_length)
            lengths[key] = tuple(continuation.length for continuation in continuations)
            requests += build_requests(key, continuations, shares_prefixes)
    batch_tokens = batch_tokens or default_batch_tokens(next(model.parameters()).device, len(tokenizer))
    batches = fill_batches(requests, batch_tokens)
    return HellaSwagTask(examples, tuple(protocols), lengths, batches, batch_tokens, shares_prefixes)


def tokenize_example(
    example: Example, protocol: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Continuation]:
    """Tokenize an example's four endings, each behind the context, as the protocol's own code does.

    Args:
        max_length: Most tokens that the model reads; longer contexts lose their beginning.

    Raises:
        ValueError: If an ending has no token that can be scored.
    """

    def encode(*texts: str) -> list[list[int]]:
        # split_special_tokens: a literal <|endoftext|> in the data is text, not the token that ends a document.
        # add_special_tokens: the harness keeps what a tokenizer adds to any text, such as Llama's <s>; GPT-2's adds
        # nothing.
        options = {"add_special_tokens": protocol == "lm-eval", "split_special_tokens": True, "verbose": False}
        return tokenizer(list(texts), **options)["input_ids"]

    context, endings = example_texts(example, protocol)
    # Why a space goes before the ending: GPT-2's BPE keeps the space at the front of a word's token. " rips" is what
    # follows a context in running text; "rips" is another token, which the model has hardly ever seen there.
    if protocol == "completion":
        # build-nanogpt encodes the two apart, so no token spans the border between them.
        context_tokens, *ending_tokens = encode(context, *(f" {ending}" for ending in endings))
        sequences = [context_tokens + tokens for tokens in ending_tokens]
    else:
        # The harness (TemplateLM._encode_pair in lm_eval/api/model.py) encodes them together and cuts where the
        # context alone would end. Spaces at the context's end count as the ending's, because they merge with its word.
        context_tokens, *whole = encode(context.rstrip(), *(f"{context} {ending}" for ending in endings))
        # If a merge across the border changes the context's tokens, it keeps those that it has alone.
        sequences = [context_tokens + tokens[len(context_tokens) :] for tokens in whole]
    continuations = []
    for ending, sequence in zip(endings, sequences, strict=True):
        # One token more than the model reads: the last is a target only. Cut on the left, so that the ending stays.
        tokens = array("i", sequence if max_length is None else sequence[-max_length - 1 :])
        num_scored = min(len(sequence) - len(context_tokens), len(tokens) - 1)  # nothing predicts a first token
        if num_scored < 1:
            raise ValueError(
                f"example {example.ind}: the ending {ending!r} after {context!r:.60} has no token to score."
            )
        length = num_scored if protocol == "completion" else len(ending)
        continuations.append(Continuation(tokens, num_scored, length))
    return continuations


def build_requests(key: Key, continuations: Sequence[Continuation], shares_prefixes: bool) -> list[Request]:
    """One request for all endings if the model supports it and they have a context in common, else one for each."""

    def group(members: Sequence[Continuation]) -> PrefixGroup:
        return group_by_prefix([member.tokens for member in members], [member.num_scored for member in members])

    if shares_prefixes:
        shared = group(continuations)
        if shared.context:
            return [Request(key, tuple(range(len(continuations))), shared, shared.num_inputs)]
    requests = []
    for number, continuation in enumerate(continuations):
        sequence = group([continuation]) if shares_prefixes else continuation
        requests.append(Request(key, (number,), sequence, len(continuation.tokens) - 1))
    return requests


def fill_batches(requests: Sequence[Request], batch_tokens: int) -> list[list[Request]]:
    """Sort by size, so that a batch holds little padding; the largest first, so that memory runs out at once or never.

    Sizes 3, 5, 2, 2 with `batch_tokens` 6 -> [[5], [3, 2], [2]].
    """
    queue = sorted(requests, key=lambda request: request.num_tokens, reverse=True)
    batches = []
    start = 0
    while start < len(queue):
        longest = queue[start].num_tokens  # all sequences of the batch are padded to this
        batches.append(queue[start : start + max(1, batch_tokens // longest)])
        start += len(batches[-1])
    return batches


def default_batch_tokens(device: torch.device, vocab_size: int) -> int:
    """Tokens of a batch whose logits, were every token to predict one, take at most 2 GB in float32."""
    if device.type == "cpu":
        return CPU_BATCH_TOKENS
    return min(ACCELERATOR_BATCH_TOKENS, LOGITS_BYTES // (4 * vocab_size))  # GPT-2: 9,948
