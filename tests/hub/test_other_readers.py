"""What others have installed reads a stock twin: transformers 4, and llama.cpp's converter."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import new_environment
from patience import PATIENCE_SECONDS
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.tokenizer import train_tokenizer
from modeling_gpt2repro.hub.conversion import main
from modeling_gpt2repro.hub.export import save_hub_folder

pytestmark = pytest.mark.slow
TEXT = "the cat of 2023 sees<|user|> a tree"
TRANSFORMERS_4 = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
found = []
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the cat of 2023 sees<|user|> a tree", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    talk = pipeline("text-generation", model=folder, return_tensors=True)
    found.append({
        "class": type(model).__name__,
        "inputs": sorted(inputs),
        "ids": inputs.input_ids[0].tolist(),
        "special": tokenizer.all_special_tokens,
        "greedy": model.generate(**inputs, max_new_tokens=9, do_sample=False)[0].tolist(),
        "talk": len(talk("the cat", do_sample=False)[0]["generated_token_ids"]) - len(tokenizer("the cat").input_ids),
        "length": tokenizer.model_max_length,
    })
print(json.dumps(found))
"""
READ_GGUF = """
import sys
import numpy as np
from gguf import GGUFReader
reader = GGUFReader(sys.argv[1])
arrays = {tensor.name: tensor.data for tensor in reader.tensors}
names = ("gpt2.context_length", "general.architecture", "tokenizer.ggml.pre", "tokenizer.ggml.eos_token_id")
arrays |= {name: np.array(reader.fields[name].contents()) for name in names}
arrays["tokens"] = np.array(reader.fields["tokenizer.ggml.tokens"].contents())
np.savez(sys.argv[2], **arrays)
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory) -> Path:
    """The python of an environment with transformers 4.57, and what llama.cpp's converter needs besides."""
    return new_environment(tmp_path_factory.mktemp("venv"), "transformers==4.57.6", "gguf", "sentencepiece")


def run(python: Path, *words, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "home")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [python, *map(str, words)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    return result


def stock_twin(model: GPT2ReproForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    save_hub_folder(model, tokenizer, folder / "ours")
    main(["--from", str(folder / "ours"), "--to", str(folder / "stock")])
    return folder / "stock"


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Our own kind, one with a pre-tokenizer that GPT2Tokenizer has not, and one that puts a space in front."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kinds = {
        "plain": byte_level,
        "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    }
    made = {name: train_tokenizer(["2023,2023,2023, the cat, the cat"], 262) for name in kinds}
    for name, tokenizer in made.items():
        tokenizer.backend_tokenizer.pre_tokenizer = kinds[name]
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    return made


def test_transformers_4_reads_the_same_ids_and_generates_the_same_text(transformers_4, make_model, tmp_path):
    made = tokenizers()
    folders = [stock_twin(make_model("ours", 263), made[name], tmp_path / name) for name in made]
    result = run(transformers_4, "-I", "-c", TRANSFORMERS_4, *folders, cwd=tmp_path)
    assert "length" not in result.stderr  # in a warning
    ids = {name: tokenizer.backend_tokenizer.encode(TEXT).ids for name, tokenizer in made.items()}
    assert len(set(map(tuple, ids.values()))) == 3
    for name, found in zip(made, json.loads(result.stdout), strict=True):
        assert found["ids"] == ids[name]
        assert found["inputs"] == ["attention_mask", "input_ids"]
        assert found["special"] == ["<|endoftext|>", "<|user|>"]
        greedy = make_model("ours", 263).generate(torch.tensor([ids[name]]), max_new_tokens=9, do_sample=False)
        assert found["greedy"] == greedy[0].tolist()
        assert (found["class"], found["length"]) == ("GPT2LMHeadModel", 64)
        assert 1 <= found["talk"] <= 32


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Path:
    """llama.cpp's folder in the source package of llama-cpp-python, which is downloaded and not built."""
    folder = tmp_path_factory.mktemp("llama")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*command, "llama-cpp-python", "-d", folder], check=True, capture_output=True)
    [package] = folder.glob("*.tar.gz")
    with tarfile.open(package) as archive:
        wanted = (
            "/vendor/llama.cpp/convert_hf_to_gguf.py",
            "/vendor/llama.cpp/conversion/",
            "/vendor/llama.cpp/gguf-py/",
        )
        members = [member for member in archive if any(part in member.name for part in wanted)]
        archive.extractall(folder, members, filter="data")
    [converter] = folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    return converter.parent


def test_llama_cpp_converts_a_stock_twin(transformers_4, llama_cpp, gpt2_tokenizer, tmp_path):
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=2, n_head=2, n_embd=16, n_positions=64))
    folder = stock_twin(model, gpt2_tokenizer, tmp_path)
    converter = llama_cpp / "convert_hf_to_gguf.py"
    run(transformers_4, converter, folder, "--outtype", "f32", "--outfile", tmp_path / "model.gguf", cwd=tmp_path)
    run(transformers_4, "-c", READ_GGUF, tmp_path / "model.gguf", tmp_path / "found.npz", cwd=tmp_path)
    found = np.load(tmp_path / "found.npz")
    assert found["general.architecture"].item() == "gpt2"
    assert found["gpt2.context_length"].item() == 64
    assert found["tokenizer.ggml.pre"].item() == "gpt-2"
    assert found["tokenizer.ggml.eos_token_id"].item() == 50256
    assert (len(found["tokens"]), found["tokens"][15496]) == (50257, "Hello")
    weights = model.state_dict()
    for name, ours in {
        "token_embd.weight": "transformer.wte.weight",
        "position_embd.weight": "transformer.wpe.weight",
        "blk.1.attn_qkv.weight": "transformer.h.1.attn.c_attn.weight",
        "blk.1.ffn_down.weight": "transformer.h.1.mlp.c_proj.weight",
    }.items():
        assert np.array_equal(found[name], weights[ours].numpy()), name
