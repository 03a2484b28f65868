"""Folders of models that somebody else wrote: they load, or are refused in one sentence; nothing of theirs runs."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import NOT_OBJECTS, put_in_place
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.tokenizer import load_tokenizer
from modeling_gpt2repro.evaluation.load_model import load_causal_lm
from modeling_gpt2repro.hub.conversion import convert_folder, load_checkpoint, load_gpt2
from modeling_gpt2repro.hub.export import save_hub_folder

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
LONGEST = 1_000  # characters of a sentence, with the name of a temporary folder in it
LOADERS: dict[str, Callable[[str], object]] = {
    "--init_from": load_gpt2,
    "--model": load_causal_lm,
    "--tokenizer": load_tokenizer,
    "--resume_from_checkpoint": lambda folder: load_checkpoint(Path(folder)),
}
FINE = ("NaN", "infinity", "a huge number", "empty object")  # JSON objects, which a library may take
WEIGHTS = ("--init_from", "--model", "--resume_from_checkpoint")
EVERY = tuple(LOADERS)
CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(GPT2Config):
    model_type = {kind!r}
class Model(GPT2LMHeadModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(*args, **kwargs):
    pass
"""
AUTO_MAP = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}


class Exploit:
    """Creates the file `path` when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="session")
def fine_folders(tiny_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """A folder of either kind of GPT-2, as `save_hub_folder` writes it."""
    root = tmp_path_factory.mktemp("fine")
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**SHAPE, vocab_size=len(tiny_tokenizer)))
    ours = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPE, vocab_size=len(tiny_tokenizer)))
    for name, model in (("gpt2", stock), ("gpt2repro", ours)):
        save_hub_folder(model, tiny_tokenizer, root / name)
    return {name: root / name for name in ("gpt2", "gpt2repro")}


@pytest.fixture
def folder_of(fine_folders, tmp_path):
    """folder_of(kind) -> a copy of a fine folder to spoil."""

    def copied(kind: str, name: str = "foreign") -> Path:
        shutil.copytree(fine_folders[kind], tmp_path / name)
        return tmp_path / name

    return copied


def rewrite(folder: Path, file: str, **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(loader: str, folder: Path) -> str:
    """The one sentence with which a loader refuses the folder."""
    with pytest.raises(ValueError, match=re.escape(str(folder))) as refused:
        LOADERS[loader](str(folder))
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < LONGEST
    assert "trust_remote_code=True" not in message
    return message


# --- JSON files ------------------------------------------------------------------------------------------------------
DAMAGES = {
    **{kind: lambda path, kind=kind: path.write_bytes(NOT_OBJECTS[kind]) for kind in NOT_OBJECTS if kind not in FINE},
    "a folder": lambda path: put_in_place(path, "a folder"),
    "a pipe": lambda path: put_in_place(path, "a pipe"),
}
READ_BY = {
    "config.json": EVERY,
    "generation_config.json": EVERY,
    "tokenizer_config.json": EVERY,
    "tokenizer.json": EVERY,
    "special_tokens_map.json": EVERY,
    "added_tokens.json": EVERY,
    "model.safetensors.index.json": WEIGHTS,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", READ_BY)
def test_a_damaged_json_file_is_named(folder_of, file, damage):
    folder = folder_of("gpt2repro")
    if file.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    DAMAGES[damage](folder / file)
    for loader in READ_BY[file]:
        assert file in refusal(loader, folder), loader


PANICS = {  # of the Rust code in `tokenizers`: they are no Exceptions
    "while loading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////"}},
    "while encoding": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
}


@pytest.mark.parametrize("when", PANICS)
@pytest.mark.parametrize("loader", ["--init_from", "--model", "--tokenizer"])
def test_a_tokenizer_that_panics_is_refused(folder_of, loader, when):
    folder = folder_of("gpt2")
    rewrite(folder, "tokenizer.json", **PANICS[when])
    refusal(loader, folder)


def test_a_tokenizer_that_pads_to_a_billion_ids_takes_no_memory(folder_of):
    folder = folder_of("gpt2")
    padding = {"strategy": {"Fixed": 2**62}, "direction": "Right", "pad_to_multiple_of": None}
    rewrite(folder, "tokenizer.json", padding=padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"})
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("the cat")["input_ids"] == tokenizer.encode("the cat")


@pytest.mark.parametrize("kind", ["gpt2", "gpt2repro"])
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in SIZES for value in (-1, 0, 10**12, 1e400, float("nan"), "12", [12], {"a": 1}, 2.5)]
    + [("layer_norm_epsilon", value) for value in (float("nan"), float("inf"), -1e-5, "small")]
    + [("n_positions", 2**24), ("n_embd", 2**12)]  # within bounds, but not of these weights
    + [("model_type", value) for value in ("llama", 3, ["gpt2"], None, "x" * 10_000)],
)
def test_a_config_that_describes_no_gpt2_is_refused_before_weights_are_read(folder_of, kind, name, value):
    folder = folder_of(kind)
    rewrite(folder, "config.json", **{name: value})
    assert "cannot be read" in refusal("--init_from", folder)
    if name in SIZES:
        assert refusal("--model", folder)
    if value in (2**24, 2**12):
        for loader in ("--init_from", "--model"):
            assert "parameters, and its weights have" in refusal(loader, folder)


def test_an_empty_config_is_refused(folder_of):
    folder = folder_of("gpt2")
    (folder / "config.json").write_text("{}")
    for loader in WEIGHTS:
        assert refusal(loader, folder)


@pytest.mark.parametrize("loader", ["--init_from", "--model", "--tokenizer"])
def test_a_billion_labels_take_no_memory(folder_of, loader):
    folder = folder_of("gpt2")
    rewrite(folder, "config.json", num_labels=10**9)
    assert "num_labels 1000000000" in refusal(loader, folder)


# --- what a config may ask for ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["gpt2", "gpt2repro"])
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["kernels-community/flash-attn2", "owner/kernel:function", "flash_attention_2", 7])
def test_no_attention_kernel_is_fetched(folder_of, kind, name, value):
    folder = folder_of(kind)
    rewrite(folder, "config.json", **{name: value})
    for model, _ in (load_gpt2(str(folder)), load_causal_lm(str(folder))):
        assert model.config._attn_implementation == "sdpa"


def test_only_the_shape_of_a_config_is_followed(folder_of, fine_folders):
    """Not code, other weights, pipelines or quantization; nothing of them reaches a folder that is saved later."""
    folder = folder_of("gpt2repro")
    odd = {"transformers_weights": "../other.safetensors", "custom_pipelines": {"a": {"impl": "owner/name--code.P"}}}
    rewrite(folder, "config.json", **odd, auto_map={"AutoModel": "owner/name--code.Model"}, torch_dtype="nonsense")
    found, expected = (load_gpt2(str(each))[0].config.to_diff_dict() for each in (folder, fine_folders["gpt2repro"]))
    assert found | {"_name_or_path": ""} == expected | {"_name_or_path": ""}
    rewrite(folder, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "quantized" in refusal("--init_from", folder)


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_does_not_bring_its_base_model(folder_of, fine_folders, with_config):
    folder = folder_of("gpt2")
    if not with_config:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(fine_folders["gpt2"]), "peft_type": "LORA"})
    )
    for loader in WEIGHTS:
        assert "it is an adapter: merge it into its base model" in refusal(loader, folder)


# --- weights ---------------------------------------------------------------------------------------------------------
def pickled(content: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(content, folder / "pytorch_model.bin")


def cut_off(folder: Path):
    torch.save({"transformer.wte.weight": torch.zeros(300, 32)}, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])


BAD_PICKLES = {
    "module": pickled(torch.nn.Linear(2, 2)),
    "tensor": pickled(torch.zeros(3)),
    "list": pickled([1, 2]),
    "numbers": pickled({"transformer.wte.weight": 1.0}),
    "cut off": cut_off,
    "empty": lambda folder: (folder / "pytorch_model.bin").touch(),
    "text": lambda folder: (folder / "pytorch_model.bin").write_text("no weights"),
    "folder": lambda folder: (folder / "pytorch_model.bin").mkdir(),
}


@pytest.mark.parametrize("bad", BAD_PICKLES)
def test_pickled_weights_that_are_no_tensors_are_refused(folder_of, bad):
    folder = folder_of("gpt2")
    (folder / "model.safetensors").unlink()
    BAD_PICKLES[bad](folder)
    for loader in ("--init_from", "--model"):
        assert "weights_only" not in refusal(loader, folder)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2repro"])
def test_pickled_tensors_load_except_in_a_checkpoint(folder_of, fine_folders, kind):
    folder = folder_of(kind)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    expected = load_gpt2(str(fine_folders[kind]))[0].state_dict()
    found = load_gpt2(str(folder))[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load_causal_lm(str(folder))
    if kind == "gpt2repro":
        assert "it has no weights: give a folder with model.safetensors" in refusal("--resume_from_checkpoint", folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_pickled_weights_does_not_run(folder_of, tmp_path, zipped):
    folder = folder_of("gpt2")
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "marker"
    if zipped:
        torch.save({"a": Exploit(marker)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Exploit(marker)}))
    for loader in WEIGHTS:
        refusal(loader, folder)
    assert not marker.exists()
    if zipped:  # it would have
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("where", ["../outside.safetensors", "/absolute", "sub/../../outside.safetensors", "x.bin", 7])
def test_an_index_cannot_name_files_outside_of_its_folder(folder_of, tmp_path, where):
    folder = folder_of("gpt2")
    weights = load_file(folder / "model.safetensors")
    target = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(target)
    where = str(target) if where == "/absolute" else where
    (folder / "sub").mkdir()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, where)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for loader in ("--init_from", "--model"):
        assert "names" in refusal(loader, folder)
    shutil.copy(target, folder / "inside.safetensors")
    index["weight_map"] = dict.fromkeys(weights, "inside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for loader in ("--init_from", "--model"):
        assert LOADERS[loader](str(folder))


# --- code ------------------------------------------------------------------------------------------------------------
def with_code(folder: Path, marker: Path, kind: str, config: bool, tokenizer: bool, known_tokenizer: bool):
    """Let a folder bring code of its own, which creates `marker`, for its config and model, or for its tokenizer."""
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(marker=str(marker), kind=kind))
    if config:
        rewrite(folder, "config.json", auto_map=AUTO_MAP, model_type=kind)
    if tokenizer:
        changes = {} if known_tokenizer else {"tokenizer_class": "StrangeTokenizer"}
        auto_map = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
        rewrite(folder, "tokenizer_config.json", auto_map=auto_map, **changes)


# Kind of model, code for it, for the tokenizer; whether transformers knows the tokenizer's class -> who needs the code.
CASES = [
    ("gpt2", True, True, True, ()),
    ("gpt2repro", True, True, True, ()),
    ("unknown", True, False, True, ("--init_from", "--model")),
    ("gpt2repro", False, True, False, ("--init_from", "--model", "--tokenizer")),
]


@pytest.mark.parametrize(("kind", "config", "tokenizer", "known", "refused"), CASES)
def test_code_runs_only_if_an_evaluation_is_to_trust_it(
    folder_of, tmp_path, monkeypatch, capfd, kind, config, tokenizer, known, refused
):
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(f"asked: {prompt}"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"
    folder = folder_of("gpt2" if kind == "unknown" else kind)
    with_code(folder, marker, kind, config, tokenizer, known)
    for loader in ("--init_from", "--model", "--tokenizer"):
        if loader in refused:
            assert "code" in refusal(loader, folder) or kind == "unknown"
        else:
            assert LOADERS[loader](str(folder))
    assert not marker.exists()
    assert "y/N" not in "".join(capfd.readouterr())
    if "--model" in refused:
        load_causal_lm(str(folder), trust_remote_code=True)
        assert marker.exists()


@pytest.mark.parametrize("kind", ["gpt2", "gpt2repro"])
def test_a_converted_folder_names_no_foreign_code(folder_of, tmp_path, kind):
    """`auto_map` may name another repository: it would run for all who trust the new folder's own code."""
    folder = folder_of(kind)
    rewrite(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "owner/name--code.Tokenizer"]})
    rewrite(folder, "config.json", custom_pipelines={"a": {"impl": "owner/name--code.Pipeline"}})
    convert_folder(str(folder), tmp_path / "converted")
    assert b"owner/name" not in b"".join(path.read_bytes() for path in (tmp_path / "converted").glob("*.json"))
