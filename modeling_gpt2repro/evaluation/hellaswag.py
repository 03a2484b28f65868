"""Score any causal language model on HellaSwag: which of four endings does it find most likely?

Two protocols share the name, and their numbers do not compare (GPT-2 124M: acc_norm 0.2955 and 0.3114):

|           | "completion" (build-nanogpt)          | "lm-eval" (lm-evaluation-harness 0.4)                    |
|-----------|---------------------------------------|----------------------------------------------------------|
| context   | `ctx` as it is                        | activity: ctx_a Ctx_b, WikiHow's [tags] removed          |
| ending    | " " + ending                          | " " + ending, tags removed                               |
| tokens    | context and ending encoded apart      | encoded together, cut after the context's tokens         |
| acc       | largest log-likelihood of the ending  | the same                                                 |
| acc_norm  | the same per token of the ending      | the same per character of the ending                     |
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .hellaswag_rows import PROTOCOLS, HellaSwagRow, texts_of_row
from .shared_context import Tree, grow_tree, takes_trees, tree_log_likelihoods

# model, protocol, acc, acc_norm, source. All on the 10,042 validation rows, without examples in the context.
BASELINES = (
    ("gpt2", "completion", 0.2859, 0.2955, "build-nanogpt, hellaswag.py"),
    ("gpt2", "completion", None, 0.294463, "build-nanogpt, notebook"),
    ("gpt2-medium", "completion", None, 0.375224, "build-nanogpt, notebook"),
    ("gpt2-large", "completion", None, 0.431986, "build-nanogpt, notebook"),
    ("gpt2-xl", "completion", 0.3842, 0.4893, "build-nanogpt, hellaswag.py"),
    # By OpenAI's unpublished code; build-nanogpt sets it beside its own numbers.
    ("GPT-3 124M", "completion", None, 0.337, "Brown et al. 2020"),
    ("gpt2", "lm-eval", 0.2892, 0.3114, "lm-evaluation-harness"),
    ("gpt2-xl", "lm-eval", 0.4004, 0.5089, "lm-evaluation-harness"),
)


class Choice(NamedTuple):
    """One ending, ready for the model: a row of tokens, of which the last `scored` are the ending's."""

    tokens: list[int]  # at most the model's longest input + 1, as the last one is only predicted
    scored: int
    length: int  # what acc_norm divides by: tokens or characters, by protocol


@dataclass(frozen=True)
class EndingScores:
    """What a model says to one row under one protocol. `row` is the row's position in the list that was scored."""

    row: int
    protocol: str
    label: int
    log_likelihoods: tuple[float, ...]  # nats, summed over an ending's tokens
    lengths: tuple[int, ...]  # tokens or characters, by protocol

    @property
    def correct(self) -> bool:
        return self.log_likelihoods.index(max(self.log_likelihoods)) == self.label

    @property
    def correct_norm(self) -> bool:
        # An ending of tags only has no character left: it can never be the best one.
        means = [a / b if b else -math.inf for a, b in zip(self.log_likelihoods, self.lengths, strict=True)]
        return means.index(max(means)) == self.label


def tokens_of_row(
    row: HellaSwagRow, protocol: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Choice]:
    """Tokenize a row's endings as the protocol's own code does; what exceeds `max_length` is cut off on the left."""

    def encode(*texts: str) -> list[list[int]]:
        # A literal <|endoftext|> is text here, not the token.
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    context, endings = texts_of_row(row, protocol)
    if protocol == "completion":
        start, *ends = encode(context, *(f" {ending}" for ending in endings))
        wholes = [start + end for end in ends]
    else:
        # GPT-2's tokens begin with a space: where the context ends in one, it is the ending's.
        start, *wholes = encode(context.rstrip(), *(f"{context} {ending}" for ending in endings))
    choices = []
    for ending, whole in zip(endings, wholes, strict=True):
        tokens = whole if max_length is None else whole[-max_length - 1 :]
        scored = min(len(whole) - len(start), len(tokens) - 1)  # a first token has nothing to be predicted from
        if scored < 1:
            raise ValueError(f"row {row.ind}: the ending {ending!r} after {context!r:.60} has no token to score.")
        choices.append(Choice(tokens, scored, scored if protocol == "completion" else len(ending)))
    return choices


@torch.no_grad()
def log_likelihoods(model: nn.Module, batch: Sequence[Choice]) -> list[float]:
    """Log-probability of each ending, in nats."""
    device = next(model.parameters()).device
    T = max(len(choice.tokens) for choice in batch) - 1
    # Padding stands on the right, where a causal model does not see it: no mask, whatever its id.
    inputs = torch.tensor([c.tokens[:-1] + [0] * (T + 1 - len(c.tokens)) for c in batch])  # (B, T)
    places = [(b, t) for b, c in enumerate(batch) for t in range(len(c.tokens) - 1)[-c.scored :]]
    targets = torch.tensor([batch[b].tokens[t + 1] for b, t in places])  # (N,), N scored tokens
    logits = model(input_ids=inputs.to(device), use_cache=False).logits  # (B, T, V)
    # Selected, then made fp32: a third of the positions. Scored in bf16, 1 % of the predictions are others.
    logits = logits[tuple(torch.tensor(places, device=device).T)].float()  # (N, V)
    losses = nn.functional.cross_entropy(logits, targets.to(device), reduction="none").cpu().double()  # (N,)
    return [-ending.sum().item() for ending in losses.split([c.scored for c in batch])]


