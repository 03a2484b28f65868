"""Rows of datasets that are not stored as parquet, here of folders on disk."""

import gzip
import json
import os

import pytest

from modeling_gpt2repro.data.sources.hub_rows import list_row_partitions, read_row_partition


def write_lines(path, number):
    rows = [json.dumps({"text": f"{number} {row} {os.urandom(20).hex()}"}) for row in range(500)]
    path.write_bytes(gzip.compress("\n".join(rows).encode()))


@pytest.fixture
def partitions(tmp_path):
    for number in range(3):
        write_lines(tmp_path / f"part-{number}.jsonl.gz", number)
    return list_row_partitions(str(tmp_path), None, "train", "main", "text")


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 99]) + data[middle + 99 :]


def other_columns(data: bytes) -> bytes:
    return gzip.compress(b'{"words": "a"}')


@pytest.mark.parametrize("damage", [truncate, flip, other_columns, lambda data: b"no archive"])
def test_a_damaged_file_is_named_in_one_sentence(partitions, tmp_path, damage, one_sentence):
    path = tmp_path / "part-1.jsonl.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"part-1\.jsonl\.gz is damaged \((?!.*is damaged).+\)\.$") as error:
        list(read_row_partition(partitions[1]))
    one_sentence(error)
    assert len(list(read_row_partition(partitions[2]))) == 500


def test_a_dataset_whose_first_file_is_damaged_is_refused(tmp_path, one_sentence):
    write_lines(tmp_path / "part-0.jsonl.gz", 0)
    path = tmp_path / "part-0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part-0\.jsonl\.gz is damaged \([^()]+\)\.$") as error:
        list_row_partitions(str(tmp_path), None, "train", "main", "text")
    one_sentence(error)


def test_a_location_has_the_names_that_the_user_gave(partitions, tmp_path):
    assert partitions[2].location == f"shard 2 of {tmp_path}, split train,"
