"""`prepare_data.py --verify`, the manifest it checks against, and the lecture's layout."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_shards import other_tokenizer

import prepare_data
from modeling_gpt2repro.data.prepare.local import prepare_shards
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources.resolve import local_source


@pytest.fixture
def folder(tmp_path, token_shards):
    """A copy of prepared shards, to be damaged."""
    return shutil.copytree(token_shards.folder, tmp_path / "shards")


def verify(folder, capsys, *more):
    """Exit code and the lines printed."""
    try:
        prepare_data.main(["--verify", str(folder), *more])
    except SystemExit as end:
        lines = capsys.readouterr().err.splitlines()
        assert all(line.endswith(".") for line in lines)
        return end.code, lines
    return 0, capsys.readouterr().out.splitlines()


def flip_a_byte(folder, name="train_000001.npy", position=5000):
    data = bytearray((folder / name).read_bytes())
    data[position] ^= 1
    (folder / name).write_bytes(data)


def test_an_undamaged_folder_is_what_its_manifest_says(token_shards, capsys):
    assert verify(token_shards.folder, capsys) == (0, [f"{token_shards.folder} is what its manifest.json says."])
    assert verify(token_shards.folder, capsys, "--quick")[0] == 0


def test_a_flipped_byte_is_found_unless_quick(folder, capsys):
    flip_a_byte(folder)
    assert verify(folder, capsys, "--quick")[0] == 0
    code, lines = verify(folder, capsys)
    assert (code, len(lines)) == (1, 1)
    assert "train_000001.npy has other contents than when it was written (sha256 differs)" in lines[0]


def test_all_damage_that_shows_without_reading_is_found_also_with_quick(folder, capsys):
    os.truncate(folder / "train_000000.npy", 5000)
    (folder / "train_000001.npy").unlink()
    flip_a_byte(folder, "train_000002.npy", 20)  # the header
    other_tokenizer(folder)
    np.save(folder / "validation_000017.npy", np.zeros(3, np.uint16))
    for more in ([], ["--quick"]):
        code, lines = verify(folder, capsys, *more)
        assert code == 1
        for line, part in zip(
            lines,
            (
                "train_000000.npy is truncated or damaged",
                "train_000001.npy is missing",
                "train_000002.npy is truncated or damaged",
                "is not the tokenizer that these shards were made with",
                "validation_000017.npy is not in the manifest",
            ),
            strict=True,
        ):
            assert part in line


def test_a_manifest_that_contradicts_itself_is_found(folder, capsys):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["documents"] += 1
    path.write_text(json.dumps(manifest))
    code, lines = verify(folder, capsys, "--quick")
    assert code == 1
    assert "the shards of train hold" in lines[0]
    path.unlink()
    assert verify(folder, capsys)[0] == 2
    assert verify(folder / "none", capsys) == (
        2,
        [f"{Path(sys.argv[0]).name}: there is no folder {folder / 'none'} to verify."],
    )


def test_the_manifest_counts_partitions_documents_and_skipped_documents(tmp_path, tiny_tokenizer, tiny_texts):
    lines = [json.dumps({"text": text}) for text in [*tiny_texts[:50], "", " \t", None, "\n", *tiny_texts[50:]]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(tiny_texts))
    source = local_source([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")])
    manifest = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "out", 0.1, shard_tokens=5000).manifest
    assert manifest["skipped"] == {"empty": 2, "whitespace": 2}
    assert manifest["units"] == {"count": 2, "files": [{"file": "a.jsonl", "units": 1}, {"file": "b.txt", "units": 1}]}
    train = manifest["splits"]["train"]
    assert sum(entry["documents"] for entry in train["shards"]) == train["documents"]
    assert train["shards"][0]["units"] == [0, 0]
    assert train["shards"][-1]["units"] == [1, 1]


def test_a_shard_has_the_bytes_that_numpy_would_save(token_shards, tmp_path):
    for entry in token_shards.manifest["splits"]["train"]["shards"]:
        path = token_shards.folder / entry["file"]
        np.save(tmp_path / "again.npy", np.load(path))
        assert (tmp_path / "again.npy").read_bytes() == path.read_bytes()


def test_karpathy_layout_has_the_same_ids_under_other_names(tmp_path, token_shards, tiny_tokenizer, all_ids, capsys):
    source = local_source([str(token_shards.folder.parent / "texts.jsonl")])
    options = {"shard_tokens": 1_000, "layout": "karpathy"}  # validation has more tokens than that
    shards = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "out", 0.1, **options)
    names = [entry["file"] for split in ("validation", "train") for entry in shards.manifest["splits"][split]["shards"]]
    assert names[:3] == [f"edufineweb_{name}.npy" for name in ("val_000000", "train_000001", "train_000002")]
    assert (
        names
        == sorted(names, key=lambda name: name[-10:])
        == sorted((path.name for path in (tmp_path / "out").glob("*.npy")), key=lambda name: name[-10:])
    )
    assert shards.manifest["layout"] == "karpathy"
    for split in ("train", "validation"):
        assert np.array_equal(all_ids(shards, split), all_ids(token_shards, split))
    first = np.load(tmp_path / "out/edufineweb_val_000000.npy")
    assert (first.dtype, first[0], len(first) > 1_000) == (np.uint16, tiny_tokenizer.eos_token_id, True)
    assert verify(tmp_path / "out", capsys)[0] == 0


def test_shards_of_the_lectures_own_script_are_read_as_gpt2_ids(tmp_path, monkeypatch, tiny_tokenizer, one_sentence):
    monkeypatch.setattr("modeling_gpt2repro.data.shards.dataset.load_tokenizer", {"gpt2": tiny_tokenizer}.get)
    random = np.random.default_rng(0)
    for name in ("val_000000", "train_000001", "train_000002"):
        np.save(tmp_path / f"edufineweb_{name}.npy", random.integers(0, 50257, 2_000).astype(np.uint16))
    shards = open_shards(tmp_path)
    assert [len(ids) for ids in shards.shards("train")] == [2_000, 2_000]
    assert shards.bytes_per_token("train") is None
    assert shards.tokenizer is tiny_tokenizer
    fingerprint = shards.fingerprint
    np.save(tmp_path / "edufineweb_train_000002.npy", random.integers(0, 50257, 2_000).astype(np.uint16))
    assert open_shards(tmp_path).fingerprint != fingerprint
    np.save(tmp_path / "edufineweb_train_000002.npy", np.full(9, 50257, np.uint16))
    with pytest.raises(ValueError, match="has the id 50257, which GPT-2 does not have") as error:
        open_shards(tmp_path)
    one_sentence(error)
    (tmp_path / "edufineweb_train_000002.npy").unlink()
    (tmp_path / "edufineweb_val_000000.npy").unlink()
    with pytest.raises(ValueError, match=r"has no edufineweb_val_\*\.npy") as error:
        open_shards(tmp_path)
    one_sentence(error)
    (tmp_path / "plan.json").touch()  # ours, unfinished
    with pytest.raises(ValueError, match="its preparation was not finished"):
        open_shards(tmp_path)


def test_a_shards_hash_is_of_its_ids(token_shards):
    entry = token_shards.manifest["splits"]["train"]["shards"][0]
    assert hashlib.sha256(np.load(token_shards.folder / entry["file"]).tobytes()).hexdigest() == entry["sha256"]
