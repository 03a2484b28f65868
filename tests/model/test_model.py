"""What the model computes, compared with stock GPT-2 and with the properties of a causal language model."""

import json
import math
import re

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

FLEX = pytest.param("flex_attention", marks=pytest.mark.slow)  # compiles, with a C++ compiler on a CPU
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_stock_gpt2(stock, carried, random_ids, attention):
    ids = random_ids(3, 40)
    stock.set_attn_implementation(attention)
    carried.set_attn_implementation(attention)
    expected = stock(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(carried(ids).logits, expected, atol=1e-5, rtol=0)


def test_gradients_equal_stock_gpt2(stock, carried, random_ids):
    ids = random_ids(2, 30)
    stock(ids, labels=ids).loss.backward()
    carried(ids, labels=ids).loss.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in carried.named_parameters():
        expected = theirs[name].grad.t() if name.endswith(CONV1D) else theirs[name].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_hidden_states_and_attentions_equal_stock_gpt2(stock, carried, random_ids):
    ids = random_ids(2, 12)
    for model in (stock, carried):
        model.set_attn_implementation("eager")
    ours, theirs = (model(ids, output_hidden_states=True, output_attentions=True) for model in (carried, stock))
    assert len(ours.hidden_states) == carried.config.n_layer + 1
    assert ours.attentions[0].shape == (2, 4, 12, 12)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.attentions, theirs.attentions, atol=1e-5, rtol=0)


