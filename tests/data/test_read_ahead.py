"""Steps that are read ahead: the same sequences, positions that a run can resume from, and errors before the step."""

import re
import resource
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from batches import config
from huggingface_hub.errors import HTTPError
from patience import PATIENCE_SECONDS, wait_until

import prepare_data
from modeling_gpt2repro.data.batches import read_ahead
from modeling_gpt2repro.data.batches.read_ahead import ReadAhead
from modeling_gpt2repro.data.batches.sequences import TokenSequences
from modeling_gpt2repro.data.batches.shuffled import ShuffledBatches
from modeling_gpt2repro.data.batches.streaming import StreamedBatches
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.shards.shard_file import ShardFile
from modeling_gpt2repro.data.sources.resolve import local_source
from modeling_gpt2repro.storage import hub_files
from modeling_gpt2repro.storage.hub_files import retry_hub_read

TOTAL_STEPS = 20


def shuffled(**more):
    return ShuffledBatches(TokenSequences([np.arange(2_001) % 97], 10), config(**more), end_of_text=0)


@pytest.fixture
def streamed(tmp_path, tiny_texts, tiny_tokenizer):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(tiny_texts[number] * 3)
    source = local_source([str(tmp_path / "*.txt")])
    return lambda **more: StreamedBatches(source, tiny_tokenizer, config(**more))


def trained_on(reader, steps):
    for step in steps:
        assert reader.wait_for(step) is None
        yield torch.cat([batch["input_ids"] for batch in reader.micro_batches(step)])


@pytest.mark.parametrize("kind", ["shuffled", "streamed"])
def test_steps_read_ahead_are_the_same_and_the_state_is_that_of_the_last_step_taken(kind, streamed):
    build = {"shuffled": shuffled, "streamed": streamed}[kind]
    plain = build()
    expected = [torch.cat([batch["input_ids"] for batch in plain.micro_batches(step)]) for step in range(TOTAL_STEPS)]
    reader = ReadAhead(build(), TOTAL_STEPS)
    first = list(trained_on(reader, range(7)))
    state = reader.state_dict()
    wait_until(lambda: reader._steps[8].done())  # it has read further
    rest = list(trained_on(reader, range(7, TOTAL_STEPS)))
    assert all(map(torch.equal, first + rest, expected))
    resumed = ReadAhead(build(), TOTAL_STEPS)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, trained_on(resumed, range(7, TOTAL_STEPS)), expected[7:]))
    for batches in (plain, reader, resumed):
        batches.close()


class Failing(ShuffledBatches):
    """Batches of which one step cannot be read; `read` has the steps that were asked for."""

    def __init__(self, bad_step: int, error: Exception | None = None):
        batches = shuffled()
        super().__init__(batches.sequences, batches.config)
        self.bad_step = bad_step
        self.error = error
        self.read_steps = []

    def read_step(self, step):
        self.read_steps.append(step)
        if step == self.bad_step:
            raise self.error
        return super().read_step(step)


@pytest.mark.parametrize("kind", [OSError, ConnectionError, ValueError])  # disk, Hub, damaged file
def test_a_step_that_cannot_be_read_is_reported_before_the_one_before_it_begins(kind):
    reader = ReadAhead(Failing(bad_step=5, error=kind("the disk is gone.")), TOTAL_STEPS)
    assert len(list(trained_on(reader, range(4)))) == 4
    assert reader.wait_for(4) == "the disk is gone."
    assert len(list(reader.micro_batches(4))) == 4  # it is in memory
    assert reader.wait_for(5) == "the disk is gone."
    reader.close()


def test_nothing_is_read_beyond_the_last_step():
    batches = Failing(bad_step=3)
    reader = ReadAhead(batches, total_steps=3)
    assert len(list(trained_on(reader, range(3)))) == 3
    assert batches.read_steps == [0, 1, 2]
    reader.close()


def test_a_run_that_is_to_stop_does_not_wait_for_data():
    may_read = threading.Event()
    batches = shuffled()
    batches.read_step = lambda step: may_read.wait(PATIENCE_SECONDS)
    asked = threading.Event()
    reader = ReadAhead(batches, TOTAL_STEPS, is_stopping=lambda: asked.is_set() or asked.set())
    assert reader.wait_for(0) is None
    assert not may_read.is_set()
    assert reader.waited_seconds > 0
    may_read.set()
    reader.close()


