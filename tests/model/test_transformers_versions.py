"""A saved folder loads with other versions of transformers, because its users have their own."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from environments import new_environment
from patience import PATIENCE_SECONDS

from modeling_gpt2repro import GPT2ReproForCausalLM

PROGRAM = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, __version__
folder, out, version = sys.argv[1:]
assert __version__ == version and "modeling_gpt2repro" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert model.lm_head.weight is model.transformer.wte.weight
ids = torch.arange(1, 25)[None] % 97
mask = torch.ones_like(ids).index_fill_(1, torch.arange(5), 0)
outputs = model(ids, labels=ids, output_hidden_states=True)
found = {"logits": outputs.logits, "loss": outputs.loss, "hidden_states": outputs.hidden_states}
found["padded"] = model(ids, attention_mask=mask).logits[:, 5:]
found["greedy"] = model.generate(ids, max_new_tokens=20, do_sample=False)
model.set_attn_implementation("eager")
found["attentions"] = model(ids, output_attentions=True).attentions  # no other implementation returns them
model.train()(ids, labels=ids, use_cache=False).loss.backward()
found["gradient"] = model.transformer.wte.weight.grad
AutoModel.from_pretrained(folder, trust_remote_code=True)
head = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
assert head(ids).logits.shape == (1, 3)
model.save_pretrained(out + "/again")
AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True)
torch.save(found, out + "/found.pt")
"""


def run_with_version(version: str, folder: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run PROGRAM in a new virtual environment with that version of transformers and this environment's torch."""
    python = new_environment(tmp_path / "venv", f"transformers=={version}")
    return subprocess.run(
        [python, "-I", "-c", PROGRAM, str(folder), str(tmp_path), version],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        cwd=tmp_path,
    )


def test_model_file_contains_the_names_that_transformers_5_5_searches():
    source = inspect.getsource(sys.modules[GPT2ReproForCausalLM.__module__])
    assert "eager_attention_forward" in source
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in source


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.5.0", "5.10.0", "5.17.0"])
def test_saved_folder_gives_the_same_results_on_other_versions(carried, tmp_path, version):
    carried.save_pretrained(tmp_path / "folder")
    result = run_with_version(version, tmp_path / "folder", tmp_path)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)

    ids = torch.arange(1, 25)[None] % 97
    mask = torch.ones_like(ids).index_fill_(1, torch.arange(5), 0)
    here = carried(ids, labels=ids, output_hidden_states=True)
    expected = {"logits": here.logits, "loss": here.loss, "hidden_states": here.hidden_states}
    expected["padded"] = carried(ids, attention_mask=mask).logits[:, 5:]
    carried.set_attn_implementation("eager")
    expected["attentions"] = carried(ids, output_attentions=True).attentions
    carried.train()(ids, labels=ids, use_cache=False).loss.backward()
    expected["gradient"] = carried.transformer.wte.weight.grad
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
    assert torch.equal(found["greedy"], carried.generate(ids, max_new_tokens=20, do_sample=False))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.57.6", "5.4.0"])
def test_too_old_version_raises_import_error_naming_the_required_one(carried, tmp_path, version):
    carried.save_pretrained(tmp_path / "folder")
    result = run_with_version(version, tmp_path / "folder", tmp_path)
    message = (
        f"gpt2repro models need transformers 5.5.0 or newer, this is {version}: pip install --upgrade transformers"
    )
    assert result.stderr.splitlines()[-1] == f"ImportError: {message}"
