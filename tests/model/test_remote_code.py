"""Which code runs when folders of one name ship different modeling files."""

from pathlib import Path

import pytest
import torch
from clean_process import run_without_package

PROGRAM = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification
out, *folders = sys.argv[1:]
found = []
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    ids = torch.arange(1, 9)[None]
    body = AutoModel.from_pretrained(f"{folder}/model", trust_remote_code=True)(ids).last_hidden_state
    tokens = AutoModelForTokenClassification.from_pretrained(f"{folder}/model", trust_remote_code=True)
    found.append({"logits": model(ids).logits, "body": body, "head's body": tokens.transformer(ids).last_hidden_state})
    model.save_pretrained(f"{folder}-again/model")
torch.save(found, out)
"""


@pytest.fixture
def outputs_of(tmp_path):
    """Load folders in one new process, which knows neither the package nor this checkout."""

    def run(*folders: Path) -> list[dict[str, torch.Tensor]]:
        run_without_package(PROGRAM, tmp_path / "found.pt", *folders, cwd=tmp_path)
        return torch.load(tmp_path / "found.pt", weights_only=True)

    return run


def test_folders_of_one_name_run_their_own_modeling_files(carried, tmp_path, outputs_of):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        carried.save_pretrained(folder / "model")
    changed = folders[1] / "model" / "modeling_gpt2repro.py"
    norm = "hidden_states = self.ln_f(hidden_states)"
    assert changed.read_text().count(norm) == 1
    changed.write_text(changed.read_text().replace(norm, f"{norm} * 2"))
    once = {"logits": carried(torch.arange(1, 9)[None]).logits}
    once["body"] = once["head's body"] = carried.transformer(torch.arange(1, 9)[None]).last_hidden_state
    twice = {name: 2 * value for name, value in once.items()}

    torch.testing.assert_close(outputs_of(*folders), [once, twice])
    again = [folder.with_name(f"{folder.name}-again") for folder in folders]  # saved from remote code
    torch.testing.assert_close(outputs_of(*reversed(again)), [twice, once])


def test_saving_twice_writes_the_same_code_files(carried, tmp_path):
    for folder in ("first", "second"):
        carried.save_pretrained(tmp_path / folder)
    carried.config.save_pretrained(tmp_path / "config")
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").glob("*.py")}
    assert set(files) == {"configuration_gpt2repro.py", "modeling_gpt2repro.py"}
    for folder in ("second", "config"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.py")} == files
