"""A run on stories: what it scores, logs and prints. The stories are the first 600, which are tokenized in a second."""

import json
from math import log

import pytest
from toy_runs import logged_values, train_here
from transformers import AutoTokenizer

from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources.documents import Document
from modeling_gpt2repro.data.sources.resolve import BUILT_IN_TEXTS
from modeling_gpt2repro.data.sources.stories import write_story
from modeling_gpt2repro.evaluation.stories import held_out_stories, main, score_stories
from modeling_gpt2repro.pretrain import preflight

RUN = {"dataset_name": "stories", "tokenizer_vocab_size": 600, "validation_share": 0.1, "block_size": 512, "n_layer": 1}
STEPS = {"tokens_per_step": 1024, "per_device_train_batch_size": 2, "warmup_tokens": 0, "train_tokens": 2048}
EVALUATIONS = {"eval_steps": 1, "save_steps": 0, "num_samples": 1, "eval_tokens": 512}


@pytest.fixture
def few_stories(monkeypatch):
    stories = [write_story(number) for number in range(600)]
    documents = [Document(f"story:{story.combination}", story.text) for story in stories]
    monkeypatch.setitem(BUILT_IN_TEXTS, "stories", lambda: documents)


def test_a_run_on_stories_scores_whole_ones_that_it_has_not_seen(few_stories, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_here(run, None, **RUN, **STEPS, **EVALUATIONS) == 0
    printed = capsys.readouterr().out

    # The stories, their tokens and bits, without the scorer.
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    stories = held_out_stories(0.1)
    scored = sum(len(tokenizer(story.text)["input_ids"]) for story in stories) / 128  # without the first, with the end
    floor = sum(story.bits for story in stories) * log(2) / 128
    assert len(stories) == 128
    assert logged_values(run, "story_floor") == pytest.approx([floor] * 3)
    assert logged_values(run, "story_tokens") == []
    assert json.loads((run / "baselines.json").read_text())["loss_baselines"][
        "the floor, entropy of the stories"
    ] == pytest.approx(floor / 512)  # a sequence of 512 tokens is a story
    trained = [tokenizer.decode(shard) for shard in open_shards(run / "data").shards("train")]
    texts = {text.lstrip("\n") for text in "".join(trained).split(tokenizer.eos_token)}  # without the padding
    assert len(texts & {write_story(number).text for number in range(600)}) > 500
    assert not texts & {story.text for story in stories}

    losses = logged_values(run, "story_loss")
    assert losses[0] == pytest.approx(scored * log(600), rel=0.02)
    assert losses[2] < losses[1] < losses[0]
    right = logged_values(run, "story_mentions_right")
    assert (
        f"\nfloor        no model can do better than {floor / 512:.3f} nats per token, {floor:.1f} a story\n" in printed
    )
    for loss, share in zip(losses, right, strict=True):
        line = f"    stories: {loss:.1f} nats each, {loss / floor:.2f} x the floor; {100 * share:.0f} % of names, "
        assert f"{line}animals and things right\n" in printed
    assert "\nAt step 0 it wrote:\n\n    A story of Mila and Tom" in printed
    assert "\nNow, at step 2, it writes:\n\n    A story of Mila and Tom" in printed

    main(["--model", str(run / "model"), "--device", "cpu"])  # with the share that is in run.json
    assert f"\nnats a story     {losses[2]:.2f}, " in capsys.readouterr().out

    assert (
        train_here(run, None, **RUN | {"dataset_name": "python-prose"}, **STEPS, resume_from_checkpoint="latest") == 2
    )
    assert "holds stories, not python-prose: give that --dataset_name, or another" in capsys.readouterr().err


def test_a_context_that_is_too_short_for_a_story_is_refused_with_the_one_that_suffices(few_stories, tmp_path, capsys):
    """And with that one the same command runs, in the same folder."""
    short = {**STEPS, "tokens_per_step": 128, "train_tokens": 256}
    assert train_here(tmp_path / "run", None, **RUN | {"block_size": 64}, **short, **EVALUATIONS) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert "do not fit into sequences of 64: give --block_size " in sentence
    needed = int(sentence.split("--block_size ")[1].split()[0])
    steps = {**STEPS, "tokens_per_step": 2 * needed, "train_tokens": 2 * needed}
    assert train_here(tmp_path / "run", None, **RUN | {"block_size": needed}, **steps, **EVALUATIONS) == 0


def test_a_preflight_times_the_stories_of_an_evaluation_too(few_stories, tmp_path, monkeypatch):
    scored = []

    def score(model, tokenizer, stories, device):
        scored.append(len(stories))
        return score_stories(model, tokenizer, stories, device)

    monkeypatch.setattr(preflight, "score_stories", score)
    short = {"tokens_per_step": 512, "per_device_train_batch_size": 1}
    assert train_here(tmp_path / "run", None, **RUN, **STEPS | short, **EVALUATIONS, preflight=True) == 0
    assert scored == [128]
