"""Scores of whole stories: loss, floor and mentions against models whose every probability is known."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from toy_runs import CPU_FP32

from modeling_gpt2repro.data.sources.stories import Story, story_documents
from modeling_gpt2repro.data.tokenize import is_validation
from modeling_gpt2repro.data.tokenizer import train_tokenizer
from modeling_gpt2repro.evaluation.stories import (
    as_padded_batch,
    held_out_stories,
    longest_story,
    main,
    score_stories,
    story_floor,
)
from modeling_gpt2repro.hub.export import save_hub_folder

CPU = torch.device("cpu")
# Two stories of one bit each: the first letter after the "I" that all stories begin with decides the rest.
ANN = Story("I, Ann, saw a cat. Ann likes the cat.", 1, "Ann cat", [(19, 22, "hero"), (33, 36, "animal")])
BOB = Story("I, Bob, saw a dog. Bob likes the dog.", 1, "Bob dog", [(19, 22, "hero"), (33, 36, "animal")])
SHARE = 0.05


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A token for each byte, so that tokens can be counted by hand: 256, and end-of-text, which is 0."""
    return train_tokenizer(["x"], vocab_size=257)


class Known(torch.nn.Module):
    """Knows which sequences there are, and gives all tokens that may follow the same probability.

    `change(logits, place)` has the last word on what comes after the token at `place`.
    """

    def __init__(self, tokenizer, stories, change=lambda logits, place: logits):
        super().__init__()
        self.sequences = [[*tokenizer(story.text)["input_ids"], 0] for story in stories]
        self.change = change

    def forward(self, input_ids, use_cache):
        logits = torch.full((*input_ids.shape, 257), -1e4)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                next_ids = {
                    s[place + 1] for s in self.sequences if s[: place + 1] == ids[: place + 1] and s[place + 1 :]
                }
                for token in next_ids:
                    logits[row, place, token] = 0.0
                logits[row, place] = self.change(logits[row, place], place)
        return SimpleNamespace(logits=logits)


def right(numbers):
    return {name: value for name, value in numbers.items() if name.endswith("_right")}


def test_the_floor_is_the_entropy_of_a_story(bytes_tokenizer):
    """Stories of 10 and 20 bits: 30 * ln(2) = 20.794 nats, half of it each. The longer one has 9 letters."""
    stories = [Story("A bee", 10, "", []), Story("Big bears", 20, "", [])]
    assert story_floor(stories) == pytest.approx(20.794415 / 2)
    assert longest_story(bytes_tokenizer, stories) == 9


def test_a_model_that_knows_the_grammar_is_at_the_floor_with_every_mention_right(bytes_tokenizer):
    numbers = score_stories(Known(bytes_tokenizer, [ANN, BOB]), bytes_tokenizer, [ANN, BOB, ANN], CPU)
    assert numbers["story_loss"] == pytest.approx(0.693147)  # ln(2): one letter, and nothing else
    assert numbers["story_floor"] == pytest.approx(0.693147)
    assert "story_tokens" not in numbers
    assert right(numbers) == {"story_mentions_right": 1, "story_hero_right": 1, "story_animal_right": 1}


def test_a_model_that_is_always_wrong_has_no_mention_right(bytes_tokenizer):
    model = Known(bytes_tokenizer, [ANN, BOB], change=lambda logits, place: -logits)
    numbers = score_stories(model, bytes_tokenizer, [ANN, BOB], CPU)
    assert right(numbers) == {"story_mentions_right": 0, "story_hero_right": 0, "story_animal_right": 0}
    assert numbers["story_loss"] > 100


@pytest.mark.parametrize(
    ("place", "hero", "animal"),
    [(18, 1, 1), (19, 0, 1), (20, 0, 1), (21, 0, 1), (22, 1, 1), (32, 1, 1), (33, 1, 0), (35, 1, 0), (36, 1, 1)],
)
def test_a_mention_is_right_if_each_of_its_tokens_is(bytes_tokenizer, place, hero, animal):
    """One token is wrong, the one that spells the letter at `place`: 19 to 21 are the second Ann, 33 to 35 the cat."""
    model = Known(bytes_tokenizer, [ANN], change=lambda logits, at: -logits if at == place - 1 else logits)
    numbers = score_stories(model, bytes_tokenizer, [ANN], CPU)
    mean = (hero + animal) / 2
    assert right(numbers) == {"story_mentions_right": mean, "story_hero_right": hero, "story_animal_right": animal}


def test_the_space_before_a_name_is_part_of_its_token():
    tokenizer = train_tokenizer([f"{ANN.text} "] * 50, vocab_size=273)
    ids = tokenizer(ANN.text)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    second = len(pieces) - 1 - pieces[::-1].index("ĠAnn")
    for wrong, hero in ((second, 0), (second - 1, 1), (second + 1, 1)):

        def forward(input_ids, use_cache, wrong=wrong):
            logits = torch.zeros(1, len(ids), 273)
            for place, token in enumerate([*ids[1:], 0]):  # after the token at `place` comes the next one
                logits[0, place, token] = -1.0 if place == wrong - 1 else 1.0
            return SimpleNamespace(logits=logits)

        model = torch.nn.Module()
        model.forward = forward
        assert score_stories(model, tokenizer, [ANN], CPU)["story_hero_right"] == hero