def test_a_long_wait_says_what_must_be_read_again(monkeypatch):
    monkeypatch.setattr(read_ahead, "SILENT_SECONDS", 0.0)
    may_read = threading.Event()
    batches = shuffled()
    batches.read_step = lambda step: may_read.wait(PATIENCE_SECONDS) and []
    batches.problem = "a.parquet cannot be read: 403"
    reader = ReadAhead(batches, TOTAL_STEPS)
    said = []
    assert reader.wait_for(0, on_wait=lambda problem: (said.append(problem), may_read.set())) is None
    assert set(said) == {batches.problem}
    reader.close()


@pytest.fixture
def refused(streamed, monkeypatch):
    """A stream each of whose reads asks `refused.answers` for leave, as a read from the Hub does."""
    batches = streamed()
    batches.answers = lambda: None
    read = type(batches.source).read

    def read_with_retries(self, partition, on_wait):
        retry_hub_read(lambda: batches.answers(), on_wait=on_wait)
        return read(self, partition)

    monkeypatch.setattr(type(batches.source), "read", read_with_retries)
    return batches


def test_a_short_wait_is_silent():
    may_read = threading.Event()
    batches = shuffled()
    batches.read_step = lambda step: may_read.wait(PATIENCE_SECONDS) and []
    batches.problem = "a.parquet cannot be read: 403"
    reader = ReadAhead(batches, TOTAL_STEPS, is_stopping=may_read.set)  # which is asked once, and says None
    assert reader.wait_for(0, on_wait=lambda problem: pytest.fail("it has hardly waited")) is None
    assert may_read.is_set()
    reader.close()


def test_a_stream_that_is_closed_tries_no_read_again(refused, monkeypatch):
    """The end of the program waits for the threads that read."""
    monkeypatch.setattr(hub_files, "READ_PATIENCE_SECONDS", 10 * PATIENCE_SECONDS)
    refused.answers = Mock(side_effect=HTTPError("no route"))
    before = set(threading.enumerate())
    reader = ReadAhead(refused, TOTAL_STEPS, is_stopping=lambda: True)
    assert reader.wait_for(0) is None
    wait_until(lambda: refused.problem)
    assert re.fullmatch(r"bytes 0 to .*\.txt cannot be read: the Hub does not answer \(no route\)", refused.problem)
    threads = set(threading.enumerate()) - before
    assert len(threads) > 1
    reader.close()
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


def test_a_stream_that_is_read_at_last_has_no_problem(refused, streamed, monkeypatch):
    monkeypatch.setattr(hub_files, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None))
    refused.answers = Mock(side_effect=[HTTPError("no route"), HTTPError("no route"), *[None] * 1000])
    reader = ReadAhead(refused, TOTAL_STEPS)
    (ids,) = trained_on(reader, [0])
    assert refused.answers.call_count > 3
    assert refused.problem is None
    plain = streamed()
    assert torch.equal(ids, torch.cat([batch["input_ids"] for batch in plain.micro_batches(0)]))
    reader.close()
    plain.close()


def test_a_dataset_may_have_more_shards_than_a_process_may_open_files(tmp_path, tiny_texts, tiny_tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(tiny_texts))
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    words = ["--train_files", tmp_path / "a.txt", "--tokenizer", tmp_path / "tiny", "--workers", 1]
    words += ["--output_dir", tmp_path / "data", "--shard_tokens", 100, "--document_separator", r"\n"]
    prepare_data.main(list(map(str, words)))
    dataset = open_shards(tmp_path / "data")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        files = dataset.shard_files("train")
        ids = np.concatenate([file[:] for file in files])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(files) > 100
    assert np.array_equal(ids, np.concatenate(dataset.shards("train")))


def test_a_shard_file_gives_what_a_memory_map_gives(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**16, 1_000, dtype=np.uint16)
    np.save(tmp_path / "a.npy", ids)
    shard = ShardFile(tmp_path / "a.npy", np.lib.format.open_memmap(tmp_path / "a.npy", mode="r").offset, 1_000)
    for part in (slice(0, 3), slice(990, 2_000), slice(1_000, 1_005), slice(7, 7), slice(None, 12), slice(None)):
        assert np.array_equal(shard[part], ids[part])
        assert shard[part].dtype == np.uint16
    assert len(shard) == 1_000
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    assert shard[998:999] == ids[998:999]
    with pytest.raises(OSError, match=r"a\.npy cannot be read: it has become shorter since the run opened it\.$"):
        shard[998:1000]
