"""Prepared shards: how they are split, what the manifest holds, and folders that cannot be used."""

import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_gpt2repro.data.prepare.assemble import assemble
from modeling_gpt2repro.data.prepare.local import prepare_shards, tokenize_partitions, watch_partitions
from modeling_gpt2repro.data.prepare.spec import PrepareSpec, make_prepare_spec
from modeling_gpt2repro.data.prepare.workspace import find_partial_output, finish_job, start_job
from modeling_gpt2repro.data.shards import writer
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources.documents import Document
from modeling_gpt2repro.data.sources.resolve import local_source
from modeling_gpt2repro.data.tokenize import HoldOutCheck, is_validation
from modeling_gpt2repro.data.tokenizer import save_tokenizer, train_tokenizer

END = "<|endoftext|>"


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


@pytest.fixture
def texts_parquet(tmp_path, tiny_texts):
    """`tiny_texts` in 20 row groups, with ids."""
    path = tmp_path / "texts.parquet"
    table = pa.table({"text": tiny_texts, "id": [f"urn:{i}" for i in range(len(tiny_texts))]})
    pq.write_table(table, path, row_group_size=10)
    return str(path)


def prepare_by_ranks(source, tokenizer, folder, validation_share, world_size, **options):
    """What prepare_data.py does with several workers, one after the other and the last one first."""
    spec = make_prepare_spec(source, tokenizer, "tiny", validation_share, **options)
    start_job(folder, spec)
    save_tokenizer(tokenizer, folder / "tokenizer")
    for rank in reversed(range(world_size)):
        tokenize_partitions(folder, rank, world_size)
    assemble(folder, spec)
    finish_job(folder)
    return open_shards(folder)


def test_documents_are_split_by_hash_whatever_the_number_of_workers(tmp_path, texts_parquet, tiny_tokenizer, all_ids):
    source = local_source([texts_parquet])
    shards = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "1", 0.2, shard_tokens=3_000)
    by_four = prepare_by_ranks(source, tiny_tokenizer, tmp_path / "4", 0.2, world_size=4, shard_tokens=3_000)
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "4")
    assert shards.fingerprint == by_four.fingerprint

    found = {}
    for split in ("train", "validation"):
        found[split] = tiny_tokenizer.decode(all_ids(shards, split)).split(END)[1:]
        totals = shards.manifest["splits"][split]
        assert totals["documents"] == len(found[split])
        assert totals["tokens"] == len(all_ids(shards, split))
        assert totals["text_bytes"] == sum(len(text.encode()) for text in found[split])
        assert shards.bytes_per_token(split) == totals["text_bytes"] / totals["tokens"]
    documents = [document for partition in source.partitions for document in source.read(partition)]
    for split, wanted in (("train", False), ("validation", True)):
        assert found[split] == [document.text for document in documents if is_validation(document.id, 0.2) is wanted]
    assert 20 < len(found["validation"]) < 60


def test_validation_holds_about_its_share_and_a_larger_share_includes_a_smaller_one():
    small, large = ({i for i in range(5_000) if is_validation(f"id {i}", share)} for share in (0.05, 0.2))
    assert 150 < len(small) < 350
    assert 850 < len(large) < 1150
    assert small < large


def test_the_held_out_documents_never_change():
    # As first released: another machine or a newer version must hold out the same documents.
    assert [i for i in range(100) if is_validation(f"id {i}", 0.05)] == [27, 29, 56, 72, 87]


def test_pieces_of_one_text_fall_to_both_splits(tmp_path, tiny_texts, tiny_tokenizer, all_ids):
    (tmp_path / "a.txt").write_text("\n".join(tiny_texts))
    source = local_source([str(tmp_path / "a.txt")])
    shards = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "out", 0.3)
    pieces = [piece for partition in source.partitions for piece in source.read(partition)]
    chosen = [is_validation(piece.id, 0.3) for piece in pieces]
    for split, wanted in (("train", False), ("validation", True)):
        text = "".join(
            (END if i == 0 or chosen[i - 1] is not wanted else "") + piece.text
            for i, piece in enumerate(pieces)
            if chosen[i] is wanted
        )
        assert tiny_tokenizer.decode(all_ids(shards, split)) == text


def test_max_tokens_is_exact_and_cuts_the_same_sequence(tmp_path, texts_parquet, tiny_tokenizer, all_ids):
    source = local_source([texts_parquet])
    whole = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "whole", 0.1)
    for workers, limit in ((1, 4_321), (3, 5_000)):
        options = {"world_size": workers, "max_tokens": limit, "shard_tokens": 1_000}
        cut = prepare_by_ranks(source, tiny_tokenizer, tmp_path / f"cut{workers}", 0.1, **options)
        assert np.array_equal(all_ids(cut), all_ids(whole)[:limit])
        totals = cut.manifest["splits"]["train"]
        assert totals["tokens"] == limit
        assert totals["documents"] == np.count_nonzero(all_ids(cut) == tiny_tokenizer.eos_token_id)
        kept = tiny_tokenizer.decode(all_ids(cut)).replace(END, "")
        assert abs(totals["text_bytes"] - len(kept.encode())) < 100


