"""The defaults of the training script; its command line is tested in tests/runtime/test_command_line.py."""

import re

import pytest

from modeling_gpt2repro.data.sources.stories import WORDS, write_story
from modeling_gpt2repro.runtime.command_line import parse_command_line
from modeling_gpt2repro.training.arguments import TrainArguments


def test_the_defaults_are_those_of_the_lecture():
    args = TrainArguments()
    assert (args.total_steps, args.warmup_steps, args.sequences_per_step) == (19073, 715, 512)
    assert args.tokens_per_step == 524288
    assert (args.lr_scheduler_type, args.final_learning_rate_ratio, args.cooldown_tokens) == ("cosine", 0.1, None)


def test_other_schedules_end_at_zero_and_wsd_decays_in_the_last_fifth():
    assert TrainArguments(lr_scheduler_type="linear").final_learning_rate_ratio == 0
    args = TrainArguments(lr_scheduler_type="wsd", train_tokens=10**9)
    assert (args.cooldown_tokens, args.final_learning_rate_ratio) == (2 * 10**8, 0)
    assert TrainArguments(lr_scheduler_type="wsd", final_learning_rate_ratio=0.1).final_learning_rate_ratio == 0.1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cooldown_tokens": 10**9}, "cooldown_tokens (1000000000) is for --lr_scheduler_type wsd, not cosine: leave"),
        (
            {"lr_scheduler_type": "wsd", "cooldown_tokens": 9_700_000_000},
            "cooldown_tokens (9700000000) and warmup_tokens (375000000) must not be more than train_tokens",
        ),
    ],
)
def test_a_cool_down_that_cannot_be_is_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        TrainArguments(**given)


HELLO = "Hello, I'm a language model,"
TITLE = "A story of Mila and Tom, Mrs. Plum, a fox, a bell and some honey."
PRESETS = {"gpt2-124m": {}, "own-text": {"sample_prompts": ["Preset"], "dataset_name": "stories"}}


@pytest.mark.parametrize(
    ("flags", "prompts"),
    [
        ([], [HELLO]),
        (["--dataset_name", "stories"], [TITLE]),
        (["--dataset_name", "python-prose"], ["This module provides"]),
        (["--dataset_name", "stories", "--shards", "."], [HELLO]),  # stories are not what it trains on
        (["--dataset_name", "stories", "--mix", ".:1.0"], [HELLO]),
        (["--preset", "own-text"], ["Preset"]),
        (["--preset", "own-text", "--sample_prompts", "A", "B"], ["A", "B"]),
        (["--dataset_name", "stories", "--sample_prompts", "A"], ["A"]),
    ],
)
def test_prompts_fit_the_data_unless_a_preset_or_a_flag_names_others(flags, prompts):
    assert parse_command_line(TrainArguments, flags, PRESETS).sample_prompts == prompts


def test_the_prompt_for_stories_begins_one_of_them():
    """Of the 2^27 titles only a few are in the text, so the first story stands for its form, with its words."""
    assert TrainArguments(dataset_name="stories").sample_prompts == [TITLE]
    title = write_story(0).text.partition("\n")[0]
    form = r"A story of (\w+) and (\w+), (Mrs?\. \w+), a (\w+), a (\w+) and some (\w+)\."
    words = re.fullmatch(form, TITLE).groups()
    assert re.fullmatch(form, title)
    for word, kind in zip(words, ("girl", "boy", "elder", "animal", "object", "food"), strict=True):
        assert word in WORDS[kind]


def test_stories_have_a_known_size_and_a_tokenizer_of_their_own():
    args = TrainArguments(dataset_name="stories", num_train_epochs=2.0, train_tokens=None)
    assert (args.built_in_text, args.train_tokens) == ("stories", None)
    assert TrainArguments().built_in_text is None
    with pytest.raises(ValueError, match="shards, stories and python-prose have their own"):
        TrainArguments(dataset_name="stories", tokenizer="gpt2")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"recipe": "muon"},
            r"^muon \(modded-nanogpt.*\); predicted, not measured: 0\.42 x the tokens for the loss of",
        ),
        ({"recipe": "fast-adamw"}, r"^fast-adamw \(modded-nanogpt.*predicted, not measured: 0\.65 x the tokens"),
        ({"recipe": "muon", "preset": "gpt2-350m", "n_layer": 24}, r"^muon; no source has tried it at this size"),
        ({"recipe": "muon", "n_layer": 11}, r"^muon; no source has tried it at this size"),
        ({"recipe": "muon", "init_from": "gpt2"}, r"^muon; no source has tried it in fine-tuning$"),
        (
            {"recipe": "fast-adamw", "preset": "quickstart", "n_layer": 2},
            r"with 1 x .* that of the preset quickstart$",
        ),
    ],
)
def test_a_recipe_names_its_source_where_there_is_one(given, sentence):
    assert re.search(sentence, TrainArguments(**given).recipe_summary)
