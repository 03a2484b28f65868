"""The model against stock GPT-2 and against what a causal language model must do."""

import math

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM, GPT2ReproModel

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture
def stock(tiny_config) -> GPT2LMHeadModel:
    """A random stock GPT-2 of the tiny shape, with weights large enough that mistakes show."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=tiny_config.vocab_size,
        n_positions=tiny_config.n_positions,
        n_embd=tiny_config.n_embd,
        n_layer=tiny_config.n_layer,
        n_head=tiny_config.n_head,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def carried(stock, tiny_config) -> GPT2ReproForCausalLM:
    """Ours with the stock model's weights: its Conv1D matrices are transposed Linears."""
    model = GPT2ReproForCausalLM(tiny_config).eval()
    state = {name: w.t() if name.endswith(CONV1D) else w for name, w in stock.state_dict().items()}
    model.load_state_dict(state)
    return model


def random_ids(config, *shape) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_those_of_stock_gpt2(stock, carried, attention):
    ids = random_ids(carried.config, 3, 40)
    stock.set_attn_implementation(attention)
    carried.set_attn_implementation(attention)
    expected = stock(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(carried(ids).logits, expected, atol=1e-5, rtol=0)


def test_gradients_equal_those_of_stock_gpt2(stock, carried):
    ids = random_ids(carried.config, 2, 30)
    stock(ids, labels=ids).loss.backward()
    carried(ids, labels=ids).loss.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in carried.named_parameters():
        expected = theirs[name].grad.t() if name.endswith(CONV1D) else theirs[name].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_greedy_and_beam_text_equal_those_of_stock_gpt2(stock, carried):
    ids = random_ids(carried.config, 1, 8)
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        assert carried.generate(ids, **options).tolist() == stock.generate(ids, **options).tolist()


def test_changing_a_token_changes_no_logit_before_it(carried):
    ids = random_ids(carried.config, 1, 20)
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % carried.config.vocab_size
    difference = (carried(ids).logits - carried(changed).logits).abs().amax(-1)[0]
    assert difference[:11].max() == 0
    assert difference[11:].min() > 0


def test_cache_gives_what_no_cache_gives(carried):
    ids = random_ids(carried.config, 2, 20)
    whole = carried(ids, use_cache=False).logits
    first = carried(ids[:, :12], use_cache=True)
    second = carried(ids[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gives_what_it_gives_without_padding(carried, side):
    ids, padding = random_ids(carried.config, 1, 10), random_ids(carried.config, 1, 6)
    parts, mask = [padding, ids], [torch.zeros(1, 6).long(), torch.ones(1, 10).long()]
    if side == "right":
        parts, mask = parts[::-1], mask[::-1]
    padded = carried(torch.cat(parts, 1), attention_mask=torch.cat(mask, 1)).logits
    kept = padded[:, 6:] if side == "left" else padded[:, :10]
    torch.testing.assert_close(kept, carried(ids).logits, atol=1e-5, rtol=0)


def test_packed_rows_do_not_see_each_other(carried):
    first, second = random_ids(carried.config, 1, 9), random_ids(carried.config, 1, 7).flip(1)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    packed = carried(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([carried(first).logits, carried(second).logits], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_shift_labels_train_every_position_and_labels_all_but_the_last(carried):
    row = random_ids(carried.config, 2, 21)
    ids, targets = row[:, :-1], row[:, 1:]
    logits = carried(ids).logits
    every = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(carried(ids, shift_labels=targets).loss, every)
    but_last = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(carried(ids, labels=ids).loss, but_last)


def test_without_logits_the_loss_is_the_same(carried):
    ids = random_ids(carried.config, 2, 20)
    output = carried(ids, shift_labels=ids, return_logits=False)
    assert output.logits is None
    torch.testing.assert_close(output.loss, carried(ids, shift_labels=ids).loss)


def test_logits_to_keep_are_the_last(carried):
    ids = random_ids(carried.config, 2, 20)
    torch.testing.assert_close(carried(ids, logits_to_keep=3).logits, carried(ids).logits[:, -3:], atol=1e-5, rtol=0)


def test_first_loss_is_that_of_guessing_evenly():
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=4, n_head=4, n_embd=128, n_positions=128, vocab_size=5000))
    ids = random_ids(model.config, 4, 128)
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(5000), abs=0.1)


def test_initialization_follows_its_table():
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=8, n_head=4, n_embd=256, n_positions=512, vocab_size=2000))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = {"wpe": 0.01, "c_proj": 0.02 / math.sqrt(2 * 8)}.get(name.split(".")[-2], 0.02)
            # 5 standard errors of a measured deviation and of a measured mean.
            assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * parameter.numel())), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_weights_are_tied_and_saved_once(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_the_auto_classes_know_the_model(tiny_model, tiny_config, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GPT2ReproConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), GPT2ReproModel)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), GPT2ReproForCausalLM)


def test_the_parameters_have_gpt2s_names_and_number():
    with torch.device("meta"):
        model, stock = GPT2ReproForCausalLM(GPT2ReproConfig()), GPT2LMHeadModel(GPT2Config())
    assert set(model.state_dict()) == set(stock.state_dict())
    assert model.num_parameters() == stock.num_parameters() == 124_439_808


def test_gradient_checkpointing_changes_no_gradient(carried):
    ids = random_ids(carried.config, 2, 20)
    gradients = []
    for enabled in (False, True):
        carried.train()
        if enabled:
            carried.gradient_checkpointing_enable()
        carried.zero_grad()
        carried(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in carried.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_context_that_is_too_long_is_refused_in_words(tiny_model):
    length = tiny_model.config.n_positions + 1
    ids = torch.zeros(1, length, dtype=torch.long)
    told = rf"context of {length} tokens is longer than n_positions \({length - 1}\)"
    with pytest.raises(ValueError, match=told):
        tiny_model(ids)
    with pytest.raises(ValueError, match=told):
        tiny_model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    with pytest.raises(ValueError, match=told):
        tiny_model.generate(ids[:, :5], max_new_tokens=length, min_new_tokens=length, pad_token_id=0)


def test_padding_beyond_the_context_is_no_part_of_it(tiny_model):
    ids = torch.zeros(1, tiny_model.config.n_positions + 8, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, :8] = 0
    padded = tiny_model(ids, attention_mask=mask).logits[:, 8:]
    torch.testing.assert_close(padded, tiny_model(ids[:, 8:]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 65, "n_head": 4}, r"n_embd \(65\) must be a multiple of n_head \(4\)"),
        ({"n_layer": 0}, r"n_layer \(0\) must be at least 1"),
        ({"n_layer": "3"}, "n_layer"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        GPT2ReproConfig(**fields)


@pytest.mark.slow
def test_the_model_compiles_into_one_graph_forward_and_backward(carried):
    ids = random_ids(carried.config, 2, 20)
    expected = carried(ids, labels=ids).loss
    compiled = torch.compile(carried.train(), fullgraph=True)
    loss = compiled(ids, labels=ids, use_cache=False, return_logits=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