def test_shards_have_the_requested_length_and_their_own_hash(token_shards):
    for split in ("train", "validation"):
        entries = token_shards.manifest["splits"][split]["shards"]
        assert [entry["tokens"] for entry in entries[:-1]] == [5_000] * (len(entries) - 1)
        for entry, ids in zip(entries, token_shards.shards(split), strict=True):
            assert hashlib.sha256(ids.tobytes()).hexdigest() == entry["sha256"]
            assert np.array_equal(np.load(token_shards.folder / entry["file"]), ids)
    assert len(token_shards.manifest["splits"]["train"]["shards"]) > 2
    assert sorted(path.name for path in token_shards.folder.iterdir() if path.suffix != ".npy") == [
        "manifest.json",
        "tokenizer",
    ]


def test_progress_is_reported_for_tokenizing_and_for_each_assembled_partition(tmp_path, texts_parquet, tiny_tokenizer):
    spec = make_prepare_spec(local_source([texts_parquet]), tiny_tokenizer, "tiny", 0.1)
    start_job(tmp_path / "out", spec)
    save_tokenizer(tiny_tokenizer, tmp_path / "out/tokenizer")
    tokenizing = []
    with watch_partitions(tmp_path / "out", spec, lambda *numbers: tokenizing.append(numbers)):
        tokenize_partitions(tmp_path / "out")
    assembling = []
    assemble(tmp_path / "out", spec, lambda *numbers: assembling.append(numbers))
    tokens = open_shards(tmp_path / "out").manifest["splits"]["train"]["tokens"]
    assert tokenizing == sorted(tokenizing)
    assert tokenizing[-1] == (20, 20, tokens)
    assert [(done, total) for done, total, _ in assembling] == [(i, 20) for i in range(1, 21)]
    assert assembling[-1][2] == tokens


def test_a_preparation_killed_in_the_middle_can_be_started_again(
    tmp_path, texts_parquet, tiny_tokenizer, monkeypatch, one_sentence
):
    source = local_source([texts_parquet])
    out = tmp_path / "out"

    def interrupt_at_the_third_shard(path, open_temporary=writer.open_temporary):
        if path.name == "train_000002.npy":
            raise KeyboardInterrupt
        return open_temporary(path)

    monkeypatch.setattr(writer, "open_temporary", interrupt_at_the_third_shard)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(source, tiny_tokenizer, "tiny", out, 0.1, shard_tokens=1_000)
    monkeypatch.undo()
    assert len(list(out.glob("train_*.npy"))) == 2
    (out / "train_000099.npy.0a1b2c3d.partial").touch()  # of a process killed while it wrote
    with pytest.raises(ValueError, match=r"has no manifest\.json: its preparation was not finished") as error:
        open_shards(out)
    one_sentence(error)
    again = prepare_shards(source, tiny_tokenizer, "tiny", out, 0.1, shard_tokens=1_000)
    fresh = prepare_shards(source, tiny_tokenizer, "tiny", tmp_path / "fresh", 0.1, shard_tokens=1_000)
    assert shard_bytes(out) == shard_bytes(tmp_path / "fresh")
    assert again.fingerprint == fresh.fingerprint
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "fresh").iterdir())


SPEC = PrepareSpec({}, [], {"name": "tiny"}, end_of_text_id=0, validation_share=0.1)


@pytest.mark.parametrize("name", ["notes.txt", "train_000000.npy", "training_set.npy", "tokenizer", "film.partial"])
def test_a_folder_with_other_files_is_left_alone(tmp_path, name, one_sentence):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds other files \({name}\): give an empty --output_dir\.") as error:
        start_job(tmp_path, SPEC)
    one_sentence(error)
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_beside_an_unfinished_preparation_are_left_alone(tmp_path):
    start_job(tmp_path / "out", SPEC)
    (tmp_path / "out/train_000000.npy").touch()
    (tmp_path / "out/train_set.npy").touch()
    with pytest.raises(ValueError, match=r"holds other files \(train_set\.npy\)"):
        start_job(tmp_path / "out", SPEC)
    assert (tmp_path / "out/train_000000.npy").exists()


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, token_shards, one_sentence):
    with pytest.raises(ValueError, match=r"holds prepared shards already: use them, or give another") as error:
        start_job(token_shards.folder, SPEC)
    one_sentence(error)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/inside"):
        with pytest.raises(ValueError, match=r"file is a file: give a folder as --output_dir\.") as error:
            find_partial_output(folder)
        one_sentence(error)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=r"cannot be written to: give another --output_dir\.") as error:
        find_partial_output(tmp_path / "new")
    one_sentence(error)


