"""Score a model on whole stories that it has not seen, beside the best score that any model can have.

    python -m modeling_gpt2repro.evaluation.stories --model runs/stories/model
    python -m modeling_gpt2repro.evaluation.stories --model runs/stories/step-001000 --num_stories 500

Each story is read by itself. Scored are all of its tokens but the first, which is the same in all stories, and the
end-of-text after it, because a model has to know that the story is over.

The floor: a story that was written from b random bits has the probability 2^-b, so a model that knows the grammar has a
loss of b * ln(2) nats on it. Another one may be luckier on some stories, but never on average. Both are in nats a
story, which compares across tokenizers.

Names, animals and things: the story has named them before, and the model must find them again. One is right if each of
its tokens is the most likely one for the model, given the story up to there.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import log
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro.data.batches.sequences import IGNORE_INDEX
from modeling_gpt2repro.data.sources.stories import NUM_STORIES, Story, built_in_story
from modeling_gpt2repro.data.tokenize import is_validation
from modeling_gpt2repro.runs.config import read_run_config
from modeling_gpt2repro.runtime.collectives import call_main_process_first
from modeling_gpt2repro.runtime.command_line import (
    InputErrors,
    arg,
    check_limits,
    exit_on_input_error,
    parse_command_line,
)
from modeling_gpt2repro.runtime.network import choose_gloo_interface
from modeling_gpt2repro.storage.json_files import is_size

from .load_model import best_device, device_problem, load_causal_lm, max_context, model_problem

BATCH_STORIES = 8  # in one forward; GPT-2's logits of 8 stories of 200 tokens take 0.3 GB in float32
Span = tuple[int, int]  # the first character, and one after the last


def held_out_stories(validation_share: float, count: int = 128) -> list[Story]:
    """The first `count` stories, or all, that a preparation with this `validation_share` does not train on.

    What is held out is a combination of hero, animal and object, with all of its stories.
    """
    stories = map(built_in_story, range(NUM_STORIES))
    held_out = (story for story in stories if is_validation(f"story:{story.combination}", validation_share))
    return list(islice(held_out, count))


def story_floor(stories: Sequence[Story]) -> float:
    """The loss of a model that knows the grammar, in nats a story."""
    return sum(story.bits for story in stories) * log(2) / len(stories)


def longest_story(tokenizer: PreTrainedTokenizerBase, stories: Sequence[Story]) -> int:
    """Tokens of the longest one, which a model must be able to read to be scored."""
    return max(len(ids) for ids, _ in encode_stories(tokenizer, stories))


def encode_stories(
    tokenizer: PreTrainedTokenizerBase, stories: Sequence[Story]
) -> Iterator[tuple[list[int], list[Span]]]:
    """Of each story its ids, without end-of-text, and the characters that each of them spells."""
    encoded = tokenizer(
        [story.text for story in stories], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


@torch.no_grad()
def score_stories(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, stories: Sequence[Story], device: torch.device
) -> dict[str, float]:
    """Score the stories, each on one of the processes; every process gets the numbers of all.

    Args:
        model: Any module whose output has `.logits` (B, T, V). Put into eval mode (no dropout) and back. Unwrapped,
            because processes may have different numbers of batches.
        stories: The same on all processes; each must fit into the model's context, see `longest_story`.

    Returns:
        Numbers for metrics.jsonl: `story_loss` and `story_floor` in nats a story, the share `story_mentions_right`,
        and the same by kind, `story_hero_right`, ...; {} without stories.
    """
    if not stories:
        return {}
    state = PartialState()
    encoded = list(encode_stories(tokenizer, stories))
    longest_first = sorted(range(len(stories)), key=lambda index: len(encoded[index][0]), reverse=True)
    mine = longest_first[state.process_index :: state.num_processes]
    nats, counts = 0.0, Counter()
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(mine), BATCH_STORIES):
            batch = mine[first : first + BATCH_STORIES]  # of similar length, so that little is padding
            inputs, targets = as_padded_batch([encoded[index][0] for index in batch], tokenizer.eos_token_id)
            logits = model(input_ids=inputs.to(device), use_cache=False).logits.float()  # (B, T, V)
            flat_targets = targets.to(device).flatten()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), flat_targets, reduction="none")
            nats += losses.cpu().double().sum().item()  # of padding they are 0
            is_right = logits.argmax(-1).cpu() == targets  # (B, T)
            for right, index in zip(is_right.tolist(), batch, strict=True):
                counts += count_mentions(stories[index], encoded[index][1], right)
    finally:
        model.train(was_training)
    shares = gather_object([(nats, counts)])
    counts = sum((share[1] for share in shares), Counter())
    kinds = sorted({kind for story in stories for _, _, kind in story.mentions})
    return {
        "story_loss": sum(share[0] for share in shares) / len(stories),
        "story_floor": story_floor(stories),
        "story_mentions_right": sum(counts[kind, True] for kind in kinds) / sum(counts[kind] for kind in kinds),
        **{f"story_{kind}_right": counts[kind, True] / counts[kind] for kind in kinds},
    }


def as_padded_batch(sequences: Sequence[Sequence[int]], end_of_text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of stories, the longest first -> inputs and targets, (B, T) each: [[5, 6], [7]] with 0 as end-of-text gives
    [[5, 6], [7, 0]] and [[6, 0], [0, -100]].
    """
    # Padding is on the right, where no token of the story sees it: any id will do, and no mask is needed.
    inputs = torch.full((len(sequences), len(sequences[0])), end_of_text)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, ids in enumerate(sequences):
        inputs[row, : len(ids)] = torch.tensor(ids)
        targets[row, : len(ids)] = torch.tensor([*ids[1:], end_of_text])
    return inputs, targets


