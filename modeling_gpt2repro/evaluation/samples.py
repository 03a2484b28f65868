"""Samples: what the model goes on to say."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, n_positions: int) -> int:
    """The prompt's length in tokens.

    Raises:
        ValueError: If it is empty or leaves no room in the context.
    """
    length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not 0 < length < n_positions:
        raise ValueError(
            f"the prompt has {length} tokens; it needs at least 1 and, in a context of {n_positions}, at most "
            f"{n_positions - 1}: give another."
        )
    return length


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    top_k: int = 50,
) -> list[str]:
    """Continue a prompt `num_samples` times, stopping at end-of-text.

    The seed decides the samples alone: the run's own random numbers are left as they were.

    Args:
        max_new_tokens: Fewer where the context is full earlier.
        top_k: Sample among so many likeliest tokens; 50 as in the lecture.

    Raises:
        ValueError: If the prompt leaves no room in the context.
    """
    room = model.config.n_positions - check_prompt(prompt, tokenizer, model.config.n_positions)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        texts = model.generate(
            **ids,
            do_sample=True,
            top_k=top_k,
            max_new_tokens=min(max_new_tokens, room),
            num_return_sequences=num_samples,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    return tokenizer.batch_decode(texts, skip_special_tokens=True)