def test_inputs_embeds_give_the_logits_of_input_ids(carried, random_ids):
    ids = random_ids(2, 12)
    given = carried(inputs_embeds=carried.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(given, carried(ids).logits, atol=0, rtol=0)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        carried()


def test_changing_a_token_changes_no_earlier_logit(carried, random_ids):
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % carried.config.vocab_size
    difference = (carried(ids).logits - carried(changed).logits).abs().amax(-1)[0]
    assert difference[:11].max() == 0
    assert difference[11:].min() > 0


def test_logits_with_cache_equal_logits_without(carried, random_ids):
    ids = random_ids(2, 20)
    whole = carried(ids, use_cache=False).logits
    first = carried(ids[:, :12], use_cache=True)
    second = carried(ids[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa", FLEX])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit(carried, random_ids, side, attention):
    ids = random_ids(1, 10)
    padding = random_ids(1, 6)
    parts = [padding, ids]
    mask = [torch.zeros_like(padding), torch.ones_like(ids)]
    if side == "right":
        parts.reverse()
        mask.reverse()
    alone = carried(ids).logits
    carried.requires_grad_(False).set_attn_implementation(attention)  # flex has no backward pass on a CPU
    padded = carried(torch.cat(parts, 1), attention_mask=torch.cat(mask, 1)).logits
    torch.testing.assert_close(padded[:, 6:] if side == "left" else padded[:, :10], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa", FLEX])
def test_packed_sequences_do_not_attend_to_each_other(carried, random_ids, attention):
    first = random_ids(1, 9)
    second = random_ids(1, 7).flip(1)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    alone = torch.cat([carried(first).logits, carried(second).logits], 1)
    carried.requires_grad_(False).set_attn_implementation(attention)
    for use_cache in (None, False):
        packed = carried(torch.cat([first, second], 1), position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_document_mask_lets_nothing_leak_between_documents(carried, random_ids):
    from modeling_gpt2repro.data.batches.sequences import as_batch

    sequences = random_ids(2, 41)
    sequences[0, [7, 20]] = 0  # the first token of a document
    sequences[1, [0, 33]] = 0
    changed = sequences.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97  # in the document from 7 to 19
    losses = []
    for ids in (sequences, changed):
        batch = as_batch(ids.numpy(), end_of_text=0)
        labels = batch.pop("shift_labels")
        logits = carried(**batch, use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none"))
    touched = (losses[0] != losses[1]).nonzero()
    assert set(touched[:, 0].tolist()) == {0}
    # Position 9, which predicts it, and the rest of its document; the last one predicts the start of the next.
    assert touched[:, 1].tolist() == list(range(9, 20))
    alone = carried(sequences[:1, 20:-1], use_cache=False).logits
    together = carried(**as_batch(sequences[:1].numpy(), end_of_text=0), use_cache=False).logits[:, 20:]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_plain_causal_attention_gets_no_mask_tensor_compiled_or_not(carried, random_ids, monkeypatch):
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        masks.append(attn_mask is not None or not is_causal)
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ids = random_ids(2, 12)
    carried.train()
    carried(ids, labels=ids, use_cache=False)
    assert masks == [False] * carried.config.n_layer
    carried(ids, attention_mask=torch.ones_like(ids).index_fill_(1, torch.tensor(0), 0))  # padding needs a mask
    assert masks[carried.config.n_layer :] == [True] * carried.config.n_layer
    monkeypatch.undo()

    def look(graph: torch.fx.GraphModule, _):
        nodes = [node for node in graph.graph.nodes if node.target is attend]
        masks.extend(node.kwargs.get("attn_mask") is not None or not node.kwargs["is_causal"] for node in nodes)
        return graph.forward

    masks.clear()
    torch.compile(carried, backend=look, fullgraph=True)(ids, labels=ids, use_cache=False)
    assert masks == [False] * carried.config.n_layer


def test_shift_labels_train_every_position_and_labels_all_but_the_last(carried, random_ids):
    sequences = random_ids(2, 21)
    ids = sequences[:, :-1]
    targets = sequences[:, 1:]
    logits = carried(ids).logits
    every = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(carried(ids, shift_labels=targets).loss, every)
    but_last = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(carried(ids, labels=ids).loss, but_last)


def test_loss_ignores_minus_100_and_divides_by_num_items_in_batch(carried, random_ids):
    ids = random_ids(2, 20)
    labels = ids.clone()
    labels[0, 5:] = -100
    logits = carried(ids).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    mean = torch.nn.functional.cross_entropy(logits[targets >= 0], targets[targets >= 0])
    torch.testing.assert_close(carried(ids, labels=labels).loss, mean)
    torch.testing.assert_close(carried(ids, labels=labels, num_items_in_batch=100).loss, mean * 23 / 100)


def pad(rows: list[torch.Tensor], side: str, value: int) -> torch.Tensor:
    """Rows of different lengths as (B, 15), filled up on that side."""
    out = torch.full((len(rows), 15), value)
    for number, row in enumerate(rows):
        out[number, slice(15 - len(row), 15) if side == "left" else slice(len(row))] = row
    return out


@pytest.mark.parametrize("label_of_padding", [-100, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_predicts_nothing(carried, random_ids, side, label_of_padding):
    rows = [random_ids(1, length)[0] for length in (4, 11, 7, 12)]
    targets = [row.flip(0) for row in rows]
    inputs = {"input_ids": pad(rows, side, 3), "attention_mask": pad([torch.ones_like(row) for row in rows], side, 0)}
    by_row = [
        torch.nn.functional.cross_entropy(carried(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows
    ]
    # On the right, a label of the first padding is the target of the last token.
    labels = pad(rows, side, label_of_padding if side == "left" else -100)
    torch.testing.assert_close(carried(**inputs, labels=labels).loss, sum(by_row) / (34 - 4))
    torch.testing.assert_close(carried(**inputs, labels=labels, num_items_in_batch=50).loss, sum(by_row) / 50)

    shift_labels = pad(targets, side, label_of_padding)
    mean = torch.nn.functional.cross_entropy(
        torch.cat([carried(row[None]).logits[0] for row in rows]), torch.cat(targets)
    )
    torch.testing.assert_close(carried(**inputs, shift_labels=shift_labels).loss, mean)
    for keep, kept in (
        (torch.arange(15).flip(0), shift_labels.flip(1)),
        (torch.arange(15).expand(4, -1), shift_labels),
        (torch.ones(4, 15, dtype=torch.bool), shift_labels.flatten()),
    ):
        torch.testing.assert_close(carried(**inputs, shift_labels=kept, logits_to_keep=keep).loss, mean)
    kept = carried(**inputs, shift_labels=shift_labels[:, 6:], logits_to_keep=9, num_items_in_batch=1).loss
    logits = carried(**inputs).logits[:, 6:][inputs["attention_mask"][:, 6:] == 1]
    counted = shift_labels[:, 6:][inputs["attention_mask"][:, 6:] == 1]
    torch.testing.assert_close(kept, torch.nn.functional.cross_entropy(logits, counted, reduction="sum"))


def test_padding_predicts_nothing_in_one_compiled_graph(carried, random_ids):
    rows = [random_ids(1, length)[0] for length in (4, 12)]
    mask = pad([torch.ones_like(row) for row in rows], "left", 0)
    compiled = torch.compile(carried, backend="eager", fullgraph=True)
    loss = compiled(pad(rows, "left", 3), attention_mask=mask, labels=pad(rows, "left", -100), use_cache=False).loss
    by_row = [
        torch.nn.functional.cross_entropy(carried(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows
    ]
    torch.testing.assert_close(loss, sum(by_row) / (16 - 2))


def test_labels_of_padding_are_left_out_behind_a_cache(carried, random_ids):
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    past = carried(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    loss = carried(ids[:, 6:], attention_mask=mask, past_key_values=past, shift_labels=ids[:, 6:].flip(1)).loss
    whole = torch.nn.functional.cross_entropy(
        torch.cat([carried(ids[:1]).logits[0, 6:], carried(ids[1:, 8:]).logits[0]]),
        torch.cat([ids[0, 6:].flip(0), ids[1, 6:].flip(0)[2:]]),
    )
    torch.testing.assert_close(loss, whole, atol=1e-5, rtol=0)


def test_mask_without_padding_changes_no_bit_of_the_loss(carried, random_ids):
    ids = random_ids(2, 20)
    carried.set_attn_implementation("eager")  # sdpa itself computes otherwise where it is given a mask
    for labels in ({"labels": ids}, {"shift_labels": ids}):
        whole = carried(ids, attention_mask=torch.ones_like(ids), **labels)
        assert torch.equal(whole.loss, carried(ids, **labels).loss)


def test_return_logits_of_older_code_is_accepted(carried, random_ids):
    ids = random_ids(2, 20)
    output = carried(ids, shift_labels=ids, return_logits=False)
    assert torch.equal(output.loss, carried(ids, shift_labels=ids).loss)


def test_logits_to_keep_selects_the_last_or_the_given_positions(carried, random_ids):
    ids = random_ids(2, 20)
    whole = carried(ids).logits
    torch.testing.assert_close(carried(ids, logits_to_keep=3).logits, whole[:, -3:], atol=1e-5, rtol=0)
    named = carried(ids, logits_to_keep=torch.tensor([4, 11])).logits
    torch.testing.assert_close(named, whole[:, [4, 11]], atol=1e-5, rtol=0)
    per_sequence = carried(ids, logits_to_keep=torch.tensor([[4, 11, 0], [19, 2, 2]])).logits
    expected = torch.stack([whole[0, [4, 11, 0]], whole[1, [19, 2, 2]]])
    torch.testing.assert_close(per_sequence, expected, atol=1e-5, rtol=0)
    mask = ids > 40
    torch.testing.assert_close(carried(ids, logits_to_keep=mask).logits, whole[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("keep", [2, torch.tensor([3]), torch.tensor([[3, 4], [0, 19]]), torch.ones(2, 20).bool()])
def test_logits_to_keep_selects_the_positions_that_stock_selects(stock, carried, random_ids, keep):
    if getattr(keep, "ndim", 0) == 2 and not hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
        pytest.skip("stock takes no tensor of two dimensions before transformers 5.23")
    ids = random_ids(2, 20)
    ours, theirs = (model(ids, logits_to_keep=keep).logits for model in (carried, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_first_loss_is_ln_of_the_vocabulary_size():
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=4, n_head=4, n_embd=128, n_positions=128, vocab_size=5000))
    ids = torch.randint(5000, (4, 128))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(5000), abs=0.1)


@pytest.mark.parametrize("position_std", [0.01, 0.02])
def test_initialization_follows_its_table(position_std):
    torch.manual_seed(0)
    shape = {"n_layer": 8, "n_head": 4, "n_embd": 256, "n_positions": 512, "vocab_size": 2000}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, position_initializer_range=position_std))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = {"wpe": position_std, "c_proj": 0.02 / math.sqrt(2 * 8)}.get(name.split(".")[-2], 0.02)
            # Within 5 standard errors: of a sample's standard deviation, then of its mean.
            assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * parameter.numel())), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_parameters_have_the_names_and_number_of_gpt2():
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig())
        stock = GPT2LMHeadModel(GPT2Config())
    assert set(model.state_dict()) == set(stock.state_dict())
    assert model.num_parameters() == stock.num_parameters() == 124_439_808
    assert not list(model.buffers())


def test_ids_outside_the_vocabulary_raise_value_error(tiny_model):
    for ids, id_range in (([5, 97], "5 to 97"), ([-1, 3], "-1 to 3")):
        with pytest.raises(ValueError, match=rf"input_ids range from {id_range}, outside a vocabulary of 97"):
            tiny_model(torch.tensor([ids]))


def test_inputs_that_only_stock_gpt2_has_raise_value_error(tiny_model, random_ids):
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="token_type_ids: this model has no such input"):
        tiny_model(ids, token_type_ids=ids)


def test_per_sample_gradients_by_vmap_equal_a_loop(tiny_model, random_ids):
    ids = random_ids(3, 8)
    weights = {name: parameter.detach() for name, parameter in tiny_model.named_parameters()}

    def loss(weights, sequence):
        inputs = {"input_ids": sequence[None], "labels": sequence[None], "use_cache": False}
        return torch.func.functional_call(tiny_model, weights, (), inputs).loss

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)["transformer.wpe.weight"]
    for sequence, gradient in zip(ids, together, strict=True):
        torch.testing.assert_close(torch.func.grad(loss)(weights, sequence)["transformer.wpe.weight"], gradient)


def test_context_longer_than_n_positions_raises_value_error(tiny_model):
    length = tiny_model.config.n_positions + 1
    ids = torch.zeros(1, length, dtype=torch.long)
    message = rf"context of {length} tokens exceeds n_positions \({length - 1}\)"
    with pytest.raises(ValueError, match=message):
        tiny_model(ids)
    for cache in ("dynamic", "static"):
        options = {"do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
        with pytest.raises(ValueError, match=message):
            tiny_model.generate(ids, max_new_tokens=1, **options)
        with pytest.raises(ValueError, match=message):
            tiny_model.generate(ids[:, :5], max_new_tokens=length, min_new_tokens=length, **options)


def test_padding_does_not_count_toward_n_positions(tiny_model):
    ids = torch.zeros(1, tiny_model.config.n_positions + 8, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, :8] = 0
    padded = tiny_model(ids, attention_mask=mask).logits[:, 8:]
    torch.testing.assert_close(padded, tiny_model(ids[:, 8:]).logits, atol=1e-5, rtol=0)


def test_unknown_attention_implementation_raises_value_error(tiny_model):
    with pytest.raises(ValueError, match=r'attn_implementation="magic".*not supported.*eager.*sdpa'):
        tiny_model.set_attn_implementation("magic")
    with pytest.raises(ValueError, match=r'attn_implementation="magic".*not supported'):
        GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, attn_implementation="magic"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 65, "n_head": 4}, r"n_embd \(65\) must be a multiple of n_head \(4\)"),
        ({"n_layer": 0}, r"n_layer \(0\) must be at least 1"),
        ({"n_layer": "3"}, "n_layer.*expected int, got str"),
        ({"n_layers": 3}, r"n_layers: no such field in GPT2ReproConfig; it has .*n_layer"),
        ({"resid_pdrop": 0.1}, "resid_pdrop: no such field"),
        ({"model_type": "gpt2"}, r"config of a 'gpt2' model, not 'gpt2repro': convert"),
    ],
)
def test_invalid_config_is_rejected(fields, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        GPT2ReproConfig(**fields)


def test_config_json_keeps_unknown_fields_with_a_warning(tiny_config, tmp_path, caplog):
    tiny_config.run_name = "mine"
    tiny_config.layer_norm_eps = 1e-3  # another model's name of layer_norm_epsilon
    tiny_config.n_layers = 7
    tiny_config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for loaded in (
        GPT2ReproConfig.from_pretrained(tmp_path),
        GPT2ReproConfig.from_json_file(tmp_path / "config.json"),
        GPT2ReproConfig.from_dict(fields),
        transformers.AutoConfig.from_pretrained(tmp_path, n_positions=17),
    ):
        assert (loaded.run_name, loaded.layer_norm_eps, loaded.n_layers) == ("mine", 1e-3, 7)
        assert (loaded.n_layer, loaded.layer_norm_epsilon) == (tiny_config.n_layer, tiny_config.layer_norm_epsilon)
        loaded.save_pretrained(tmp_path / "again")
        again = GPT2ReproConfig.from_pretrained(tmp_path / "again").to_dict()
        assert again | {"_name_or_path": ""} == loaded.to_dict() | {"_name_or_path": ""}
    assert loaded.n_positions == 17
    warnings = [record.message for record in caplog.records if "layer_norm_eps" in record.message]
    assert len(warnings) == 8
    assert re.match("config.json has .*n_layers.*, kept but not used; GPT2ReproConfig uses .*n_layer, ", warnings[0])


def test_misspelled_keyword_is_refused_when_a_model_is_loaded(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_layers'"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path, n_layers=3)


def test_subclass_keeps_its_own_config(tmp_path):
    class WiderConfig(GPT2ReproConfig):
        model_type = "wider"
        extra: int = 3

    class WiderForCausalLM(GPT2ReproForCausalLM):
        config: WiderConfig

    model = WiderForCausalLM(WiderConfig(n_layer=1, n_embd=16, n_head=2, vocab_size=97, eos_token_id=0, bos_token_id=0))
    assert model.config.extra == 3
    assert "GPT2Repro" not in str(getattr(model.config, "auto_map", ""))


def test_config_accepts_the_field_names_of_transformers(tmp_path):
    config = GPT2ReproConfig(hidden_size=64, num_attention_heads=4, num_labels=3, dtype="bfloat16", name_or_path="x")
    assert (config.n_embd, config.n_head, config.num_labels, config.dtype) == (64, 4, 3, torch.bfloat16)
    config.save_pretrained(tmp_path)
    loaded = GPT2ReproConfig.from_pretrained(tmp_path).to_dict()
    assert {**loaded, "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