def score_hellaswag(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[HellaSwagRow],
    protocols: Sequence[str] = PROTOCOLS,
    batch_tokens: int = 8192,
    process_index: int = 0,
    num_processes: int = 1,
    on_progress: Callable[[list[EndingScores]], None] | None = None,
) -> list[EndingScores]:
    """Score this process's share of the rows: every `num_processes`-th.

    Args:
        model: Called as `model(input_ids=..., use_cache=False)`; its output has `.logits` (B, T, V). Autocast around
            this call is kept. It is put into eval mode and back.
        batch_tokens: Size of a batch B * T, padding included. A single sequence may be longer.
        on_progress: Gets the scores that a batch has completed. The longest sequences come first: memory runs out at
            once or not at all.

    Returns:
        One entry for each row and protocol, in the order of the rows.
    """
    max_length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    keys = [(row, protocol) for row in range(process_index, len(rows), num_processes) for protocol in protocols]
    choices = {key: tokens_of_row(rows[key[0]], key[1], tokenizer, max_length) for key in keys}
    score, queue = plan_batches(model, choices)
    sums = {key: {} for key in keys}
    scores, start, was_training = {}, 0, model.training
    model.eval()
    try:
        while start < len(queue):
            batch = queue[start : start + max(1, batch_tokens // queue[start].size)]
            start += len(batch)
            for item, totals in zip(batch, score([item.work for item in batch]), strict=True):
                sums[item.key].update(zip(item.endings, totals, strict=True))
            done = [key for key in dict.fromkeys(item.key for item in batch) if len(sums[key]) == len(choices[key])]
            for key in done:
                in_order = tuple(sums[key][ending] for ending in range(len(choices[key])))
                lengths = tuple(choice.length for choice in choices[key])
                scores[key] = EndingScores(*key, rows[key[0]].label, in_order, lengths)
            if on_progress is not None:
                on_progress([scores[key] for key in done])
    finally:
        model.train(was_training)
    return [scores[key] for key in keys]


class Item(NamedTuple):
    """Part of a batch: endings of one row, what the model reads for them, and how many tokens that is."""

    key: tuple[int, str]
    endings: tuple[int, ...]
    work: Tree | Choice
    size: int


def plan_batches(
    model: nn.Module, choices: Mapping[tuple[int, str], Sequence[Choice]]
) -> tuple[Callable[[Sequence], list[list[float]]], list[Item]]:
    """How to score, and what, the largest first: rows with their endings behind one context where the model can be told
    so by a mask, else each ending by itself."""
    queue, as_trees = [], takes_trees(model)
    for key, row in choices.items():
        tree = grow_tree([choice.tokens for choice in row], [choice.scored for choice in row]) if as_trees else None
        if tree and tree.context:
            queue.append(Item(key, tuple(range(len(row))), tree, tree.inputs))
            continue
        for number, choice in enumerate(row):
            alone = grow_tree([choice.tokens], [choice.scored]) if as_trees else choice
            queue.append(Item(key, (number,), alone, len(choice.tokens) - 1))
    queue.sort(key=lambda item: item.size, reverse=True)
    if as_trees:
        return lambda work: tree_log_likelihoods(model, work), queue
    return lambda work: [[total] for total in log_likelihoods(model, work)], queue


def count_correct(results: Iterable[EndingScores], protocols: Sequence[str] = PROTOCOLS) -> dict[str, dict[str, int]]:
    """{protocol: {"correct", "correct_norm", "rows"}}: whole numbers, which processes can add up."""
    counts = {protocol: {"correct": 0, "correct_norm": 0, "rows": 0} for protocol in protocols}
    for result in results:
        counts[result.protocol]["correct"] += result.correct
        counts[result.protocol]["correct_norm"] += result.correct_norm
        counts[result.protocol]["rows"] += 1
    return counts


def summarize_counts(counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict]:
    """The counts of all rows and, for each protocol, acc and acc_norm with their 95 % intervals (Wilson's)."""
    summary = {}
    for protocol, count in counts.items():
        summary[protocol] = dict(count)
        for name, correct in (("acc", count["correct"]), ("acc_norm", count["correct_norm"])):
            summary[protocol][name] = correct / count["rows"]
            summary[protocol][f"{name}_interval"] = wilson_interval(correct, count["rows"])
    return summary


def summarize(results: Sequence[EndingScores]) -> dict[str, dict]:
    """`summarize_counts` of the results of all rows."""
    return summarize_counts(count_correct(results, list(dict.fromkeys(result.protocol for result in results))))


def wilson_interval(correct: int, rows: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), sound for 0 of n too: 3000 of 10000 -> 0.2911, 0.3091."""
    z = 1.959964  # the normal distribution's 97.5 % point
    middle = (correct + z * z / 2) / (rows + z * z)
    half = z / (rows + z * z) * math.sqrt(correct * (rows - correct) / rows + z * z / 4)
    return middle - half, middle + half
