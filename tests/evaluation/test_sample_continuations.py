"""Samples: each has its own seed, the run's random numbers are untouched, the cache changes nothing."""

import contextlib

import numpy as np
import pytest
import torch

from modeling_gpt2repro.evaluation.generation import check_prompt, sample_continuations, seeded_rng

PROMPTS = ["the cold sea", "a ship was", "Over the land"]


@pytest.fixture(scope="module")
def model(make_model, tiny_tokenizer):
    """Stock's, with wide weights: seeds and prompts make different texts."""
    return make_model("stock", len(tiny_tokenizer))


@pytest.fixture(scope="module")
def texts(model, tiny_tokenizer):
    """Of each prompt two samples of twelve tokens, seed 7."""
    return sample_continuations(model, tiny_tokenizer, PROMPTS, 2, 12, seed=7)


def sampled_by_hand(model, tokenizer, prompt, new_tokens, seed, top_k=50):
    """The same without generate and without a cache: top-k by sorting, one multinomial draw a token."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, -1]
        smallest_kept = logits.sort(descending=True).values[top_k - 1]
        probabilities = logits.masked_fill(logits < smallest_kept, -torch.inf).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)[None]], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def test_samples_equal_a_loop_without_a_cache(model, tiny_tokenizer, texts):
    for prompt_number, prompt in enumerate(PROMPTS):
        for number in range(2):
            with torch.random.fork_rng(devices=[]):
                by_hand = sampled_by_hand(model, tiny_tokenizer, prompt, 12, [7, prompt_number, number])
            assert texts[prompt_number][number] == by_hand
            assert by_hand.startswith(prompt)


def test_only_the_top_k_tokens_are_sampled(model, tiny_tokenizer):
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")
    greedy = model.generate(**ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    uncached = model.generate(
        **ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert torch.equal(greedy, uncached)
    [[text]] = sample_continuations(model, tiny_tokenizer, PROMPTS[:1], 1, 12, seed=1, top_k=1)
    assert text == tiny_tokenizer.decode(greedy[0], skip_special_tokens=True)


def test_a_sample_does_not_depend_on_the_number_of_samples_or_other_prompts(model, tiny_tokenizer, texts):
    assert sample_continuations(model, tiny_tokenizer, PROMPTS, 3, 12, seed=7)[2][:2] == texts[2]
    assert sample_continuations(model, tiny_tokenizer, ["x", "the " * 20, PROMPTS[2]], 1, 12, seed=7)[2] == texts[2][:1]


def test_the_same_seed_repeats_the_samples_and_another_changes_them(model, tiny_tokenizer, texts):
    assert sample_continuations(model, tiny_tokenizer, PROMPTS, 2, 12, seed=7) == texts
    one_prompt = [PROMPTS[0]] * 3  # three times
    others = [sample_continuations(model, tiny_tokenizer, one_prompt, 2, 12, seed=seed) for seed in (7, 8)]
    assert len({text for of_seed in others for of_prompt in of_seed for text in of_prompt}) == 12


def test_the_runs_random_numbers_and_training_mode_are_restored(make_model, tiny_tokenizer, texts):
    model = make_model("stock", len(tiny_tokenizer)).train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert sample_continuations(model, tiny_tokenizer, PROMPTS, 2, 12, seed=7) == texts  # without dropout
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    torch.manual_seed(3)
    with contextlib.suppress(KeyboardInterrupt), seeded_rng([1, 2], torch.device("cpu")):
        torch.rand(1)
        raise KeyboardInterrupt
    assert torch.equal(torch.rand(4), expected)


@pytest.fixture
def read(make_model, tiny_tokenizer):
    """A model of its own, and a list that gets the number of tokens it reads at a time."""
    model = make_model("stock", len(tiny_tokenizer))
    lengths = []
    model.transformer.wte.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    return model, lengths


def test_a_text_fills_the_context_and_every_token_is_read_once(read, tiny_tokenizer):
    model, lengths = read
    sample_continuations(model, tiny_tokenizer, PROMPTS[:1], 1, 10_000, seed=7)
    prompt_tokens = len(tiny_tokenizer(PROMPTS[0])["input_ids"])
    assert lengths == [prompt_tokens] + [1] * (model.config.n_positions - prompt_tokens - 1)  # the last is not read


def test_a_text_ends_at_end_of_text(read, tiny_tokenizer):
    model, lengths = read
    with torch.no_grad():  # end-of-text is all but certain, whatever comes before
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.weight[tiny_tokenizer.eos_token_id] = 1.0
    assert sample_continuations(model, tiny_tokenizer, PROMPTS, 1, 40, seed=7) == [[prompt] for prompt in PROMPTS]
    assert lengths == [len(tiny_tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


def test_a_prompt_without_tokens_or_room_is_refused(model, tiny_tokenizer, one_sentence):
    for prompt in ("", "sea " * 70):
        tokens = len(tiny_tokenizer(prompt)["input_ids"])
        with pytest.raises(ValueError, match=f"the prompt has {tokens} tokens") as error:
            sample_continuations(model, tiny_tokenizer, ["the sea", prompt], 1, 4, seed=1)
        assert "in a context of 64, at most 63: give another" in one_sentence(error)
    assert check_prompt("a", tiny_tokenizer, 64) == 1
