"""Unfinished preparations whose files are damaged: plan.json and the cache of tokenized partitions."""

import io
import json
import random
import shutil
import zipfile

import numpy as np
import pytest
from damage import NOT_OBJECTS, edit_json, put_in_place, random_bytes, random_json
from preparing import contents, error_of, interrupt_before_the_shards, prepare

from modeling_gpt2repro.data.prepare.spec import read_spec
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions, read_partition_file

MUTATIONS = 300


@pytest.fixture(scope="module")
def unfinished(texts, tmp_path_factory):
    """An unfinished preparation of 5 partitions; tests copy it."""
    folder = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_before_the_shards(folder, texts[0], patch)
    return folder


@pytest.fixture
def folder(unfinished, tmp_path):
    return shutil.copytree(unfinished, tmp_path / "out")


def first_partition(folder):
    return finished_partitions(folder)[0][1]


@pytest.mark.parametrize("kind", NOT_OBJECTS)
def test_a_plan_that_is_no_object_of_ours(folder, texts, kind, capsys):
    (folder / "plan.json").write_bytes(NOT_OBJECTS[kind])
    line = error_of(capsys, folder, texts[0])
    assert f"{folder / 'plan.json'} is not of this version (" in line
    assert line.endswith(f": delete {folder} to start again.")


PLANS = {
    "units": (lambda plan: plan.update(units=3), "units is 3"),
    "a unit": (lambda plan: plan.update(units=[3]), "units is [3]"),
    "path": (lambda plan: plan["units"][0].update(path=3), "path of a unit is 3"),
    "start": (lambda plan: plan["units"][0].update(start=-1), "start of a unit is -1"),
    "text as stop": (lambda plan: plan["units"][0].update(stop="1"), "stop of a unit is '1'"),
    "source": (lambda plan: plan.update(source=[]), "source is []"),
    "files": (lambda plan: plan.update(files=[[]]), "files is [[]]"),
    "no files": (lambda plan: plan.update(files=3), "files is 3"),
    "numbers twice": (
        lambda plan: plan.update(cache_numbers=[0, 0, 1, 2, 3]),
        "cache_numbers is not one for each unit",
    ),
    "too few numbers": (lambda plan: plan.update(cache_numbers=[0]), "cache_numbers is not one for each unit"),
    "shard tokens": (lambda plan: plan.update(shard_tokens=0), "shard_tokens is 0"),
    "layout": (lambda plan: plan.update(layout="x"), "layout is 'x'"),
    "end of text": (lambda plan: plan.update(end_of_text_id=None), "end_of_text_id is None"),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_that_no_preparation_writes(folder, kind, one_sentence):
    change, sentence = PLANS[kind]
    edit_json(folder / "plan.json", change)
    with pytest.raises(ValueError, match="is not of this version") as error:
        read_spec(folder)
    assert f"({sentence}): delete" in one_sentence(error)


def npz(about, **arrays):
    """The bytes of a partition's file."""
    file = io.BytesIO()
    np.savez(file, about=np.array(about if isinstance(about, str) else json.dumps(about)), **arrays)
    return file.getvalue()


def objects():
    """An array that only pickle can read, in place of ids."""
    file = io.BytesIO()
    np.savez(file, about=np.array([{}], dtype=object))
    return file.getvalue()


def other_member():
    """A zip file whose array has a header that is no expression."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("about.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"[" * 16)
    return file.getvalue()


IDS = np.arange(3, dtype=np.uint16)
BYTES = {"train": 3, "validation": 3}
PARTITIONS = {
    "nothing": b"",
    "no zip file": b"x" * 100,
    "objects": objects(),
    "no array": other_member(),
    "no ids": npz({"text_bytes": BYTES}),
    "one split": npz({"text_bytes": {"train": 3}}, train=IDS),
    "a list": npz([], train=IDS, validation=IDS),
    "brackets": npz("[" * 100_000, train=IDS, validation=IDS),
    "no counts": npz({}, train=IDS, validation=IDS),
    "other ids": npz({"text_bytes": BYTES}, train=IDS.astype(np.int64), validation=IDS),
    "two dimensions": npz({"text_bytes": BYTES}, train=IDS[None], validation=IDS),
    "fewer ids than its name says": npz({"text_bytes": BYTES}, train=IDS, validation=IDS),
    "negative bytes": npz({"text_bytes": {"train": -3, "validation": 3}}, train=IDS, validation=IDS),
    "text as count": npz({"text_bytes": BYTES, "skipped": {"empty": "x"}}, train=IDS, validation=IDS),
    "unknown name": npz({"text_bytes": BYTES, "folder": "x"}, train=IDS, validation=IDS),
}


@pytest.mark.parametrize("kind", PARTITIONS)
def test_a_file_that_is_no_tokenized_partition(folder, kind, one_sentence):
    path = first_partition(folder)
    path.write_bytes(PARTITIONS[kind])
    with pytest.raises(ValueError, match=r"is damaged \(.*\): delete it and run the same command again\.") as error:
        read_partition_file(path)
    assert str(path) in one_sentence(error)


@pytest.mark.parametrize("name", ["plan.json", "a partition"])
def test_a_pipe_in_place_of_a_file_is_one_sentence(folder, texts, name, capsys):
    path = first_partition(folder) if name == "a partition" else folder / name
    put_in_place(path, "a pipe")
    assert "it is not a file" in error_of(capsys, folder, texts[0])


def test_a_flipped_bit_in_the_ids_is_found(folder):
    path = first_partition(folder)
    data = bytearray(path.read_bytes())
    data[data.index(read_partition_file(path).ids["train"].tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        read_partition_file(path)


def test_files_of_other_names_in_the_cache_are_not_read(folder, texts):
    for name in ("copy.npz", "0000001-12 (copy).npz", "x-y.npz", "1-2-3.npz", "²-3.npz"):
        (folder / "units" / name).write_bytes(b"mine")
    prepare(folder, texts[0])
    assert contents(folder) == texts[1]


def test_random_damage_is_read_or_one_sentence(folder):
    draw = random.Random(20261129)
    paths = [folder / "plan.json", *(path for _, path in finished_partitions(folder).values())]
    files = {path: path.read_bytes() for path in paths}
    spec = read_spec(folder)
    refused = 0
    for _ in range(MUTATIONS):
        path = draw.choice([paths[0], draw.choice(paths)])
        if path == paths[0] and draw.random() < 0.8:
            path.write_text(json.dumps(random_json(draw, json.loads(files[path]))))
        else:
            path.write_bytes(random_bytes(draw, files[path]))
        try:
            if path != paths[0]:
                read_partition_file(path)
            elif not spec.differences(found := read_spec(folder)):
                spec.resume_from(found, unused_number=99)
        except ValueError as error:
            message = str(error)
            assert message.startswith(str(path)), message
            assert message.isprintable(), message
            refused += 1
        path.write_bytes(files[path])
    assert refused > MUTATIONS / 3
