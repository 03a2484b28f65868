"""Manifests and shards that are damaged, or made by a stranger: each is refused in one sentence, without pickle."""

import json
import random
import shutil

import numpy as np
import pytest
from damage import NO_FILES, NOT_OBJECTS, edit_json, put_in_place, random_bytes, random_json

from modeling_gpt2repro.data.shards.dataset import SPLITS, open_shards
from modeling_gpt2repro.data.shards.verify import verify_shards

MUTATIONS = 300


@pytest.fixture
def folder(tmp_path, token_shards):
    """A copy of prepared shards, to be damaged."""
    return shutil.copytree(token_shards.folder, tmp_path / "shards")


def refusal(folder, one_sentence) -> str:
    with pytest.raises(ValueError, match=r"prepare the data again|run prepare_data.py again|of uint16\.$") as error:
        open_shards(folder)
    return one_sentence(error)


@pytest.mark.parametrize("kind", NOT_OBJECTS)
def test_a_manifest_that_is_no_object_of_ours(folder, kind, one_sentence):
    (folder / "manifest.json").write_bytes(NOT_OBJECTS[kind])
    assert f"{folder / 'manifest.json'} is damaged (" in refusal(folder, one_sentence)


def shard(**values):
    return lambda manifest: manifest["splits"]["train"]["shards"][0].update(values)


MANIFESTS = {
    "above": (shard(file="../train_000000.npy"), "'../train_000000.npy' is not the name of one more shard"),
    "absolute": (shard(file="/etc/passwd"), "'/etc/passwd' is not the name of one more shard"),
    "no name": (shard(file=None), "None is not the name of one more shard"),
    "twice": (shard(file="train_000001.npy"), "'train_000001.npy' is not the name of one more shard"),
    "of the other split": (shard(file="validation_000000.npy"), "'validation_000000.npy' is not the name of one more"),
    "text as tokens": (shard(tokens="5000"), "tokens of train_000000.npy is '5000'"),
    "negative tokens": (shard(tokens=-5000), "tokens of train_000000.npy is -5000"),
    "fractional tokens": (shard(tokens=5000.5), "tokens of train_000000.npy is 5000.5"),
    "negative documents": (shard(documents=-1), "documents of train_000000.npy is -1"),
    "no hash": (shard(sha256="x"), "it has no SHA-256 of train_000000.npy"),
    "a shard that is a number": (lambda m: m["splits"]["train"].update(shards=[3]), "a shard of train is 3"),
    "no shards": (lambda m: m["splits"]["train"].update(shards={}), "it has no shards of train"),
    "vocabulary": (lambda m: m["tokenizer"].update(vocab_size="300"), "vocab_size is '300'"),
    "end of text": (lambda m: m.update(end_of_text_id=300), "end_of_text_id is 300"),
    "text bytes": (lambda m: m["splits"]["train"].update(text_bytes=-1), "text_bytes of train is -1"),
    "documents": (lambda m: m["splits"]["train"].pop("documents"), "it has no documents of train"),
    "source": (lambda m: m.update(source=[]), "source is []"),
    "a long name": (shard(file=f"train_{'0' * 5000}.npy"), "'train_000000"),
    "digits of another alphabet": (shard(file="train_\u0660\u0661\u0662\u0663\u0664\u0665.npy"), "'train_\\u0660"),
    "no tokenizer's name": (lambda m: m["tokenizer"].pop("name"), "the tokenizer's name is None"),
    "document length": (lambda m: m["source"].update(document_length="x"), "document_length is 'x'"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_no_preparation_writes(folder, kind, one_sentence):
    change, sentence = MANIFESTS[kind]
    edit_json(folder / "manifest.json", change)
    assert f"is damaged ({sentence}" in refusal(folder, one_sentence)


OTHER_IDS = {
    "vocabulary": lambda manifest: manifest["tokenizer"].update(vocab_size=65536),
    "end of text": lambda manifest: manifest.update(end_of_text_id=5),
}


@pytest.mark.parametrize("kind", OTHER_IDS)
def test_a_manifest_with_other_ids_than_its_tokenizer(folder, kind, one_sentence):
    """Training would find out in the middle, by an id that the model does not have."""
    edit_json(folder / "manifest.json", OTHER_IDS[kind])
    assert "is not the tokenizer that these shards were made with" in refusal(folder, one_sentence)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", [kind for kind in NOT_OBJECTS if kind != "empty object"])
def test_a_tokenizer_whose_json_is_damaged(folder, name, kind, one_sentence):
    (folder / "tokenizer" / name).write_bytes(NOT_OBJECTS[kind])
    with pytest.raises(ValueError, match=r"tokenizer (does not load|is not the tokenizer that)") as error:
        open_shards(folder)
    assert str(folder / "tokenizer") in one_sentence(error)


def header(text: str) -> bytes:
    """The beginning of an .npy file with this text in place of its description."""
    data = text.encode()
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data


NPY = {
    "nothing": b"",
    "no header": b"\x93NUMPY\x01\x00",
    "a pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01x\x94.",
    "a zip file": b"PK\x03\x04" + bytes(200),
    "objects": header("{'descr': '|O', 'fortran_order': False, 'shape': (5000,)}") + bytes(10_000),
    "huge": header("{'descr': '<u2', 'fortran_order': False, 'shape': (9223372036854775807,)}") + bytes(100),
    "huger": header("{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999999,)}") + bytes(100),
    "beyond 64 bits": header(
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000, 1000000000, 18446744073), }"
    ),
    "negative": header("{'descr': '<u2', 'fortran_order': False, 'shape': (-5000,)}") + bytes(10_000),
    "fraction": header("{'descr': '<u2', 'fortran_order': False, 'shape': (5000.0,)}") + bytes(10_000),
    "two dimensions": header("{'descr': '<u2', 'fortran_order': False, 'shape': (50, 100)}") + bytes(10_000),
    "other byte order": header("{'descr': '>u2', 'fortran_order': False, 'shape': (5000,)}") + bytes(10_000),
    "fields": header("{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (5000,)}") + bytes(10_000),
    "no such type": header("{'descr': 'u99', 'fortran_order': False, 'shape': (5000,)}") + bytes(10_000),
    "brackets": header("[" * 9000),
    "minuses": header("-" * 9000 + "1"),
    "a list as key": header("{[]: 1}"),
    "a call": header("__import__('os').system('true')"),
}


