"""run.json: what a run began with."""

import json
import subprocess
from dataclasses import asdict
from email.message import Message
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from cards import model_card, write_run
from warm_python import ROOT

from modeling_gpt2repro.runs import config
from modeling_gpt2repro.runs.config import (
    diff_arguments,
    has_uncommitted_changes,
    make_writable,
    project_address,
    project_version,
    read_run_config,
    write_run_config,
)
from modeling_gpt2repro.runs.summary import installation
from modeling_gpt2repro.training.arguments import TrainArguments


def test_run_json_can_be_read_back(tmp_path):
    args = TrainArguments(output_dir=str(tmp_path / "run"))
    make_writable(tmp_path / "run")
    write_run_config(
        tmp_path / "run", asdict(args), {"processes": 1}, attention={}, data_fingerprint={"seed": 1}, command="a b"
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"]["train_tokens"] == 10_000_000_000
    assert record["versions"]["torch"] == torch.__version__
    with open(ROOT / "pyproject.toml") as file:
        assert f'version = "{record["versions"]["gpt2repro"]}"\n' in file.read()
    assert record["command"] == read_run_config(tmp_path / "run")["command"] == "a b"


def test_a_resume_by_another_command_is_among_the_changes(tmp_path):
    write_run_config(tmp_path, {"seed": 1}, {}, {}, {}, command="train --seed 1")
    assert diff_arguments(tmp_path, {"seed": 1}, {}, "train --seed 1") == {}
    changed = diff_arguments(tmp_path, {"seed": 2}, {}, "train --seed 2")
    assert changed == {"seed": (1, 2), "command": ("train --seed 1", "train --seed 2")}
    assert diff_arguments(tmp_path, {"seed": 2}, {}, None) == {"seed": (1, 2)}  # from a notebook
    (tmp_path / "run.json").write_text('{"arguments": {"seed": 1}}')  # of an older version
    assert "command" not in diff_arguments(tmp_path, {"seed": 1}, {}, "train --seed 1")
    (tmp_path / "run.json").write_text('{"arguments": {}, "command": ["train"]}')
    with pytest.raises(ValueError, match=r"run\.json is damaged \(command is"):
        read_run_config(tmp_path)


def test_the_version_is_that_of_the_checkout_else_of_the_installed_package(tmp_path, monkeypatch):
    file = tmp_path / "modeling_gpt2repro/runs/config.py"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "gpt2repro"\nversion = "9.8.7"\n')
    assert project_version(file) == "9.8.7"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "1"\n')
    for answer, expected in ((lambda name: "0.0.1", "0.0.1"), (not_installed, None)):
        monkeypatch.setattr(config, "version", answer)
        assert project_version(file) == expected


def test_the_address_of_the_repository_is_that_of_the_packages_metadata(monkeypatch, tmp_path, tiny_model):
    package = Message()
    package["Project-URL"] = "Changelog, https://example.org/changes"
    monkeypatch.setattr(config, "metadata", lambda name: package)
    assert project_address() is None
    package["Project-URL"] = "Repository, https://example.org/owner/name"
    assert project_address() == "https://example.org/owner/name"
    assert installation({"commit": "c0ffee", "versions": {}})[0] == (
        "git clone https://example.org/owner/name gpt2repro && cd gpt2repro"
    )
    card = model_card(tiny_model, run_folder=write_run(tmp_path))
    assert "| code | [gpt2repro](https://example.org/owner/name), commit c0ffee |\n" in card
    monkeypatch.setattr(config, "metadata", not_installed)
    assert project_address() is None


def not_installed(name):
    raise PackageNotFoundError(name)


def test_files_that_differ_from_the_commit_are_noticed(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("1")
    assert not has_uncommitted_changes(file)  # and no commit
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    assert not has_uncommitted_changes(file)
    file.write_text("2")
    assert has_uncommitted_changes(file)
