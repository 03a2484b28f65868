"""Samples: what the model goes on to say."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    length = ids["input_ids"].shape[1]
    room = model.config.n_positions - length
    if room < 1 or length == 0:
        raise ValueError(
            f"the prompt has {length} tokens; the context holds {model.config.n_positions}, and the prompt needs "
            "at least one token and room for one more."
        )
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
