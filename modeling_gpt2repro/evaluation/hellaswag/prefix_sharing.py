"""Log-likelihoods of several endings behind one context, which is computed once.

A row of the batch is: context, first ending, second ending, ..., padding. A mask lets every ending see the context and
itself alone, and its positions begin where the context ends; so each gets the numbers that it would get by itself.
Shapes: B rows, T tokens a row, N places that predict scored tokens, C channels, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

# Families whose trees are tested against one ending at a time (tests/evaluation/test_hellaswag.py). Others are scored
# ending by ending: a recurrent or convolutional layer mixes the endings, ALiBi and GPT-Neo's local attention count
# places instead of positions, GPT-1 takes no such mask, and nothing in a config says so for all of them.
PREFIX_SHARING_FAMILIES = (
    "gpt2repro", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "codegen", "opt", "biogpt", "llama", "qwen2",
    "qwen3", "gemma", "phi", "stablelm", "olmo2", "granite", "mixtral", "smollm3", "persimmon",
)  # fmt: skip
CONTEXT, PADDING = 0, -1  # in place of the number of an ending, which begin at 1


@dataclass(frozen=True)
class PrefixGroup:
    """A context, at least one token, and the tokens of its endings; of each ending the last `scored` ones count."""

    context: Sequence[int]
    endings: Sequence[Sequence[int]]
    scored: Sequence[int]

    @property
    def inputs(self) -> int:
        """Tokens that the model reads: the last one of an ending is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def group_by_prefix(tokens: Sequence[Sequence[int]], scored: Sequence[int]) -> PrefixGroup:
    """Join sequences at what they have in common before their scored tokens.

    [5, 6, 7, 8], [5, 6, 9] with 1 scored token each -> context [5, 6], endings [7, 8] and [9].
    """
    longest = min(len(sequence) - count for sequence, count in zip(tokens, scored, strict=True))
    common = next((i for i in range(longest) if len({sequence[i] for sequence in tokens}) > 1), longest)
    return PrefixGroup(tokens[0][:common], [sequence[common:] for sequence in tokens], list(scored))


def supports_prefix_sharing(model: nn.Module) -> bool:
    """Whether a model can be scored so: of a family that was tested, with an attention that obeys a mask.

    Not with a sliding window: transformers takes a mask of four dimensions as it is, and the window is gone.
    """
    config = getattr(model, "config", None)
    return (
        getattr(config, "model_type", None) in PREFIX_SHARING_FAMILIES
        and config._attn_implementation in ("sdpa", "eager")
        and getattr(config, "sliding_window", None) is None
    )


@torch.no_grad()
def prefix_group_log_likelihoods(model: nn.Module, trees: Sequence[PrefixGroup]) -> list[list[float]]:
    """Log-probability of each ending of each tree, in nats."""
    parameter = next(model.parameters())
    T = max(tree.inputs for tree in trees)
    layouts = zip(*(_layout(tree, T) for tree in trees), strict=True)
    ids, positions, parts = (torch.tensor(values, device=parameter.device) for values in layouts)  # (B, T) each
    numbers: dict[tuple[int, int], int] = {}  # (row, place) -> its number among the N that predict something
    predictors, targets, counts = [], [], []
    for row, tree in enumerate(trees):
        context_end = start = len(tree.context)
        for ending, scored in zip(tree.endings, tree.scored, strict=True):
            # The context's last token predicts the first of every ending.
            predicting = [context_end - 1, *range(start, start + len(ending) - 1)]
            predictors += [numbers.setdefault((row, place), len(numbers)) for place in predicting[-scored:]]
            targets += ending[-scored:]
            counts.append(scored)
            start += len(ending) - 1
    with _logits_only_at(model, tuple(torch.tensor(list(numbers), device=parameter.device).T)):
        mask = _mask(parts, parameter.dtype)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits  # (N, V)
    # In fp32: scored in bf16, 1 % of HellaSwag's predictions are others.
    scores = logits.float().log_softmax(-1)[predictors, targets].cpu().double()
    sums = iter([part.sum().item() for part in scores.split(counts)])
    return [[next(sums) for _ in tree.endings] for tree in trees]


@contextmanager
def _logits_only_at(model: nn.Module, places: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Inside, the model's head sees the hidden states at these (row, place) only: (N, C), not (B, T, C)."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][places],))
    try:
        yield
    finally:
        hook.remove()


def _layout(tree: PrefixGroup, T: int) -> tuple[list[int], list[int], list[int]]:
    """A tree's ids, positions and parts (see CONTEXT), T each."""
    padding, context = T - tree.inputs, len(tree.context)
    ids, positions, parts = list(tree.context), list(range(context)), [CONTEXT] * context
    for number, ending in enumerate(tree.endings, start=1):
        ids += ending[:-1]
        positions += range(context, context + len(ending) - 1)
        parts += [number] * (len(ending) - 1)
    return ids + [0] * padding, positions + [0] * padding, parts + [PADDING] * padding


def _mask(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Parts (B, T) -> what is added to attention's weights, (B, 1, T, T): 0 where a query sees a key."""
    query, key = parts[:, :, None], parts[:, None, :]
    seen = ((key == CONTEXT) | (key == query)).tril()  # padding sees padding, so that no softmax is empty
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
