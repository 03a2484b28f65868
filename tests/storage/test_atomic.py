"""Atomic writes on disks that fail in their own ways."""

import errno
import os
import stat

import pytest
from toy_runs import train_here

import prepare_data
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.storage.atomic import atomic_write, remove_abandoned


@pytest.fixture
def disk_that_flushes_files_only(monkeypatch):
    """fsync of a folder answers EINVAL, as some network disks do."""
    fsync = os.fsync

    def of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)


def test_data_are_prepared_on_a_disk_that_flushes_files_only(disk_that_flushes_files_only, tmp_path):
    (tmp_path / "text.txt").write_text("The ship sails over the cold sea.\n" * 2000)
    source = ["--train_files", str(tmp_path / "text.txt"), "--tokenizer", "train", "--vocab_size", "270"]
    prepare_data.main([*source, "--output_dir", str(tmp_path / "out"), "--workers", "1"])
    assert open_shards(tmp_path / "out").manifest["splits"]["train"]["tokens"] > 1000


def test_the_quickstarts_data_and_run_work_on_a_disk_that_flushes_files_only(disk_that_flushes_files_only, tmp_path):
    source = {"dataset_name": "python-prose", "tokenizer_vocab_size": 300, "validation_share": 0.05}
    steps = {"train_tokens": 512, "eval_steps": 0, "save_steps": 0, "num_samples": 0}
    assert train_here(tmp_path / "run", None, **source, **steps) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_file_stays_as_it_was_when_writing_the_next_one_fails(tmp_path):
    path = tmp_path / "folder" / "file"
    with atomic_write(path) as file:
        file.write(b"first")

    def fail_half_way():
        with atomic_write(path) as file:
            file.write(b"second")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["file"]


def test_only_temporary_files_that_nobody_writes_to_any_more_are_removed(tmp_path):
    names = ["run.json.0a1b2c3d.partial", "loss.png.0a1b2c3d.partial", "film.partial"]
    for name in names:
        (tmp_path / name).touch()
    an_hour_ago = os.stat(tmp_path / names[0]).st_mtime - 3600
    for name in ("run.json.0a1b2c3d.partial", "film.partial"):  # the second is not ours
        os.utime(tmp_path / name, (an_hour_ago, an_hour_ago))
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
