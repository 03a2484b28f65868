"""Generate sample texts during training, without disturbing the run's random numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, n_positions: int) -> int:
    """The prompt's length in tokens.

    Raises:
        ValueError: If it is empty or leaves no room in the context.
    """
    length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not 0 < length < n_positions:
        raise ValueError(
            f"the prompt has {length} tokens ({prompt!r:.40}); it needs at least 1 and, in a context of {n_positions}, "
            f"at most {n_positions - 1}: give another."
        )
    return length


def sample_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    top_k: int = 50,
) -> list[list[str]]:
    """Continue each prompt `num_samples` times, until end-of-text: for each prompt its texts, prompt included.

    A text depends only on the weights, its prompt and (seed, number of the prompt, number of the sample): more prompts,
    more samples or more processes do not change the others. Each is therefore generated alone, since the logits of a
    batch are rounded differently, and another token may win. The state of torch's global generators is restored.

    Args:
        max_new_tokens: Fewer if the context is full earlier.
        top_k: Sample from this many most likely tokens; 50 as in the lecture.

    Raises:
        ValueError: If a prompt leaves no room in the context.
    """
    n_positions = model.config.max_position_embeddings
    continuations = []
    was_training = model.training
    model.eval()
    try:
        for prompt_number, prompt in enumerate(prompts):
            room = n_positions - check_prompt(prompt, tokenizer, n_positions)
            config = GenerationConfig(
                do_sample=True,
                top_k=top_k,
                max_new_tokens=min(max_new_tokens, room),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                use_cache=True,
            )
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
            texts = []
            for number in range(num_samples):
                with seeded_rng([seed, prompt_number, number], model.device):
                    [ids] = model.generate(**inputs, generation_config=config)
                texts.append(tokenizer.decode(ids, skip_special_tokens=True))
            continuations.append(texts)
    finally:
        model.train(was_training)
    return continuations


@contextmanager
def seeded_rng(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """Seed torch's generators from these integers inside the block; restore their state afterwards."""
    accelerator = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], **accelerator):
        # SeedSequence mixes the integers, so that (seed, prompt, sample) and its neighbors share no random numbers.
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]))
        yield
