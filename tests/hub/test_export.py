"""A saved folder in transformers' pipeline: a call without a length fits the context, and one with a length gets it."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.hub.conversion import main
from modeling_gpt2repro.hub.export import save_hub_folder

PIPELINE = """
import json, sys
from transformers import pipeline
from transformers.utils import logging
logging.disable_progress_bar()
assert "modeling_gpt2repro" not in sys.modules
found = {}
for kind, folder in json.loads(sys.argv[1]).items():
    talk = pipeline("text-generation", model=folder, trust_remote_code=True)
    options = [{}, {"do_sample": False}, {"do_sample": False, "max_new_tokens": 7}]
    texts = [talk("the cat sees", return_tensors=True, **more)[0]["generated_token_ids"] for more in options]
    found[kind] = [talk.tokenizer("the cat sees").input_ids, *texts, talk.tokenizer.model_max_length]
print(json.dumps(found))
"""


def test_a_pipeline_call_without_arguments_generates_half_a_context(finished, tmp_path):
    folder = finished[0] / "model"
    main(["--from", str(folder), "--to", str(tmp_path / "stock")])
    folders = {"ours": str(folder), "stock": str(tmp_path / "stock")}
    command = [sys.executable, "-I", "-c", PIPELINE, json.dumps(folders)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    if Version(transformers.__version__) >= Version("5.23"):  # 5.17 warns whenever its pipeline generates
        assert result.stderr == ""  # not a warning either
    model = GPT2ReproForCausalLM.from_pretrained(folder).eval()
    found = json.loads(result.stdout)
    assert found.keys() == folders.keys()
    for kind, (prompt, sampled, greedy, short, model_max_length) in found.items():
        assert len(prompt) < len(sampled) <= len(prompt) + 16, kind  # of 32; sooner if it ends the text
        assert model_max_length == 32, kind
        ids = prompt
        for _ in range(16):
            ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
        assert greedy == ids, kind
        assert short == ids[: len(prompt) + 7], kind


@pytest.mark.parametrize(
    ("n_positions", "length"), [(1, 1), (64, 32), (128, 64), (511, 255), (512, None), (1024, None)]
)
def test_a_length_is_set_where_the_pipelines_own_would_not_fit(n_positions, length, tiny_tokenizer, tmp_path):
    config = GPT2ReproConfig(n_positions=n_positions, vocab_size=300, n_layer=1, n_head=1, n_embd=8, eos_token_id=0)
    save_hub_folder(GPT2ReproForCausalLM(config), tiny_tokenizer, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == length
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == n_positions


def test_in_gpt2s_context_a_max_length_is_kept_to(tiny_tokenizer, tmp_path, caplog):
    config = GPT2ReproConfig(n_positions=1024, vocab_size=300, n_layer=1, n_head=1, n_embd=8, eos_token_id=None)
    save_hub_folder(GPT2ReproForCausalLM(config), tiny_tokenizer, tmp_path)
    model = GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert model.generate(torch.ones(1, 3, dtype=torch.long), max_length=20).shape == (1, 20)
    assert caplog.text == ""


@pytest.mark.parametrize("given", [{"max_new_tokens": 9}, {"max_length": 30}])
def test_a_length_that_is_given_is_kept(given, tiny_tokenizer, tmp_path):
    config = GPT2ReproConfig(n_positions=64, vocab_size=300, n_layer=1, n_head=1, n_embd=8, eos_token_id=0)
    save_hub_folder(GPT2ReproForCausalLM(config), tiny_tokenizer, tmp_path, generation_config=GenerationConfig(**given))
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(saved, name) for name in ("max_new_tokens", "max_length")} == {
        "max_new_tokens": None, "max_length": None, **given
    }  # fmt: skip
