"""Log-likelihoods of several endings behind one context, which is computed once for all of them.

The endings lie one behind the other in one sequence, as if they were a single text. "sat down there" and "ran off"
behind "the cat", were every word a token (the last token of an ending is only predicted, so it is left out):

    tokens      the  cat  sat  down  ran
    positions     0    1    2     3    2    each ending begins where the context ends
    segments      0    0    1     1    2    a query sees the context, 0, and its own segment

The mask keeps the endings from seeing each other, and the positions repeat, so each ending gets the numbers that it
would get alone. Four endings then cost one context instead of four.

Shapes: B sequences, T tokens each, N tokens that predict a scored token, C channels, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

# Families for which tests/evaluation/test_hellaswag_families.py compares this with one ending at a time. All others are
# scored ending by ending, since no config says whether it works for them: recurrent and convolutional layers mix the
# endings; ALiBi and GPT-Neo's local attention use distances in the sequence, not positions; GPT-1 takes no such mask.
PREFIX_SHARING_FAMILIES = (
    "gpt2repro", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "codegen", "opt", "biogpt", "llama", "qwen2",
    "qwen3", "gemma", "phi", "stablelm", "olmo2", "granite", "mixtral", "smollm3", "persimmon",
)  # fmt: skip
CONTEXT = 0  # segment of the context; the endings are 1, 2, ...
PADDING = -1


@dataclass(frozen=True)
class PrefixGroup:
    """A context of at least one token and the endings behind it; of each ending the last `num_scored` tokens count."""

    context: Sequence[int]
    endings: Sequence[Sequence[int]]
    num_scored: Sequence[int]

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last of each ending, which is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def group_by_prefix(sequences: Sequence[Sequence[int]], num_scored: Sequence[int]) -> PrefixGroup:
    """Split sequences into the prefix that all of them share, scored tokens excluded, and the rest of each.

    [5, 6, 7, 8], [5, 6, 9] with 1 scored token each -> context [5, 6], endings [7, 8] and [9].
    """
    longest = min(len(sequence) - count for sequence, count in zip(sequences, num_scored, strict=True))
    shared = next((i for i in range(longest) if len({sequence[i] for sequence in sequences}) > 1), longest)
    return PrefixGroup(sequences[0][:shared], [sequence[shared:] for sequence in sequences], list(num_scored))


def supports_prefix_sharing(model: nn.Module) -> bool:
    """Whether the model is of a tested family, and its attention obeys a 4-dimensional mask.

    Not with a sliding window: transformers uses a 4-dimensional mask as it is, and the window would be lost.
    """
    config = getattr(model, "config", None)
    return (
        getattr(config, "model_type", None) in PREFIX_SHARING_FAMILIES
        and config._attn_implementation in ("sdpa", "eager")
        and getattr(config, "sliding_window", None) is None
    )


@torch.no_grad()
def prefix_group_log_likelihoods(model: nn.Module, groups: Sequence[PrefixGroup]) -> list[list[float]]:
    """Log-probability of each ending of each group, in nats."""
    parameter = next(model.parameters())
    T = max(group.num_inputs for group in groups)
    layouts = zip(*(_layout(group, T) for group in groups), strict=True)
    ids, positions, segments = (torch.tensor(values, device=parameter.device) for values in layouts)  # (B, T) each
    # (sequence, t) -> its row in the (N, V) logits. The context's last token predicts for all endings from one row.
    rows: dict[tuple[int, int], int] = {}
    predictors = []
    targets = []
    for number, group in enumerate(groups):
        context_end = len(group.context)
        start = context_end
        for ending, num_scored in zip(group.endings, group.num_scored, strict=True):
            # Logits at t are about the next token. So the context's last token predicts the first token of every
            # ending, although only the first ending lies right behind it.
            steps = [context_end - 1, *range(start, start + len(ending) - 1)]
            predictors += [rows.setdefault((number, t), len(rows)) for t in steps[-num_scored:]]
            targets += ending[-num_scored:]
            start += len(ending) - 1
    with _logits_only_at(model, tuple(torch.tensor(list(rows), device=parameter.device).T)):
        mask = _mask(segments, parameter.dtype)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits  # (N, V)
    # In float32, because bfloat16 keeps 8 bits of a log-probability: it would change 1 % of HellaSwag's predictions.
    log_probs = logits.float().log_softmax(-1)[predictors, targets].cpu().double()  # one for each scored token
    counts = [num_scored for group in groups for num_scored in group.num_scored]
    sums = iter([ending.sum().item() for ending in log_probs.split(counts)])
    return [[next(sums) for _ in group.endings] for group in groups]


@contextmanager
def _logits_only_at(model: nn.Module, indices: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Give the model's head the hidden states at these (sequence, t) only, (N, C) instead of (B, T, C).

    Logits of all tokens would be the largest tensor by far: V is 50,257, C is 768.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][indices],))
    try:
        yield
    finally:
        hook.remove()


def _layout(group: PrefixGroup, T: int) -> tuple[list[int], list[int], list[int]]:
    """A group's ids, positions and segments, padded to T on the right."""
    padding = T - group.num_inputs
    context_end = len(group.context)
    ids = list(group.context)
    positions = list(range(context_end))
    segments = [CONTEXT] * context_end
    for number, ending in enumerate(group.endings, start=1):
        ids += ending[:-1]
        positions += range(context_end, context_end + len(ending) - 1)
        segments += [number] * (len(ending) - 1)
    return ids + [0] * padding, positions + [0] * padding, segments + [PADDING] * padding


def _mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Segments (B, T) -> what is added to the attention scores, (B, 1, T, T): 0 where a query may see a key."""
    query = segments[:, :, None]
    key = segments[:, None, :]
    # Padding may see padding: a softmax over nothing would be NaN.
    visible = ((key == CONTEXT) | (key == query)).tril()
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
