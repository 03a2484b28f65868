"""Score any causal language model on HellaSwag: which of four endings does it find most likely?

Two protocols share the name, and their numbers do not compare (GPT-2 124M: acc_norm 0.2955 and 0.3114):

|           | "completion"                          | "lm-eval"                                                |
|-----------|---------------------------------------|----------------------------------------------------------|
| context   | `ctx` as it is                        | activity: ctx_a Ctx_b, WikiHow's [tags] removed          |
| ending    | " " + ending                          | " " + ending, tags removed                               |
| tokens    | context and ending encoded apart      | encoded together, cut after the context's tokens         |
| acc       | largest log-likelihood of the ending  | the same                                                 |
| acc_norm  | the same per token of the ending      | the same per character of the ending                     |

"completion" is build-nanogpt's: https://github.com/karpathy/build-nanogpt/blob/master/hellaswag.py
"lm-eval" is lm-evaluation-harness 0.4's, with which most published numbers are made:
https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks/hellaswag

"completion" is defined for GPT-2's tokenizer. One that puts a space before every text (Llama 2's) doubles the space
before an ending and scores it: use "lm-eval" there.

Shapes: B sequences, T tokens each, N scored tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from .examples import PROTOCOLS, Example
from .prefix_sharing import prefix_group_log_likelihoods
from .tokenize import Continuation, HellaSwagTask, Key, prepare_hellaswag


@dataclass(frozen=True)
class ExampleScores:
    """A model's scores for one example under one protocol. With a NaN or infinite score there is no prediction."""

    index: int  # of the example, in the list that was scored
    protocol: str
    label: int
    log_likelihoods: tuple[float, ...]  # nats, summed over an ending's tokens
    lengths: tuple[int, ...]  # of the endings, in tokens ("completion") or characters ("lm-eval")

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.log_likelihoods))

    @property
    def prediction(self) -> int | None:
        """The most likely ending: largest log P(ending | context), the sum over its tokens.

        Every token costs some nats, so this favors short endings.
        """
        return self.log_likelihoods.index(max(self.log_likelihoods)) if self.is_finite else None

    @property
    def prediction_norm(self) -> int | None:
        """The ending that is most likely for its length: the mean in place of the sum, fair to long endings.

        Per token the mean depends on the tokenizer; per character it compares across models.
        """
        # An ending of nothing but tags has no character left: it can never be the best one.
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
    examples: Sequence[Example],
    protocols: Sequence[str] = PROTOCOLS,
    batch_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[ExampleScores]:
    """Tokenize and score all examples on this process: `prepare_hellaswag`, then `score_task`."""
    return score_task(model, prepare_hellaswag(model, tokenizer, examples, protocols, batch_tokens), on_progress)


def score_task(model: nn.Module, task: HellaSwagTask, on_progress: OnProgress | None = None) -> list[ExampleScores]:
    """Score this process's examples; no process waits for another.

    Args:
        model: Called as `model(input_ids=..., use_cache=False)`, with PrefixGroups also with a mask and positions; its
            output has `.logits` (B, T, V). It is put into eval mode (no dropout) and back. An autocast around this call
            stays in force.
        on_progress: Receives the scores that each batch has completed. The longest sequences come first.

    Returns:
        One entry for each example and protocol, in the order of the examples.
    """
    log_likelihoods = prefix_group_log_likelihoods if task.shares_prefixes else continuation_log_likelihoods
    # The endings of one example may be in different batches: its scores are complete once all four are here.
    found: dict[Key, dict[int, float]] = {key: {} for key in task.lengths}
    scores: dict[Key, ExampleScores] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in task.batches:
            sums = log_likelihoods(model, [request.sequence for request in batch])
            for request, of_request in zip(batch, sums, strict=True):
                found[request.key].update(zip(request.endings, of_request, strict=True))
            keys = dict.fromkeys(request.key for request in batch)
            completed = [key for key in keys if len(found[key]) == len(task.lengths[key])]
            for key in completed:
                index, protocol = key
                in_order = tuple(total for _, total in sorted(found[key].items()))
                label = task.examples[index].label
                scores[key] = ExampleScores(index, protocol, label, in_order, task.lengths[key])
            if on_progress is not None:
                on_progress([scores[key] for key in completed])
    finally:
        model.train(was_training)
    return [scores[key] for key in task.lengths]


@torch.no_grad()
def continuation_log_likelihoods(model: nn.Module, batch: Sequence[Continuation]) -> list[list[float]]:
    """Log-probability of each ending, in nats, behind its own copy of the context: a list of one for each.

    For models without prefix sharing, and the shortest statement of what HellaSwag computes.
    """
    device = next(model.parameters()).device
    T = max(len(continuation.tokens) for continuation in batch) - 1
    inputs = torch.zeros(len(batch), T, dtype=torch.long)
    indices = []
    targets = []
    for row, (tokens, num_scored, _) in enumerate(batch):
        num_inputs = len(tokens) - 1  # the last token is predicted, but predicts nothing
        # Padding goes on the right: a causal model never sees it from a real token, so any id will do and no mask is
        # needed. On the left it would be seen, and would shift the positions that GPT-2 has learned.
        inputs[row, :num_inputs] = torch.tensor(tokens[:-1])
        # Logits at t are about token t + 1: the context's last token predicts the ending's first.
        indices += [(row, t) for t in range(num_inputs - num_scored, num_inputs)]
        targets += tokens[-num_scored:]
    logits = model(input_ids=inputs.to(device), use_cache=False).logits  # (B, T, V)
    # Select the logits that predict the ending, about a third, then convert. In float32, because bfloat16 keeps 8 bits
    # of a log-probability: it would change 1 % of HellaSwag's predictions.
    logits = logits[tuple(torch.tensor(indices, device=device).T)].float()  # (N, V)
    losses = nn.functional.cross_entropy(logits, torch.tensor(targets).to(device), reduction="none")  # (N,)
    counts = [continuation.num_scored for continuation in batch]
    return [[-ending.sum().item()] for ending in losses.cpu().double().split(counts)]


def gather_scores(scores: Sequence[ExampleScores]) -> list[ExampleScores]:
    """The scores of all processes, in the order of the examples; each process gets all of them."""
    return sorted(gather_object(list(scores)), key=lambda example_scores: example_scores.index)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Compute in the precision of the weights: with bfloat16 logits about 1 % of HellaSwag's predictions change.

    Accelerate keeps its autocast in a `forward` on the instance, which hides the class's own. FlashAttention, which
    takes 16 bits only, and attention written out, which is slower, are replaced by sdpa for float32 weights.
    """
    accelerate_forward = model.__dict__.pop("forward", None)
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None) or ""
    needs_sdpa = ("flash" in attention or attention == "eager") and next(model.parameters()).dtype == torch.float32
    try:
        if needs_sdpa:
            config._attn_implementation = "sdpa"
        yield
    finally:
        if needs_sdpa:
            config._attn_implementation = attention
        if accelerate_forward is not None:
            model.forward = accelerate_forward
