"""Prepared shards in a dataset repository: downloaded, checked, resumed, refused."""

import itertools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants
from pushing import UNREACHABLE_HUB
from toy_runs import TOKENS_PER_STEP, logged_values, train_here

from modeling_gpt2repro.data.shards import dataset, hub_shards
from modeling_gpt2repro.data.shards.dataset import MANIFEST, open_shards
from modeling_gpt2repro.data.shards.nanogpt_format import LLMC_HEADER_BYTES, LLMC_MAGIC
from modeling_gpt2repro.runs.reference import gpt2_loss_of_shards, gpt2_score_file
from modeling_gpt2repro.storage import hub_files

counter = itertools.count()


@pytest.fixture
def cache(here, tmp_path, monkeypatch):
    """The Hub's cache of this test."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    template = "{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{here.endpoint}/{template}")  # made at import
    return folder


@pytest.fixture
def repository(here, token_shards):
    """A dataset repository with the shards of `token_shards`, and foreign code: (its name, its folder)."""
    name = f"user/shards-{next(counter)}"
    folder = here.new_repository(f"datasets/{name}")
    shutil.copytree(token_shards.folder, folder, dirs_exist_ok=True)
    for file in ("loading_script.py", "tokenizer/tokenization_mine.py"):
        (folder / file).write_text("raise SystemExit('this is foreign code')")
    return name, folder


def requests(hub, name: str) -> list[dict]:
    return [line for line in hub.log() if name in line["path"]]


def downloads(hub, name: str) -> int:
    """How many shards were asked for: the client asks for each address, from which the storage then sends the file."""
    return sum(line["method"] == "HEAD" and ".npy" in line["path"] for line in requests(hub, name))


def test_shards_on_the_hub_are_those_on_disk_and_are_downloaded_once(cache, here, repository, token_shards, all_ids):
    name, _ = repository
    opened = open_shards(f"hf://{name}")
    for split in ("train", "validation"):
        np.testing.assert_array_equal(all_ids(opened, split), all_ids(token_shards, split))
    assert opened.fingerprint == token_shards.fingerprint
    assert not list(cache.rglob("*.py"))  # nothing but shards, manifest and tokenizer is taken
    num_shards = len(list(token_shards.folder.glob("*.npy")))
    assert downloads(here, name) == num_shards
    pinned = hub_shards.pin_address(f"hf://datasets/{name}@main")
    seen = len(requests(here, name))
    assert open_shards(pinned).folder == opened.folder
    assert len(requests(here, name)) == seen  # for a commit that is complete the Hub is not asked


def test_an_interrupted_download_continues_with_the_next_file(cache, here, repository, monkeypatch):
    name, folder = repository
    total = len(list(folder.glob("*.npy")))
    fetch = hub_shards.download

    def interrupted(name, file, *others):
        if downloads(here, name) == 2:
            raise OSError("the disk is gone")
        return fetch(name, file, *others)

    with monkeypatch.context() as patch:
        patch.setattr(hub_shards, "DOWNLOADS", 1)
        patch.setattr(hub_shards, "download", interrupted)
        with pytest.raises(ValueError, match="cannot be downloaded: the disk is gone"):
            open_shards(f"hf://{name}")
    assert downloads(here, name) == 2
    open_shards(f"hf://{name}")
    assert downloads(here, name) == total


def test_a_hub_that_is_away_for_a_while_costs_nothing_but_time(cache, here, repository, monkeypatch):
    name, folder = repository
    monkeypatch.setattr(hub_files.time, "sleep", lambda seconds: None)
    everything = {"match": name, "status": 503, "times": 3}
    cut_short = {"match": "GET /lfs/.*", "drop": 2000, "times": 2}
    with here.faults(everything, {"match": r"HEAD .*train_000001\.npy", "status": 429, "times": 2}, cut_short):
        opened = open_shards(f"hf://{name}")
    assert {path.name for path in opened.folder.glob("*.npy")} == {path.name for path in folder.glob("*.npy")}


def test_a_shard_that_is_not_what_the_manifest_says_is_refused(cache, here, repository):
    name, folder = repository
    ids = np.load(folder / "train_000001.npy")
    ids[7] += 1
    np.save(folder / "train_000001.npy", ids)
    with pytest.raises(ValueError, match=r"train_000001\.npy has other contents than when it was written") as error:
        open_shards(f"hf://{name}")
    assert "\n" not in str(error.value)


def test_a_download_in_which_a_shard_is_missing_names_it(cache, repository):
    name, folder = repository
    (folder / "train_000002.npy").unlink()
    with pytest.raises(ValueError, match=r"it lacks train_000002\.npy, which its manifest\.json names"):
        open_shards(f"hf://{name}")


@pytest.mark.parametrize(
    ("file", "place"),
    [("train_000001.npy", 0), ("train_000001.npy", -1), ("manifest.json", 40), ("tokenizer/tokenizer.json", 40)],
)
def test_a_file_that_arrives_damaged_is_downloaded_again(cache, here, repository, monkeypatch, file, place):
    name, folder = repository
    fetch = hub_shards.download
    damaged = []

    def damage_once(name, wanted, *others):
        assert not damaged or damaged[0].exists()  # another program may be reading it
        path = fetch(name, wanted, *others)
        if wanted == file and not damaged:
            damaged.append(path)
            content = bytearray(path.read_bytes())
            content[place] ^= 1
            path.resolve().write_bytes(content)
        return path

    monkeypatch.setattr(hub_shards, "download", damage_once)
    open_shards(f"hf://{name}")
    assert damaged
    assert damaged[0].read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("file", ["../../../evil.npy", "/tmp/evil.npy", "train_000001.npy/../x.npy", "a.py"])
def test_no_file_outside_of_the_folder_is_asked_for(cache, here, repository, file):
    name, folder = repository
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = file
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not the name of one more shard"):
        open_shards(f"hf://{name}")
    assert not downloads(here, name)


def test_a_huge_manifest_is_not_downloaded(cache, here, repository, monkeypatch):
    name, _ = repository
    monkeypatch.setattr(hub_shards, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(ValueError, match=r"its manifest\.json has more than 100 bytes"):
        open_shards(f"hf://{name}")
    assert not any("/resolve/" in line["path"] for line in requests(here, name))


def test_a_disk_that_is_too_small_is_found_out_before_a_shard_is_downloaded(cache, here, repository, monkeypatch):
    name, _ = repository
    monkeypatch.setattr(hub_shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(ValueError, match=r"has 1\.1 GB free: make room, or set HF_HUB_CACHE to a larger disk"):
        open_shards(f"hf://{name}")
    assert not downloads(here, name)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://user", "is not of the form hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
        ("hf://user/../x", "is not of the form"),
        ("hf://user/name@a b", "is not of the form"),
        ("hf://user/shards-empty@..", "is not of the form"),  # which became a path in the cache
        ("hf://user/shards-empty@a/../../b", "is not of the form"),
        ("hf://user/shards-empty@/etc/passwd", "is not of the form"),
        ("hf://user/shards-empty@C:\\x", "is not of the form"),
        ("hf://user/not-there", "there is none of this name, or it is private"),
        ("hf://user/shards-empty@elsewhere", "it has no revision 'elsewhere'"),
        ("hf://user/shards-empty", "it has neither manifest.json nor shards of build-nanogpt or llm.c"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_sentence(cache, here, address, message):
    here.new_repository("datasets/user/shards-empty").joinpath("notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=r"^hf://") as error:
        open_shards(address)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dead_hub_is_named_at_once(cache, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE_HUB)
    with pytest.raises(ValueError, match=r"^the Hub cannot be reached for hf://user/name \(ConnectError\): try again"):
        open_shards("hf://user/name")


def test_offline_the_last_download_is_opened(cache, repository, monkeypatch, token_shards):
    name, _ = repository
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="is not in the Hub's cache, and HF_HUB_OFFLINE is set"):
        open_shards(f"hf://{name}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    open_shards(f"hf://{name}@main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_shards(f"hf://{name}").fingerprint == token_shards.fingerprint


def test_gpt2s_loss_is_kept_beside_all_commits_of_the_shards(cache, repository, token_shards):
    name, folder = repository
    open_shards(f"hf://{name}")
    score = gpt2_score_file(f"hf://{name}")
    assert score.parent.is_dir()
    report = {"model": "gpt2", "shards_fingerprint": token_shards.fingerprint, "results": {"validation_loss": 3.31}}
    score.write_text(json.dumps(report))
    (folder / "notes.txt").write_text("a new commit")
    pinned = hub_shards.pin_address(f"hf://datasets/{name}@main")
    for address in (f"hf://{name}", pinned):
        assert gpt2_loss_of_shards(address, token_shards.fingerprint) == 3.31
    assert gpt2_loss_of_shards("hf://user/other", token_shards.fingerprint) is None
    assert open_shards(pinned).fingerprint == token_shards.fingerprint


def write_llmc(path, ids, version=1):
    header = np.zeros(LLMC_HEADER_BYTES // 4, np.int32)
    header[:3] = LLMC_MAGIC, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())


@pytest.mark.parametrize("where", ["disk", "hub"])
def test_shards_of_llmc_are_read(cache, here, tmp_path, monkeypatch, tiny_tokenizer, where, all_ids):
    monkeypatch.setattr(dataset, "load_tokenizer", lambda name: tiny_tokenizer)  # GPT-2's would be downloaded
    folder = here.new_repository("datasets/user/fineweb-llmc") if where == "hub" else tmp_path
    random = np.random.default_rng(0)
    train, validation = random.integers(0, 50257, (2, 3000)), random.integers(0, 50257, 500)
    for number, ids in enumerate(train, start=1):
        write_llmc(folder / f"fineweb_train_{number:06d}.bin", ids)
    write_llmc(folder / "fineweb_val_000000.bin", validation)
    opened = open_shards("hf://user/fineweb-llmc" if where == "hub" else tmp_path)
    np.testing.assert_array_equal(all_ids(opened), train.ravel())
    np.testing.assert_array_equal(all_ids(opened, "validation"), validation)
    np.testing.assert_array_equal(opened.shard_files("train")[1][5:25], train[1, 5:25])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "its 1,222 bytes are not 100 ids"),
        (lambda path: path.write_bytes(b"\0" * 2000), "it has no header of llm.c"),
        (lambda path: path.write_bytes(b""), "it has no header of llm.c"),
        (lambda path: write_llmc(path, np.zeros(9), version=7), "it is of version 7, and version 1 has GPT-2's ids"),
        (lambda path: write_llmc(path, np.zeros(0)), "it is empty"),
        (lambda path: write_llmc(path, np.full(9, 50257)), "has the id 50257, which GPT-2 does not have"),
        (lambda path: write_llmc(path.with_name("other_val_000000.bin"), np.zeros(9)), "shards of several datasets"),
        (lambda path: path.unlink(), "has no fineweb_val_*.bin: copy all of the shards"),
    ],
)
def test_damaged_shards_of_llmc_are_refused(tmp_path, damage, message):
    write_llmc(tmp_path / "fineweb_train_000001.bin", np.arange(100))
    write_llmc(tmp_path / "fineweb_val_000000.bin", np.arange(100))
    damage(tmp_path / "fineweb_val_000000.bin")
    with pytest.raises(ValueError, match=r"shard|has no") as error:
        open_shards(tmp_path)
    assert message in str(error.value)


def test_a_run_on_shards_of_the_hub_is_the_run_on_those_of_the_disk_and_names_the_commit(cache, here, shards, tmp_path):
    name = "user/shards-to-train-on"
    shutil.copytree(shards, here.new_repository(f"datasets/{name}"), dirs_exist_ok=True)
    short = {"train_tokens": 4 * TOKENS_PER_STEP, "hellaswag": "none", "save_steps": 2}
    assert train_here(tmp_path / "disk", shards, **short) == 0
    assert train_here(tmp_path / "hub", f"hf://{name}", **short) == 0
    mixed = {"mix": f"hf://{name}:0.5,{shards}:0.5", **short}
    assert train_here(tmp_path / "mixed", None, **mixed) == 0
    assert logged_values(tmp_path / "hub") == logged_values(tmp_path / "disk") != []
    arguments = json.loads((tmp_path / "hub/run.json").read_text())["arguments"]
    assert re.fullmatch(rf"hf://{name}@[0-9a-f]{{40}}", arguments["shards"])
    # What is in memory is gone, and the repository has a new commit with the same shards.
    (here.root / f"datasets/{name}/notes.txt").write_text("new")
    shutil.rmtree(tmp_path / "hub/model")
    shutil.rmtree(tmp_path / "hub/step-000004")
    assert train_here(tmp_path / "hub", f"hf://{name}", resume_from_checkpoint="latest", **short) == 0
    assert logged_values(tmp_path / "hub")[-2:] == logged_values(tmp_path / "disk")[-2:]
