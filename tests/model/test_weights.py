"""Saving and loading weights: tied, sharded, offloaded, resized, in other dtypes, under other heads."""

import json

import pytest
import torch
from clean_process import run_without_package
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2ForSequenceClassification,
)

from modeling_gpt2repro import (
    GPT2ReproConfig,
    GPT2ReproForCausalLM,
    GPT2ReproForQuestionAnswering,
    GPT2ReproForSequenceClassification,
    GPT2ReproForTokenClassification,
    GPT2ReproModel,
)

SHIPPED = {"configuration_gpt2repro.py", "modeling_gpt2repro.py"}
HEADS = {
    AutoModelForSequenceClassification: GPT2ReproForSequenceClassification,
    AutoModelForTokenClassification: GPT2ReproForTokenClassification,
    AutoModelForQuestionAnswering: GPT2ReproForQuestionAnswering,
}


def assert_equal_and_tied(loaded: GPT2ReproForCausalLM, model: GPT2ReproForCausalLM):
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_weights_are_tied_and_saved_once(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    assert_equal_and_tied(GPT2ReproForCausalLM.from_pretrained(tmp_path), tiny_model)


def test_sharded_checkpoint_reloads(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    assert "lm_head.weight" not in index
    assert_equal_and_tied(GPT2ReproForCausalLM.from_pretrained(tmp_path), tiny_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_dtype_is_kept_unless_another_is_requested(carried, random_ids, tmp_path, dtype):
    ids = random_ids(2, 20)
    expected = carried(ids).logits
    carried.to(dtype).save_pretrained(tmp_path)
    assert GPT2ReproForCausalLM.from_pretrained(tmp_path).dtype == dtype
    wide = GPT2ReproForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert_equal_and_tied(wide.to(dtype), carried)
    assert (carried(ids).logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_offloaded_weights_give_the_same_logits(carried, random_ids, tmp_path):
    ids = random_ids(2, 20)
    expected = carried(ids).logits
    carried.save_pretrained(tmp_path / "saved")
    whole = GPT2ReproForCausalLM.from_pretrained(tmp_path / "saved", device_map="auto")
    torch.testing.assert_close(whole(ids).logits, expected)
    split = GPT2ReproForCausalLM.from_pretrained(
        tmp_path / "saved", device_map="auto", max_memory={"cpu": 400_000}, offload_folder=tmp_path / "disk"
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    assert all(name.count(".") < 3 for name in split.hf_device_map), "a block's parts must stay together"
    assert split.transformer.h[2].attn.c_attn.weight.device.type == "meta"  # loaded from disk when needed
    torch.testing.assert_close(split(ids).logits, expected)


@pytest.mark.parametrize("size", [105, 90])
def test_vocabulary_can_grow_and_shrink(carried, random_ids, tmp_path, size):
    ids = random_ids(2, 20).clamp(max=80)
    before = carried(ids).logits
    carried.resize_token_embeddings(size)
    assert carried.config.vocab_size == carried.lm_head.out_features == size
    after = carried(ids, labels=ids)
    shared = min(size, 97)
    torch.testing.assert_close(after.logits[..., :shared], before[..., :shared])
    assert after.logits.shape[-1] == size
    assert after.loss.isfinite()
    with pytest.raises(ValueError, match=f"outside a vocabulary of {size}:"):
        carried(torch.full((1, 2), size))
    carried.save_pretrained(tmp_path)
    assert_equal_and_tied(GPT2ReproForCausalLM.from_pretrained(tmp_path), carried)


def test_auto_classes_load_the_model(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GPT2ReproConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), GPT2ReproModel)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), GPT2ReproForCausalLM)


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
def test_heads_load_the_pretrained_body_train_and_reload(carried, random_ids, tmp_path, auto_class):
    ids = random_ids(2, 12)
    hidden = carried.transformer(ids).last_hidden_state
    carried.save_pretrained(tmp_path / "lm")
    model, found = auto_class.from_pretrained(tmp_path / "lm", num_labels=3, pad_token_id=0, output_loading_info=True)
    assert type(model) is HEADS[auto_class]
    assert not found["unexpected_keys"]
    assert {name.split(".")[0] for name in found["missing_keys"]} <= {"score", "qa_outputs"}
    torch.testing.assert_close(model.transformer(ids).last_hidden_state, hidden)
    assert model.get_input_embeddings() is model.transformer.wte
    if auto_class is AutoModelForQuestionAnswering:
        labels = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 5])}
        shape = (2, 12)
        output = "end_logits"
    else:
        per_token = auto_class is AutoModelForTokenClassification
        labels = {"labels": ids % 3 if per_token else torch.tensor([0, 2])}
        shape = (2, 12, 3) if per_token else (2, 3)
        output = "logits"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(ids, **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "head")
    assert {path.name for path in (tmp_path / "head").glob("*.py")} == SHIPPED
    again = auto_class.from_pretrained(tmp_path / "head")
    assert again(ids)[output].shape == shape
    torch.testing.assert_close(again(ids)[output], model(ids)[output])


def test_sequence_classification_equals_stock_gpt2(stock, carried, random_ids):
    ids = random_ids(3, 12)
    ids[1, 8:] = 0  # padding on the right
    stock.config.num_labels = 4
    stock.config.pad_token_id = 0
    theirs = GPT2ForSequenceClassification(stock.config).eval()
    theirs.transformer.load_state_dict(stock.transformer.state_dict())
    shape = {
        name: getattr(carried.config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    }
    ours = GPT2ReproForSequenceClassification(GPT2ReproConfig(**shape, num_labels=4, pad_token_id=0)).eval()
    ours.transformer.load_state_dict(carried.transformer.state_dict())
    ours.score.load_state_dict(theirs.score.state_dict())
    labels = torch.tensor([1, 0, 3])
    output = ours(ids, labels=labels)
    expected = theirs(ids, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=0)


def test_stock_gpt2_weights_are_never_loaded_untransposed(stock, tiny_config, tmp_path):
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config of a 'gpt2' model.*convert a stock GPT-2"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path, config=tiny_config)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.weight.*of another shape.*convert a stock GPT-2"):
        GPT2ReproForCausalLM.from_pretrained(tmp_path, config=tiny_config, ignore_mismatched_sizes=True)


def test_every_auto_class_reloads_and_saves_again_without_our_package(carried, tmp_path):
    carried.save_pretrained(tmp_path / "0")
    program = """
import sys, torch, transformers
folder, logits = sys.argv[1], []
for number in range(2):
    for head in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        auto_class = getattr(transformers, "AutoModelFor" + head)
        model = auto_class.from_pretrained(f"{folder}/{number}", trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        if head == "CausalLM":
            logits.append(model(torch.arange(1, 9)[None]).logits)
            model.save_pretrained(f"{folder}/{number + 1}")
        else:
            model(torch.arange(1, 9)[None])[0].sum().backward()
            model.save_pretrained(f"{folder}/{head}")
            assert type(auto_class.from_pretrained(f"{folder}/{head}", trust_remote_code=True)).__name__.endswith(head)
assert torch.equal(*logits)
assert "modeling_gpt2repro" not in sys.modules
torch.save(logits[1], f"{folder}/logits.pt")
"""
    run_without_package(program, tmp_path, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, carried(torch.arange(1, 9)[None]).logits, atol=0, rtol=0)
    for folder in ("2", "QuestionAnswering"):
        assert {path.name for path in (tmp_path / folder).glob("*.py")} == SHIPPED
