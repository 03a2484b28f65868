"""prepare_data.py --push_to_hub: what arrives, in which commits, what a second push and a stopped one do."""

import hashlib
import json
import re
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from damage import edit_json
from huggingface_hub import HfApi, constants, metadata_load
from pushing import files_in

import prepare_data
from modeling_gpt2repro.data.shards.dataset import MANIFEST, open_shards
from modeling_gpt2repro.hub import push_shards
from modeling_gpt2repro.storage.checksums import sha256_of


@pytest.fixture
def here(here, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{here.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    return here


@pytest.fixture
def prepared(token_shards, tmp_path):
    """A copy of a prepared folder, which a test may change."""
    return shutil.copytree(token_shards.folder, tmp_path / "prepared")


def push(folder, name, *words) -> tuple[int, None]:
    try:
        prepare_data.main(["--output_dir", str(folder), "--push_to_hub", "--hub_dataset_id", name, *words])
    except SystemExit as ended:
        return ended.code
    return 0


def commits(hub, name: str) -> list[str]:
    return [line["path"] for line in hub.log() if f"datasets/{name}/commit/" in line["path"] and line["status"] == 200]


def uploads(hub, name: str) -> int:
    return sum(line["method"] == "PUT" and f"/lfs/{name}/" in line["path"] for line in hub.log())


def test_pushed_shards_are_opened_from_the_hub_as_they_were(here, prepared, token_shards, capsys):
    assert push(prepared, "tokens-1") == 0
    assert re.fullmatch(
        rf"pushed to {here.endpoint}/datasets/user/tokens-1 \(commit \w{{7}}\)\n", capsys.readouterr().out
    )
    there = files_in(here.root / "datasets/user/tokens-1")
    card = there.pop("README.md").decode()
    assert there == files_in(prepared)
    assert f"{token_shards.manifest['splits']['train']['tokens']:,} training tokens" in card
    assert "--shards hf://user/tokens-1" in card
    assert metadata_load(here.root / "datasets/user/tokens-1/README.md")["tags"] == ["gpt2repro"]
    assert open_shards("hf://user/tokens-1").fingerprint == token_shards.fingerprint
    seen = len(commits(here, "user/tokens-1"))
    assert push(prepared, "user/tokens-1") == 0
    assert len(commits(here, "user/tokens-1")) == seen  # nothing is sent twice


def test_a_preparation_ends_with_its_push(here, tmp_path, tiny_tokenizer, token_shards):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = token_shards.folder.parent / "texts.jsonl"
    words = ("--train_files", str(texts), "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "1")
    assert push(tmp_path / "out", "tokens-2", *words) == 0
    assert open_shards("hf://user/tokens-2").fingerprint == open_shards(tmp_path / "out").fingerprint


def test_a_push_that_is_refused_is_noticed_before_the_preparation(here, tmp_path, token_shards, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", here.read_only_token)
    texts = token_shards.folder.parent / "texts.jsonl"
    assert push(tmp_path / "out", "tokens-3", "--train_files", str(texts)) == 2
    assert "this token may not write to" in capsys.readouterr().err
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_an_interrupted_push_is_not_readable_and_continues(here, prepared, token_shards, monkeypatch, capsys):
    monkeypatch.setattr(push_shards, "COMMIT_FILES", 1)
    third = sha256_of(prepared / "train_000002.npy")
    with here.faults({"match": f"PUT .*{third}", "status": 400}):
        assert push(prepared, "tokens-4", "--hub_wait_seconds", "0") != 0
    assert "run the same command again" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"it has neither manifest\.json nor"):
        open_shards("hf://user/tokens-4")
    sent = uploads(here, "user/tokens-4")
    assert push(prepared, "tokens-4") == 0
    assert open_shards("hf://user/tokens-4").fingerprint == token_shards.fingerprint
    assert uploads(here, "user/tokens-4") - sent == 2  # the two shards that had not arrived


def test_other_shards_in_the_same_repository_replace_the_first(here, prepared, tmp_path, token_shards):
    assert push(prepared, "tokens-5") == 0
    manifest = json.loads((prepared / MANIFEST).read_text())
    last = manifest["splits"]["train"]["shards"].pop()
    manifest["splits"]["train"]["tokens"] -= last["tokens"]
    manifest["splits"]["train"]["documents"] -= last["documents"]
    (prepared / MANIFEST).write_text(json.dumps(manifest))
    (prepared / last["file"]).unlink()
    assert push(prepared, "tokens-5") == 0
    assert last["file"] not in files_in(here.root / "datasets/user/tokens-5")
    assert open_shards("hf://user/tokens-5").manifest == manifest


def test_damaged_shards_are_not_pushed(here, prepared, capsys):
    np.save(prepared / "train_000001.npy", np.zeros(3, np.uint16))
    assert push(prepared, "tokens-6") == 2
    assert "holds 3 ids of uint16" in capsys.readouterr().err
    assert not HfApi(endpoint=here.endpoint).repo_exists("user/tokens-6", repo_type="dataset")


def test_names_cannot_break_out_of_the_card():
    evil = "x](http://evil) | **b** <script>\n# Title\n---\nlicense: evil"
    manifest = {
        "source": {"dataset": evil, "files": [evil], "revision": evil, "config": evil},
        "tokenizer": {"name": evil, "vocab_size": 9, "sha256": "0" * 64},
        "end_of_text_id": 0,
        "splits": {split: {"tokens": 1, "shards": [{"file": "train_000000.npy"}]} for split in ("train", "validation")},
    }
    card = push_shards.dataset_card(manifest, "user/name", {})
    _, metadata, body = card.split("---\n", 2)
    assert "evil" not in metadata
    assert "\n# Title" not in body
    assert "<script>" not in body
    assert "](http" not in body
    rows = [line for line in body.splitlines() if line.startswith("| source")]
    assert rows
    assert rows[0].count("|") == 3


@pytest.mark.parametrize(
    "name", ["a/b/../../whoami-v2", "x/y\n---\nlicense: evil", "../x", "x/y](http://evil)", "a/b?c"]
)
def test_a_source_that_is_no_name_on_the_hub_is_not_asked_for(name):
    api = Mock()
    assert push_shards.source_metadata(api, {"dataset": name}) == {}
    assert api.mock_calls == []


def test_shards_to_train_on_are_needed(here, prepared, capsys):
    empty = {"shards": [], "tokens": 0, "documents": 0, "text_bytes": 0}
    edit_json(prepared / MANIFEST, lambda manifest: manifest["splits"]["train"].update(empty))
    for path in prepared.glob("train_*.npy"):
        path.unlink()
    assert push(prepared, "tokens-8") == 2
    assert "manifest.json names no training shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push_to_hub"], "--push_to_hub needs --hub_dataset_id OWNER/NAME"),
        (["--push_to_hub", "--hub_dataset_id", "a/b/c"], "hub_dataset_id (a/b/c) must be OWNER/NAME"),
        (["--hub_dataset_id", "a/b"], "hub_dataset_id (a/b) is for --push_to_hub only"),
    ],
)
def test_flags_of_the_push_that_do_not_fit_are_refused(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        prepare_data.main(["--output_dir", str(tmp_path / "out"), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_nobody_reads_a_mixture_while_shards_are_replaced(here, prepared, monkeypatch):
    assert push(prepared, "tokens-7") == 0
    ids = np.load(prepared / "train_000001.npy")
    ids[7] = ids[8]
    np.save(prepared / "train_000001.npy", ids)
    manifest = json.loads((prepared / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][1]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (prepared / MANIFEST).write_text(json.dumps(manifest))
    with monkeypatch.context() as patch:
        patch.setattr(push_shards, "source_metadata", Mock(side_effect=OSError("interrupted before the manifest")))
        assert push(prepared, "tokens-7", "--hub_wait_seconds", "0") != 0
    with pytest.raises(ValueError, match=r"it has neither manifest\.json nor"):
        open_shards("hf://user/tokens-7")
    assert push(prepared, "tokens-7") == 0
    assert open_shards("hf://user/tokens-7").manifest == manifest
