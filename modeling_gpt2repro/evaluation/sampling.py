"""The lecture's sampling loop for any causal language model, with the model's own probability of each token."""

import inspect
import sys
from collections.abc import Collection, Iterable, Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .load_model import max_context


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
    end_ids: Collection[int | None] = (),
) -> Iterator[tuple[int, float]]:
    """Append new tokens to `ids` in place, until one of `end_ids` is drawn; yield each with the model's probability.

    Args:
        temperature: 0 takes the most likely token, as `generate(do_sample=False)` does.

    Raises:
        ValueError: If the model gives NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    context = max_context(model) or sys.maxsize
    accepted = inspect.signature(model.forward).parameters
    options = {name: value for name, value in {"use_cache": True, "logits_to_keep": 1}.items() if name in accepted}
    cache = None
    for _ in range(max_new_tokens):
        if len(ids) > context:  # every token moves to another position, so what the cache holds of them is wrong
            cache = None
        unread = ids[-context:] if cache is None else ids[-1:]  # the lecture's idx[:, -block_size:], or the new token
        known = {} if cache is None else {"past_key_values": cache}
        output = model(torch.tensor([unread], device=model.device), **known, **options)
        cache = getattr(output, "past_key_values", None)
        logits = output.logits[0, -1].float().cpu()  # (V,); on the CPU, a seed gives the same text on all devices
        probabilities = checked_softmax(logits, model)
        token = logits.argmax()
        if temperature > 0:
            top = logits.topk(min(top_k, len(logits)))
            scaled = (top.values - top.values[0]).double() / temperature  # 0 or less: no temperature overflows
            token = top.indices[torch.multinomial(scaled.softmax(-1), 1, generator=generator)]
        if token.item() in end_ids:
            return
        ids.append(token.item())
        yield token.item(), probabilities[token].item()


@torch.no_grad()
def token_probabilities(model: PreTrainedModel, ids: list[int]) -> list[float | None]:
    """The model's probability of each token after those before it; None for the first, and for those out of context.

    Raises:
        ValueError: If the model gives NaN.
    """
    read = torch.tensor([ids[-(max_context(model) or sys.maxsize) :]], device=model.device)  # (1, T)
    probabilities = checked_softmax(model(read).logits[0, :-1].float(), model)  # (T-1, V)
    found = probabilities.gather(1, read[0, 1:, None])[:, 0].tolist()
    return [None] * (len(ids) - len(found)) + found


def checked_softmax(logits: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    probabilities = logits.softmax(-1)
    if probabilities.isnan().any():
        raise ValueError(
            f"{model.name_or_path} gives NaN in place of probabilities: try --dtype float32, or check its weights."
        )
    return probabilities


def whole_characters(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterable[tuple[int, float | None]]
) -> Iterator[tuple[str, float | None]]:
    """The text of each token with its probability; of tokens that share a character, together, with the product."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    before, held, joint = [], [], 1.0
    for token, probability in tokens:
        held.append(token)
        joint = None if joint is None or probability is None else joint * probability
        # Decoded together with the tokens before: some tokenizers drop the space of a text's first token.
        text = decode(before + held)[len(decode(before)) :]
        if not text.endswith("\ufffd"):  # which replaces bytes that are no character, or not yet a whole one
            yield text, joint
            before, held, joint = held, [], 1.0
    if held:
        yield decode(before + held)[len(decode(before)) :], joint
