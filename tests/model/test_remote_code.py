"""Which code runs when folders of one name ship different modeling files."""

import json
from pathlib import Path

import pytest
import torch
from clean_process import run_without_package

# Runs in a process of its own for each file of outputs in argv[1]; all are forked from one, to import once.
PROGRAM = """
import json, os, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers import GenerationMixin, PreTrainedModel
for out, folders in json.loads(sys.argv[1]).items():
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        break
else:
    sys.exit()
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
    """Load each list of folders in a new process, which knows neither the package nor this checkout."""

    def run(*lists: list[Path]) -> list[list[dict[str, torch.Tensor]]]:
        jobs = {str(tmp_path / f"{number}.pt"): list(map(str, folders)) for number, folders in enumerate(lists)}
        run_without_package(PROGRAM, json.dumps(jobs), cwd=tmp_path)
        return [torch.load(file, weights_only=True) for file in jobs]

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

    again = [folder.with_name(f"{folder.name}-again") for folder in folders]  # saved from remote code
    found, found_again = outputs_of(folders, again[::-1])
    torch.testing.assert_close(found, [once, twice])
    torch.testing.assert_close(found_again, [twice, once])


def test_saving_twice_writes_the_same_code_files(carried, tmp_path):
    for folder in ("first", "second"):
        carried.save_pretrained(tmp_path / folder)
    carried.config.save_pretrained(tmp_path / "config")
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").glob("*.py")}
    assert set(files) == {"configuration_gpt2repro.py", "modeling_gpt2repro.py"}
    for folder in ("second", "config"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.py")} == files