def test_even_guesses_cost_ln_of_the_vocabulary_for_each_token_but_the_first_and_the_end(bytes_tokenizer):
    """Stories of 37 and 7 letters: 36 + 6 of them are scored, and two ends, 44 tokens in two stories."""
    model = Known(bytes_tokenizer, [], change=lambda logits, place: 0 * logits)
    stories = [ANN, Story("I, Bob.", 3, "", [(3, 6, "hero")])]
    numbers = score_stories(model, bytes_tokenizer, stories, CPU)
    assert numbers["story_loss"] == pytest.approx(22 * math.log(257), rel=1e-6)
    assert numbers["story_floor"] == pytest.approx(2 * math.log(2))  # of 1 and 3 bits


def test_padded_batches_have_the_next_tokens_as_targets():
    inputs, targets = as_padded_batch([[5, 6], [7]], 0)
    assert inputs.tolist() == [[5, 6], [7, 0]]
    assert targets.tolist() == [[6, 0], [0, -100]]


@pytest.fixture
def some_stories():
    """20 of different lengths, more than a batch, so that some are padded."""
    texts = [("Ann and Bob saw a big old cat. " * 3)[: 20 + 3 * number] for number in range(20)]
    return [Story(text, number, "", [(8, 11, "hero")]) for number, text in enumerate(texts)]


def test_batches_change_nothing(make_model, bytes_tokenizer, some_stories):
    """Each story by itself and in fp64, without padding."""
    model = make_model("ours", 257, n_positions=128)
    numbers = score_stories(model, bytes_tokenizer, some_stories, CPU)
    nats, found = 0.0, Counter()
    double = make_model("ours", 257, n_positions=128).double()
    for story in some_stories:
        ids = torch.tensor([*bytes_tokenizer(story.text)["input_ids"], 0])
        with torch.no_grad():
            log_probs = double(ids[None, :-1]).logits[0].log_softmax(-1)
        nats -= log_probs.gather(1, ids[1:, None]).sum().item()
        found[(log_probs.argmax(-1) == ids[1:])[7:10].all().item()] += 1  # the letters 8 to 10, "Bob"
    assert numbers["story_loss"] == pytest.approx(nats / 20, rel=1e-5)
    assert numbers["story_hero_right"] == found[True] / 20


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_is_off_and_the_mode_comes_back_and_nan_stays(make_model, bytes_tokenizer, some_stories, mode):
    model = make_model("stock", 257, n_positions=128)
    expected = score_stories(model, bytes_tokenizer, some_stories, CPU)
    assert model.config.resid_pdrop > 0
    assert score_stories(model.train(mode), bytes_tokenizer, some_stories, CPU) == expected
    assert model.training == mode
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    assert math.isnan(score_stories(model, bytes_tokenizer, some_stories, CPU)["story_loss"])
    assert score_stories(model, bytes_tokenizer, [], CPU) == {}


def test_held_out_stories_are_those_of_the_validation_split_and_their_combinations_are_in_no_other():
    documents = story_documents()
    validation = [document.text for document in documents if is_validation(document.id, SHARE)]
    trained = {document.id for document in documents if not is_validation(document.id, SHARE)}
    held_out = held_out_stories(SHARE, count=len(documents))
    assert [story.text for story in held_out] == validation
    assert 0.04 < len(held_out) / len(documents) < 0.06
    combinations = {story.combination for story in held_out}
    assert not trained & {f"story:{combination}" for combination in combinations}
    assert held_out_stories(SHARE) == held_out[:128]
    fewer = held_out_stories(0.001)
    assert 0 < len(fewer) < 60
    assert {story.combination for story in fewer} <= combinations


@pytest.fixture
def model_folder(make_model, bytes_tokenizer, tmp_path):
    """In a folder that says how much its run has held out."""
    save_hub_folder(make_model("ours", 257, n_positions=1200), bytes_tokenizer, tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"arguments": {"validation_share": 0.2}}))
    return tmp_path / "run" / "model"


def test_the_command_prints_the_scores_and_two_processes_give_those_of_one(
    model_folder, make_model, bytes_tokenizer, capsys, warm_python
):
    stories = held_out_stories(0.2, 5)
    numbers = score_stories(make_model("ours", 257, n_positions=1200), bytes_tokenizer, stories, CPU)
    flags = ["--model", str(model_folder), "--num_stories", "5", "--device", "cpu"]
    main(flags)
    printed = capsys.readouterr().out
    floor = sum(story.bits for story in stories) * math.log(2) / 5
    assert f"{model_folder} on 5 whole stories that were held out\n" in printed
    assert f"nats a story     {numbers['story_loss']:.2f}, {numbers['story_loss'] / floor:.3f} x the floor\n" in printed
    assert f"floor            {floor:.2f}\n" in printed
    assert f"right            {numbers['story_mentions_right']:.1%} of names, animals and things: animal " in printed
    together = warm_python.run_together(2, "-m", "modeling_gpt2repro.evaluation.stories", *flags, **CPU_FP32)
    assert together[0].stdout == printed
    assert together[1].stdout == ""


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as end:
        main(["--device", "cpu", *map(str, flags)])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_scored_is_refused_in_one_sentence(model_folder, make_model, bytes_tokenizer, tmp_path, capsys):
    message = refused(capsys, "--model", model_folder.parent, "--num_stories", "0")
    assert f"--model {model_folder.parent} is the folder of a run: give {model_folder}." in message
    assert "num_stories (0) must be at least 1." in message
    message = refused(capsys, "--model", model_folder, "--validation_share", "1e-9")
    assert message.endswith("no story is held out by so small a --validation_share: give a larger one.\n")
    save_hub_folder(make_model("ours", 257, n_positions=64), bytes_tokenizer, tmp_path / "short")
    message = refused(capsys, "--model", tmp_path / "short")
    assert "short: its context of 64 tokens is too short for a story of " in message
