"""Score any causal language model on HellaSwag: which of four endings does it find most likely?

Two protocols share the name, and their numbers do not compare (GPT-2 124M: acc_norm 0.2955 and 0.3114):

|           | "completion" (build-nanogpt)          | "lm-eval" (lm-evaluation-harness 0.4)                    |
|-----------|---------------------------------------|----------------------------------------------------------|
| context   | `ctx` as it is                        | activity: ctx_a Ctx_b, WikiHow's [tags] removed          |
| ending    | " " + ending                          | " " + ending, tags removed                               |
| tokens    | context and ending encoded apart      | encoded together, cut after the context's tokens         |
| acc       | largest log-likelihood of the ending  | the same                                                 |
| acc_norm  | the same per token of the ending      | the same per character of the ending                     |

"completion" is defined for GPT-2's tokenizer: one that puts a space before every text (Llama 2's) doubles that of the
endings and scores it, so use "lm-eval" there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .examples import PROTOCOLS, Example
from .prefix_sharing import prefix_group_log_likelihoods
from .tokenize import Continuation, HellaSwagTask, Key, prepare_hellaswag


@dataclass(frozen=True)
class ExampleScores:
    """What a model says to one row under one protocol: no answer, which is wrong, where a score is NaN or infinite."""

    row: int  # its position in the list that was scored
    protocol: str
    label: int
    log_likelihoods: tuple[float, ...]  # nats, summed over an ending's tokens
    lengths: tuple[int, ...]  # tokens or characters, by protocol

    @property
    def is_finite(self) -> bool:
        """Whether every score is a number."""
        return all(map(math.isfinite, self.log_likelihoods))

    @property
    def prediction(self) -> int | None:
        """The likeliest ending."""
        return self.log_likelihoods.index(max(self.log_likelihoods)) if self.is_finite else None

    @property
    def prediction_norm(self) -> int | None:
        """The likeliest ending by its length."""
        # An ending of tags only has no character left: it can never be the best one.
        means = [a / b if b else -math.inf for a, b in zip(self.log_likelihoods, self.lengths, strict=True)]
        return means.index(max(means)) if self.is_finite else None

    @property
    def correct(self) -> bool:
        return self.prediction == self.label

    @property
    def correct_norm(self) -> bool:
        return self.prediction_norm == self.label


OnProgress = Callable[[list[ExampleScores]], None]


def score_hellaswag(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    protocols: Sequence[str] = PROTOCOLS,
    batch_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[ExampleScores]:
    """Score all rows, once: `prepare_hellaswag`, then `score_task`."""
    return score_task(model, prepare_hellaswag(model, tokenizer, rows, protocols, batch_tokens), on_progress)


def score_task(model: nn.Module, task: HellaSwagTask, on_progress: OnProgress | None = None) -> list[ExampleScores]:
    """Score this process's share; no process waits for another.

    Args:
        model: Called as `model(input_ids=..., use_cache=False)`, its trees also with a mask and positions; its output
            has `.logits` (B, T, V). Autocast around this call is kept. It is put into eval mode and back.
        on_progress: Gets the scores that a batch has completed. The longest sequences come first.

    Returns:
        One entry for each row and protocol, in the order of the rows.
    """
    score = prefix_group_log_likelihoods if task.as_trees else continuation_log_likelihoods
    sums: dict[Key, dict[int, float]] = {key: {} for key in task.lengths}
    scores, was_training = {}, model.training
    model.eval()
    try:
        for batch in task.batches:
            for item, totals in zip(batch, score(model, [item.work for item in batch]), strict=True):
                sums[item.key].update(zip(item.endings, totals, strict=True))
            done = [
                key for key in dict.fromkeys(item.key for item in batch) if len(sums[key]) == len(task.lengths[key])
            ]
            for key in done:
                in_order = tuple(total for _, total in sorted(sums[key].items()))
                scores[key] = ExampleScores(*key, task.rows[key[0]].label, in_order, task.lengths[key])
            if on_progress is not None:
                on_progress([scores[key] for key in done])
    finally:
        model.train(was_training)
    return [scores[key] for key in task.lengths]


@torch.no_grad()
def continuation_log_likelihoods(model: nn.Module, batch: Sequence[Continuation]) -> list[list[float]]:
    """Log-probability of each ending, in nats, for models that cannot be given trees: a list of one for each."""
    device = next(model.parameters()).device
    T = max(len(choice.tokens) for choice in batch) - 1
    # Padding stands on the right, where a causal model does not see it: no mask, whatever its id.
    inputs = torch.tensor([[*c.tokens[:-1], *[0] * (T + 1 - len(c.tokens))] for c in batch])  # (B, T)
    places = [(b, t) for b, c in enumerate(batch) for t in range(len(c.tokens) - 1)[-c.scored :]]
    targets = torch.tensor([batch[b].tokens[t + 1] for b, t in places])  # (N,), N scored tokens
    logits = model(input_ids=inputs.to(device), use_cache=False).logits  # (B, T, V)
    # Selected, then made fp32: a third of the positions. Scored in bf16, 1 % of the predictions are others.
    logits = logits[tuple(torch.tensor(places, device=device).T)].float()  # (N, V)
    losses = nn.functional.cross_entropy(logits, targets.to(device), reduction="none").cpu().double()  # (N,)
    return [[-ending.sum().item()] for ending in losses.split([c.scored for c in batch])]
