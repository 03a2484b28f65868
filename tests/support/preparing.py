"""Runs of prepare_data.py in this process, what they leave, and how they end."""

import pytest

import prepare_data
from modeling_gpt2repro.data.prepare import assemble
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare(folder, arguments, *more):
    prepare_data.main(["--output_dir", str(folder), *arguments, *map(str, more)])


def error_of(capsys, folder, arguments, *more):
    with pytest.raises(SystemExit) as end:
        prepare(folder, arguments, *more)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def interrupt_before_the_shards(folder, arguments, monkeypatch, partitions=5):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, "write_shards", interrupt)
    with pytest.raises(SystemExit) as end:
        prepare(folder, arguments)
    assert end.value.code == 130
    monkeypatch.undo()
    assert len(finished_partitions(folder)) == partitions
