"""The Python example in a model card, run as somebody does who has copied it."""

import copy
import json
import re

import pytest
import torch
from clean_process import run_without_package
from pushing import push_in_process

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.hub.conversion import to_hf_gpt2
from modeling_gpt2repro.hub.export import save_hub_folder

KINDS = ("ours", "stock", "chat", "short")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
RUN_ALL = """
import json, os
from transformers.utils import logging
logging.disable_progress_bar()
for folder, program in json.loads(sys.argv[1]):
    os.chdir(folder)
    print("-----")
    exec(program, {})
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """A folder of each kind; the context of "short" has room for the prompt and a few tokens."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        torch.manual_seed(0)
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32 if kind == "short" else 128}
        ids = {"vocab_size": len(tiny_tokenizer), "bos_token_id": 0, "eos_token_id": 0}
        model, tokenizer = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes, **ids)), copy.deepcopy(tiny_tokenizer)
        if kind == "chat":
            tokenizer.chat_template = TEMPLATE
        save_hub_folder(to_hf_gpt2(model) if kind == "stock" else model, tokenizer, root / kind)
    return root


def example_of(card: str) -> str:
    [program] = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    return program


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_runs_in_the_models_folder(kind, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders / kind)
    exec(example_of((folders / kind / "README.md").read_text()), {})
    text = capsys.readouterr().out
    assert len(text) > 1
    assert text.startswith("Hello, I'm a language model,") == (kind != "chat")


@pytest.mark.slow  # a process that imports all from scratch
def test_the_example_runs_without_the_package_and_with_a_name_on_the_hub(folders, tmp_path, here):
    programs = []
    for kind in KINDS:
        assert push_in_process(folders / kind, "--hub_model_id", f"user/example-{kind}").returncode == 0
        programs.append((str(folders / kind), example_of((folders / kind / "README.md").read_text())))
        programs.append((str(tmp_path), example_of((here.root / f"models/user/example-{kind}/README.md").read_text())))
    environment = here.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
    asked = len(here.log())
    output = run_without_package(RUN_ALL, json.dumps(programs), cwd=tmp_path, **environment)
    texts = output.split("-----\n")[1:]
    assert len(texts) == len(programs)
    assert all(len(text) > 1 for text in texts)
    for kind in KINDS:
        assert any(f"user/example-{kind}/resolve/" in line["path"] for line in here.log()[asked:])
