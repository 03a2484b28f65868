"""The sampling loop: generate's greedy text, a distribution by hand, the lecture's crop of the context."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_gpt2repro.evaluation.sampling import sample_tokens, token_probabilities, whole_characters

CONTEXT = 64
SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
RELATIVE = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
FAMILIES = {
    "llama": RELATIVE,
    "mistral": {**RELATIVE, "sliding_window": 6},
    "mamba": {**SHAPE, "state_size": 4},  # its cache is of another kind, and it has no limit
    "openai-gpt": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},  # has no cache
}


@pytest.fixture
def family(make_model):
    """family(name) -> a random model of that architecture, with weights so wide that the tokens differ."""

    def made(name):
        if name in ("ours", "stock"):
            return make_model(name, 97)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **FAMILIES[name])).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return made


class FixedLogits(torch.nn.Module):
    """The same logits after any text."""

    name_or_path = "fixed"
    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits.expand(1, input_ids.shape[1], -1))


def by_hand(model, ids, new_tokens, temperature, top_k, seed):
    """The lecture's loop: everything is read again for each token, and logits but the top k become -inf."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([ids])
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(ids[:, -CONTEXT:]).logits[:, -1].double() / temperature
        probabilities, indices = torch.topk(logits.softmax(-1), top_k)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, torch.gather(indices, -1, drawn)], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("name", ["ours", "stock", *FAMILIES])
def test_temperature_0_is_generate_without_sampling(family, name):
    model = family(name)
    ids = [5, 7, 11, 13]
    expected = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=30, eos_token_id=None, pad_token_id=0
    )
    list(sample_tokens(model, ids, 30, temperature=0))
    assert ids == expected[0].tolist()
    assert len(set(ids)) > 3


@pytest.mark.parametrize("name", ["ours", "stock", "llama"])
@pytest.mark.parametrize("prompt_tokens", [1, 60, CONTEXT, 90])
def test_a_text_is_that_of_the_lectures_loop_also_beyond_the_context(family, name, prompt_tokens):
    model = family(name)
    prompt = torch.randint(97, (prompt_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = list(prompt)
    new = list(sample_tokens(model, ids, 20, temperature=0.8, top_k=9, seed=4))
    assert ids == by_hand(model, prompt, 20, 0.8, 9, 4)
    assert [token for token, _ in new] == ids[prompt_tokens:]


def test_tokens_are_drawn_from_the_top_k_at_the_temperature():
    logits = [0.3, 2.0, -1.0, 1.2, 1.9, 0.0]
    draws = 2000
    found = np.zeros(6)
    for seed in range(draws):
        [(token, probability)] = sample_tokens(FixedLogits(logits), [0], 1, temperature=0.5, top_k=3, seed=seed)
        found[token] += 1
        assert probability == pytest.approx(math.exp(logits[token]) / sum(map(math.exp, logits)))
    weights = np.exp([0, 4.0, 0, 2.4, 3.8, 0]) * [0, 1, 0, 1, 1, 0]  # logits / 0.5 of the three largest
    expected = weights / weights.sum()
    assert np.all(np.abs(found / draws - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws))
    assert found[[0, 2, 5]].tolist() == [0, 0, 0]


def test_no_temperature_overflows():
    for temperature in (1e-300, 1e-5, 1e300):
        [(token, _)] = sample_tokens(FixedLogits([1.0, 3.0, 2.0]), [0], 1, temperature=temperature)
        assert token == 1 or temperature > 1


def test_probabilities_are_the_softmax_of_a_full_forward(family):
    model = family("ours")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    new = [probability for _, probability in sample_tokens(model, ids, 20, temperature=2.0, top_k=5, seed=1)]
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0]
    model.float()
    expected = [logits[t].softmax(-1)[ids[t + 1]].item() for t in range(len(ids) - 1)]
    assert new == pytest.approx(expected[7:], rel=1e-4)
    found = token_probabilities(model, ids)
    assert found[0] is None
    assert found[1:] == pytest.approx(expected, rel=1e-4)


def test_tokens_before_the_context_have_no_probability(family):
    model = family("stock")
    ids = [token % 97 for token in range(80)]
    found = token_probabilities(model, ids)
    assert found[:17] == [None] * 17  # 80 - 64, and the first that is read
    assert found[17:] == token_probabilities(model, ids[16:])[1:]
    assert token_probabilities(model, [5]) == [None]


def test_each_token_is_read_once_until_the_context_is_full(family):
    model = family("stock")
    lengths = []
    model.transformer.wte.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    list(sample_tokens(model, [1] * 60, 8))
    assert lengths == [60, 1, 1, 1, 1, 64, 64, 64]


def test_a_text_ends_before_an_end_of_text_token():
    ids = [0]
    assert list(sample_tokens(FixedLogits([0.0, 9.0]), ids, 5, temperature=0, end_ids={1, None})) == []
    assert ids == [0]
    assert len(list(sample_tokens(FixedLogits([0.0, 9.0]), ids, 5, temperature=0, end_ids={0}))) == 5


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_reported(one_sentence, temperature):
    model = FixedLogits([0.0, math.nan])
    for run in (lambda: list(sample_tokens(model, [0], 1, temperature)), lambda: token_probabilities(model, [0, 0])):
        with pytest.raises(ValueError, match="fixed gives NaN") as error:
            run()
        one_sentence(error)


def test_characters_are_whole_and_have_the_product_of_their_tokens(tiny_tokenizer):
    text = "the séa ✓🙂 of \u0301 a"
    ids = tiny_tokenizer(text)["input_ids"]
    pieces = list(whole_characters(tiny_tokenizer, [(token, 0.5) for token in ids]))
    assert "".join(piece for piece, _ in pieces) == text
    assert not [piece for piece, _ in pieces if "\ufffd" in piece]
    assert ("é", 0.25) in pieces
    assert ("🙂", 0.5**4) in pieces
    assert math.prod(probability for _, probability in pieces) == 0.5 ** len(ids)
    unknown = [(token, None) for token in ids[:1]] + [(token, 0.5) for token in ids[1:]]
    assert next(whole_characters(tiny_tokenizer, unknown))[1] is None


def test_a_character_comes_as_soon_as_it_is_whole_and_half_of_one_at_the_end(tiny_tokenizer):
    ids = tiny_tokenizer("é🙂")["input_ids"]
    read = []
    pieces = whole_characters(tiny_tokenizer, ((read.append(token) or token, 1.0) for token in ids[:-1]))
    assert next(pieces)[0] == "é"
    assert read == ids[:2]
    assert [text for text, _ in pieces] == ["\ufffd"]


def test_spaces_between_tokens_survive_a_tokenizer_that_drops_the_first():
    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁sea": 1, "s": 2}, unk_token="s"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    pieces = [text for text, _ in whole_characters(tokenizer, [(0, 1.0), (1, 1.0), (2, 1.0), (0, 1.0)])]
    assert pieces == ["the", " sea", "s", " the"]