def test_ids_that_hold_out_nothing_are_noticed_unless_they_name_pieces_of_documents():
    def watch(ids, share):
        return list(HoldOutCheck(share).watch(Document(name, "the sea") for name in ids))

    in_training = [f"id {i}" for i in range(200) if not is_validation(f"id {i}", 0.05)]
    pieces = [name for name in in_training for _ in range(900)]
    assert len(watch(pieces, 0.05)) == len(pieces)
    for ids, share, split in ((in_training[:1], 0.05, "training"), (["id 27"], 0.05, "validation")):
        with pytest.raises(ValueError, match=f"^1,000 documents have one id .* fell to {split}: rename"):
            watch(ids * 1000, share)
        assert len(watch(ids * 999, share)) == 999
    assert len(watch(["id 27"] * 2000, 0.0)) == 2000  # nothing is to be held out
    assert len(watch([*in_training[:1], "id 27"] * 2000, 0.05)) == 4000  # one in each split

    check = HoldOutCheck(1e-9)  # of which no id falls to validation
    assert len(list(check.watch(Document(f"id {i}", "the sea") for i in range(20_000)))) == 20_000
    assert len(check._ids) == 10_000  # of billions of documents, the ids would fill the memory


def test_too_little_text_to_split_is_refused(tmp_path, tiny_tokenizer, one_sentence):
    (tmp_path / "blank.txt").write_text(" \n\t\n" * 100)
    with pytest.raises(ValueError, match=r"there is no text in the source") as error:
        prepare_shards(local_source([str(tmp_path / "blank.txt")]), tiny_tokenizer, "tiny", tmp_path / "blank", 0.1)
    one_sentence(error)
    (tmp_path / "a.txt").write_text("the sea")
    for share, split in ((0.001, "validation"), (0.999, "train")):
        with pytest.raises(ValueError, match=rf"none of the text fell to the {split} split") as error:
            prepare_shards(local_source([str(tmp_path / "a.txt")]), tiny_tokenizer, "tiny", tmp_path / split, share)
        one_sentence(error)


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def other_tokenizer(folder):
    train_tokenizer(["entirely other words " * 20, "and more of them, too"], 270).save_pretrained(folder / "tokenizer")


DAMAGE = {
    "folder": (shutil.rmtree, r"there is no folder .*: prepare it with prepare_data\.py --output_dir"),
    "manifest": (lambda folder: (folder / "manifest.json").unlink(), r"has no manifest\.json: its preparation"),
    "cut manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 1,'),
        r"manifest\.json is damaged",
    ),
    "list": (lambda folder: (folder / "manifest.json").write_text("[1]"), r"manifest\.json is damaged"),
    "format": (lambda folder: edit_manifest(folder, lambda m: m.update(format=2)), r"it is of format 2, and this"),
    "no splits": (lambda folder: edit_manifest(folder, lambda m: m.pop("splits")), r"is damaged \(splits is None\)"),
    "no hash": (
        lambda folder: edit_manifest(folder, lambda m: m["tokenizer"].update(sha256="")),
        r"no SHA-256 of the tok",
    ),
    "entries": (
        lambda folder: edit_manifest(folder, lambda m: m["splits"]["train"]["shards"].pop()),
        r"the shards of train do not add up",
    ),
    "shard": (lambda folder: (folder / "train_000001.npy").unlink(), r"shard .*train_000001\.npy is missing"),
    "cut shard": (lambda folder: os.truncate(folder / "train_000001.npy", 500), r"is truncated or damaged"),
    "empty shard": (lambda folder: os.truncate(folder / "train_000001.npy", 0), r"is truncated or damaged"),
    "other shard": (
        lambda folder: np.save(folder / "train_000001.npy", np.zeros(5_000, np.int64)),
        r"holds 5000 ids of int64, not 5000 of uint16\.",
    ),
    "shorter shard": (
        lambda folder: np.save(folder / "train_000001.npy", np.zeros(4_999, np.uint16)),
        r"holds 4999 ids of uint16, not 5000 of uint16\.",
    ),
    "tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer does not load"),
    "cut tokenizer": (
        lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{}"),
        r"tokenizer does not load",
    ),
    "other tokenizer": (other_tokenizer, r"is not the tokenizer that these shards were made with"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_one_sentence(tmp_path, token_shards, kind, one_sentence):
    folder = tmp_path / "shards"
    shutil.copytree(token_shards.folder, folder)
    assert open_shards(folder).fingerprint == token_shards.fingerprint
    damage, pattern = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ValueError, match=pattern) as error:
        open_shards(folder)
    one_sentence(error)