def count_mentions(story: Story, spans: Sequence[Span], is_right: Sequence[bool]) -> Counter:
    """How many mentions there are by kind, and how many of them are right, under (kind, True).

    Args:
        spans: Characters of each token. One may begin before the name, with the space.
        is_right: Whether each token but the first was the most likely one; what follows does not matter.
    """
    counts = Counter()
    for start, stop, kind in story.mentions:
        tokens = [place for place, (first, last) in enumerate(spans) if first < stop and last > start]
        counts[kind] += 1
        counts[kind, True] += all(is_right[place - 1] for place in tokens)
    return counts


@dataclass
class StoryArguments:
    """Which model to score on how many stories."""

    model: str = arg(default="runs/quickstart/model", help="Model to score: a folder, or a model on the Hub.")
    trust_remote_code: bool = arg(default=False, help="Let the model's repository run its own Python code.")
    num_stories: int = arg(default=128, minimum=1, help="How many stories; fewer if fewer are held out.")
    validation_share: float | None = arg(
        default=None,
        above=0,
        below=1,
        help="The share of the stories that was held out when the model was trained. If not given, that of its run, or "
        "0.05 for a model that is not in the folder of a run.",
    )
    device: str | None = arg(
        default=None, help="'cuda', 'mps' or 'cpu'. If not given, the first of these that exists; of several, one each."
    )

    def __post_init__(self):
        self.device = self.device or best_device()
        problems = filter(None, (model_problem(self.model), device_problem(self.device)))
        InputErrors([*check_limits(self), *problems]).raise_if_any()


def main(argv: list[str] | None = None) -> None:
    args = parse_command_line(StoryArguments, argv, description=__doc__)
    with exit_on_input_error():
        choose_gloo_interface()
        state = PartialState(cpu=args.device == "cpu")
        device = state.device if state.num_processes > 1 else torch.device(args.device)
        model, tokenizer = call_main_process_first(
            state, lambda: load_causal_lm(args.model, "float32", device, args.trust_remote_code)
        )
        stories = held_out_stories(args.validation_share or share_of_run(args.model), args.num_stories)
        check_can_read(args.model, model, tokenizer, stories)
        numbers = score_stories(model, tokenizer, stories, device)
    if state.is_main_process:
        kinds = [name for name in numbers if name.endswith("_right") and name != "story_mentions_right"]
        by_kind = ", ".join(f"{name.split('_')[1]} {numbers[name]:.1%}" for name in kinds)
        ratio = numbers["story_loss"] / numbers["story_floor"]
        print(f"\n{args.model} on {len(stories):,} whole stories that were held out")
        print(f"nats a story     {numbers['story_loss']:.2f}, {ratio:.3f} x the floor")
        print(f"floor            {numbers['story_floor']:.2f}")
        print(f"right            {numbers['story_mentions_right']:.1%} of names, animals and things: {by_kind}")
    state.destroy_process_group()


def share_of_run(model: str) -> float:
    """The share that its run has held out, if the model is in the folder of a run; else that of the quickstart."""
    share = read_run_config(Path(model).parent).get("arguments", {}).get("validation_share")
    return share if is_size(share) and share else 0.05


def check_can_read(name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, stories: Sequence[Story]):
    """Raise ValueError unless there are stories, and they can be encoded, and fit into the context."""
    if not stories:
        raise ValueError("no story is held out by so small a --validation_share: give a larger one.")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer must be a fast one with an end-of-text token.")
    longest = longest_story(tokenizer, stories)
    context = max_context(model)
    if context and longest > context:
        raise ValueError(f"--model {name}: its context of {context} tokens is too short for a story of {longest}.")


if __name__ == "__main__":
    main()