@pytest.mark.parametrize("kind", NPY)
def test_a_shard_that_is_no_array_of_ids(folder, kind, one_sentence):
    (folder / "train_000000.npy").write_bytes(NPY[kind])
    assert "train_000000.npy " in refusal(folder, one_sentence)


@pytest.mark.parametrize("kind", NPY)
def test_a_shard_of_the_lecture_that_is_no_array_of_ids(tmp_path, kind, one_sentence):
    np.save(tmp_path / "edufineweb_val_000000.npy", np.zeros(10, np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.zeros(10, np.uint16))
    (tmp_path / "edufineweb_train_000002.npy").write_bytes(NPY[kind])
    with pytest.raises(ValueError, match=r"edufineweb_train_000002\.npy (is truncated|holds an array)") as error:
        open_shards(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize("name", ["manifest.json", "train_000000.npy"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_something_else_in_place_of_a_file(folder, name, kind, one_sentence):
    put_in_place(folder / name, kind)
    assert name in refusal(folder, one_sentence)


def test_bytes_after_the_last_id_are_found(folder, one_sentence):
    """Half an id ended the verification with numpy's message, and a hash of the ids does not cover the rest."""
    path = folder / "train_000000.npy"
    path.write_bytes(path.read_bytes() + b"x")
    assert "train_000000.npy is truncated or damaged (it has 1 bytes after" in refusal(folder, one_sentence)
    [problem] = verify_shards(folder)
    assert "it has 1 bytes after its last id" in problem


def test_a_shard_with_a_longer_header_is_verified_from_its_first_id(folder):
    path = folder / "train_000000.npy"
    ids = np.load(path)
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({len(ids)},), }}".ljust(300) + "\n"
    path.write_bytes(b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text.encode() + ids.tobytes())
    assert np.array_equal(np.load(path), ids)
    assert verify_shards(folder) == []


def test_random_damage_opens_or_is_one_sentence(folder, one_sentence):
    draw = random.Random(20261129)
    names = ["manifest.json"] * 5 + [path.name for path in folder.glob("*.npy")]
    files = {name: (folder / name).read_bytes() for name in names}
    refused = 0
    for _ in range(MUTATIONS):
        name = draw.choice(names)
        if name == "manifest.json" and draw.random() < 0.8:
            (folder / name).write_text(json.dumps(random_json(draw, json.loads(files[name]))))
        else:
            (folder / name).write_bytes(random_bytes(draw, files[name], header_bytes=130))
        try:
            dataset = open_shards(folder)
            for split in SPLITS:
                dataset.shards(split)
                dataset.bytes_per_token(split)
            assert dataset.fingerprint
            problems = verify_shards(folder)
        except ValueError as error:
            problems = [str(error)]
            refused += 1
        assert all(problem.isprintable() and problem.endswith(".") for problem in problems), problems
        (folder / name).write_bytes(files[name])
    assert refused > MUTATIONS / 3
