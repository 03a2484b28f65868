"""Conversion to and from transformers' GPT-2: equal logits and complete folders, or an error that says why not."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.evaluation.load_model import load_causal_lm
from modeling_gpt2repro.hub.conversion import convert_config, copy_weights, from_hf_gpt2, load_gpt2, main, to_hf_gpt2


@pytest.fixture
def stock_folder(stock, tiny_tokenizer, tmp_path):
    """A folder with a GPT-2 of transformers, the tiny tokenizer and a generation config."""
    config = GPT2Config(**{**stock.config.to_dict(), "vocab_size": len(tiny_tokenizer)})
    torch.manual_seed(4)
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(do_sample=True, top_k=7, max_new_tokens=9, eos_token_id=0)
    model.save_pretrained(tmp_path / "stock")
    tiny_tokenizer.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def rewrite_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def error_message(source, target, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["--from", str(source), "--to", str(target)])
    assert stopped.value.code == 2
    assert not target.exists()
    return capsys.readouterr().err.splitlines()[-1]


def largest_difference(a, b, ids) -> float:
    """Of the logits, relative to the largest of them."""
    return ((a(ids).logits - b(ids).logits).abs().max() / b(ids).logits.abs().max()).item()


def test_converting_there_and_back_gives_the_same_weights(stock_folder, tmp_path, random_ids, capsys):
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    main(["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back")])
    assert "back holds a GPT2LMHeadModel with" in capsys.readouterr().out
    before, after = (load_file(folder / "model.safetensors") for folder in (stock_folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    ids = random_ids(3, 40)
    stock, ours, back = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("stock", "ours", "back"))
    assert (type(ours), type(back)) == (GPT2ReproForCausalLM, GPT2LMHeadModel)
    assert largest_difference(ours, stock, ids) < 1e-6
    assert largest_difference(back, ours, ids) < 1e-6
    for name in ("ours", "back"):
        assert AutoTokenizer.from_pretrained(tmp_path / name)("the sea").input_ids
        settings = GenerationConfig.from_pretrained(tmp_path / name)
        assert (settings.do_sample, settings.top_k, settings.max_new_tokens) == (True, 7, 9)
    assert {path.suffix for path in (tmp_path / "back").iterdir()} == {".md", ".json", ".safetensors"}  # no code
    assert "auto_map" not in (tmp_path / "back" / "config.json").read_text()
    assert "trust_remote_code" not in (tmp_path / "back" / "README.md").read_text()
    assert "from scratch" not in (tmp_path / "ours" / "README.md").read_text()


def test_the_card_of_a_twin_keeps_license_language_and_base_model(stock_folder, tmp_path):
    metadata = {"license": "mit", "language": "en", "base_model": "openai-community/gpt2"}
    (stock_folder / "README.md").write_text(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n# A model\n")
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    main(["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back")])
    for name in ("ours", "back"):
        found = ModelCard.load(tmp_path / name / "README.md").data
        assert {key: found[key] for key in metadata} == metadata


def test_the_format_that_openai_published_is_read(stock_folder, tmp_path, random_ids):
    """Names without `transformer.`, and the causal mask of each block as a tensor."""
    ids = random_ids(1, 20)
    expected = AutoModelForCausalLM.from_pretrained(stock_folder)
    weights = load_file(stock_folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
    save_file(weights | masks, stock_folder / "model.safetensors", {"format": "pt"})
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    assert largest_difference(GPT2ReproForCausalLM.from_pretrained(tmp_path / "ours"), expected, ids) < 1e-6


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_logits_are_equal_both_ways(stock, random_ids, activation):
    ids = random_ids(3, 40)
    model = GPT2LMHeadModel(GPT2Config(**{**stock.config.to_dict(), "activation_function": activation})).eval()
    model.load_state_dict(stock.state_dict())
    assert model(ids).logits.abs().max() > 2
    ours = from_hf_gpt2(model)
    for some in (ids, ids[:1, :1], ids[:1, :7]):
        assert largest_difference(ours, model, some) < 1e-6
        assert largest_difference(to_hf_gpt2(ours), ours, some) < 1e-6


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_with_fresh_weights_logits_differ_by_at_most_a_millionth(stock, random_ids, activation):
    """In absolute terms, because logits are about 1 then; fp32 does not resolve a millionth of large ones."""
    torch.manual_seed(6)
    changed = {"activation_function": activation, "initializer_range": 0.02}
    model = GPT2LMHeadModel(GPT2Config(**{**stock.config.to_dict(), **changed})).eval()
    ours = from_hf_gpt2(model)
    ids = random_ids(3, 40)
    for some in (ids, ids[:1, :1], ids[:1, :7]):
        assert (ours(some).logits - model(some).logits).abs().max() <= 1e-6
        assert (to_hf_gpt2(ours)(some).logits - ours(some).logits).abs().max() <= 1e-6


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_in_fp64_both_compute_the_same_function(stock, random_ids, activation):
    """The differences in fp32 are rounding: at 124M, transformers is off by up to 5e-6 there, our model by 2e-6."""
    model = GPT2LMHeadModel(GPT2Config(**{**stock.config.to_dict(), "activation_function": activation})).eval()
    model.load_state_dict(stock.state_dict())
    ours = from_hf_gpt2(model.double())
    ids = random_ids(3, 40)
    assert ours.dtype == torch.float64
    assert largest_difference(ours, model, ids) < 1e-13
    assert largest_difference(to_hf_gpt2(ours), ours, ids) < 1e-13


@pytest.mark.parametrize(
    "shape",
    [(12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_all_four_sizes_have_the_same_tensors(shape):
    n_layer, n_head, n_embd = shape
    config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with torch.device("meta"):
        stock = GPT2LMHeadModel(config)
        ours = GPT2ReproForCausalLM(convert_config(config))
    copy_weights(stock, ours)
    copy_weights(ours, stock)
    assert ours.num_parameters() == stock.num_parameters()


def test_the_dtype_is_kept(stock_folder, tmp_path):
    GPT2LMHeadModel.from_pretrained(stock_folder).bfloat16().save_pretrained(stock_folder)
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is relu and not gelu_pytorch_tanh or gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True and not False"),
        ({"n_inner": 100}, "n_inner is 100 and not 256"),
        ({"n_layer": 4}, "missing: transformer.h.3.attn.c_attn.bias, transformer.h.3.attn.c_attn.weight"),
        ({"n_layer": 2}, "unknown: transformer.h.2.attn.c_attn.weight"),
        ({"n_positions": 60}, "of another shape: transformer.wpe.weight"),
        ({"vocab_size": 333}, "a tokenizer of 300 ids and a model of 333"),
    ],
)
def test_unsupported_options_and_wrong_tensors_are_named(stock_folder, tmp_path, capsys, changes, message):
    rewrite_config(stock_folder, **changes)
    assert message in error_message(stock_folder, tmp_path / "ours", capsys)


def test_sources_that_cannot_be_converted_are_refused_in_one_sentence(stock_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AutoTokenizer.from_pretrained(stock_folder).save_pretrained(tmp_path / "tokenizer")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert "is a 'llama' model: give one of type 'gpt2' or 'gpt2repro'" in error_message(
        tmp_path / "llama", tmp_path / "ours", capsys
    )
    (tmp_path / "empty").mkdir()
    assert "cannot be read as a model" in error_message(tmp_path / "empty", tmp_path / "ours", capsys)
    (stock_folder / "tokenizer.json").unlink()
    (stock_folder / "tokenizer_config.json").unlink()
    message = error_message(stock_folder, tmp_path / "ours", capsys)  # transformers creates an empty tokenizer then
    assert "has no tokenizer that can be loaded" in message
    (stock_folder / "model.safetensors").write_bytes(b"no weights")
    shutil.copytree(tmp_path / "tokenizer", stock_folder, dirs_exist_ok=True)
    assert "has weights that cannot be read" in error_message(stock_folder, tmp_path / "ours", capsys)


def test_an_untied_output_head_is_refused_wherever_it_is_loaded(stock_folder, tmp_path, capsys):
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    sentence = "lm_head.weight and transformer.wte.weight differ, but its config says that they are one tensor"
    for folder in (stock_folder, tmp_path / "ours"):
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()},
                  folder / "model.safetensors", {"format": "pt"})  # fmt: skip
        assert load_causal_lm(str(folder))  # twice the same values: tied
        weights["lm_head.weight"] = 2 * weights["transformer.wte.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert sentence in error_message(folder, tmp_path / "other", capsys)
        with pytest.raises(ValueError, match=sentence):
            load_causal_lm(str(folder))


def test_a_head_that_the_config_says_is_untied_cannot_be_converted(stock_folder, tmp_path, capsys):
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    model = GPT2ReproForCausalLM(GPT2ReproConfig.from_pretrained(tmp_path / "ours", tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "ours")
    message = error_message(tmp_path / "ours", tmp_path / "other", capsys)
    assert "this GPT-2 has an untied output head, our model a tied one" in message


def test_from_the_folder_of_a_run_its_model_is_named(stock_folder, tmp_path, capsys):
    for name in ("step-000010", "step-000020", "model"):  # what a run leaves, in this order
        shutil.copytree(stock_folder, tmp_path / "run" / name)
        message = error_message(tmp_path / "run", tmp_path / "other", capsys)
        assert message == f"{tmp_path / 'run'} is the folder of a run: give {tmp_path / 'run' / name}."


def test_the_context_has_the_name_that_older_tools_read(stock_folder, tmp_path):
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    main(["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back")])
    assert json.loads((tmp_path / "back/config.json").read_text())["n_ctx"] == 64


def test_an_existing_folder_is_left_alone(stock_folder, capsys):
    with pytest.raises(SystemExit):
        main(["--from", str(stock_folder), "--to", str(stock_folder)])
    assert "exists already: give another --to" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(stock_folder)


def test_weights_of_the_other_kind_in_a_folder_are_refused(stock_folder, tmp_path, capsys):
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    (tmp_path / "ours" / "model.safetensors").write_bytes((stock_folder / "model.safetensors").read_bytes())
    assert "h.0.attn.c_attn.weight" in error_message(tmp_path / "ours", tmp_path / "back", capsys)
    with pytest.raises(ValueError, match="of another shape"):
        load_gpt2(str(tmp_path / "ours"))


def test_the_tokenizer_keeps_the_ids_of_its_tokenizer_json_wherever_it_is_read(stock_folder, tmp_path):
    """AutoTokenizer gives the class that is named here, GPT2Tokenizer, a pre-tokenizer of its own."""
    expected = Tokenizer.from_file(str(stock_folder / "tokenizer.json"))
    expected.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=True)])
    expected.save(str(stock_folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (stock_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "the sea in 2023"
    ids = expected.encode(text).ids
    assert ids != AutoTokenizer.from_pretrained(stock_folder)(text).input_ids
    main(["--from", str(stock_folder), "--to", str(tmp_path / "ours")])
    main(["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back")])
    for folder in (stock_folder, tmp_path / "ours", tmp_path / "back"):
        assert load_causal_lm(str(folder))[1](text).input_ids == ids
        assert load_gpt2(str(folder))[1](text).input_ids == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(text).input_ids == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text).input_ids == ids
