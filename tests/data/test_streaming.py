"""Batches that are read straight from a source, and the partitions that they come from."""

import json
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from batches import config, interleaved, step_sequences
from patience import PATIENCE_SECONDS, wait_until

from modeling_gpt2repro.data.batches.build import build_streamed_data
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.batches.streaming import StreamedBatches
from modeling_gpt2repro.data.sources import text as text_files
from modeling_gpt2repro.data.sources.documents import Partition
from modeling_gpt2repro.data.sources.partitions import list_partitions
from modeling_gpt2repro.data.sources.resolve import Source, local_source
from modeling_gpt2repro.data.tokenizer import text_encoder, train_tokenizer

END = "<|endoftext|>"


def write_parquet(path, columns, row_group_size=10):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


@pytest.mark.parametrize("order", ["keyed", "argsort"])
def test_keeping_track_of_a_million_partitions_takes_no_time(tiny_tokenizer, order):
    source = Source([Partition("made.txt", n, n + 1) for n in range(200_000)], {})
    batches = StreamedBatches(source, tiny_tokenizer, replace(config(), order=order))
    batches._partition(0, 0)
    started = time.process_time()
    for turn in range(50):
        batches._partition(3, turn)
    assert (time.process_time() - started) / 50 < 0.005  # 0.2 ms, where it took 20 to sort them every time
    positions = np.arange(len(batches.partitions))
    names = {batches._partition(n % 64, n // 64)[0].name for n in positions[:2000].tolist()}
    assert len(names) == 2000
    batches.close()


PARTITIONS, DOCUMENTS_PER_PARTITION = 17, 2


@pytest.fixture
def streamed(tmp_path, tiny_tokenizer):
    """17 partitions of two documents, all of one length in tokens; a sequence is as long as a document, so 32 sequences
    of 4 logical shards are an epoch."""
    texts = [f"the ship {u:02d} found land {d:02d}" for u in range(PARTITIONS) for d in range(DOCUMENTS_PER_PARTITION)]
    lengths = {len(text_encoder(tiny_tokenizer)(text)) for text in texts}
    assert len(lengths) == 1
    source = local_source(
        [write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=DOCUMENTS_PER_PARTITION)]
    )
    block_size = lengths.pop() + 1

    def build(process_index=0, num_processes=1, sequences_per_step=8, micro_batch_size=2, seed=1, **options):
        order = BatchConfig(block_size, sequences_per_step, micro_batch_size, seed, process_index, num_processes)
        return StreamedBatches(source, tiny_tokenizer, order, max_logical_shards=4, **options)

    return build


def ships(tokenizer, sequences):
    """Which (partition, document) each sequence holds: two numbers of two digits in its text."""
    texts = tokenizer.batch_decode(sequences[:, :-1])
    assert all(text.startswith(END) and text.count(END) == 1 for text in texts)
    return [tuple(map(int, re.findall(r"\d\d", text))) for text in texts]


def test_an_epoch_of_a_stream_uses_each_partition_once_and_never_one_of_validation(streamed, tiny_tokenizer):
    batches = streamed()
    seen = ships(tiny_tokenizer, torch.cat([step_sequences(batches, step) for step in range(12)]))  # 3 epochs
    held_out = {partition.start for partition in batches.validation_partitions}
    wanted = {(u, d): 1 for u in range(PARTITIONS) for d in range(DOCUMENTS_PER_PARTITION) if u not in held_out}
    epochs = [seen[first : first + 32] for first in (0, 32, 64)]
    assert [Counter(epoch) for epoch in epochs] == [wanted] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert {u for u, _ in epochs[0][:4]} != set(range(4))  # partitions are shuffled
    assert {epoch.index((u, 0)) < epoch.index((u, 1)) for epoch in epochs for u, _ in wanted} == {True, False}

    text = tiny_tokenizer.decode(np.concatenate(batches.validation_sequences(10**6).shards)).split(END)[1:]
    assert {int(found[9:11]) for found in text} == held_out
    assert len(held_out) == 1
    batches.close()


def test_no_more_partitions_are_read_for_validation_than_its_tokens_take(streamed):
    batches = streamed(validation_share=0.5)  # 8 partitions of 2 T tokens; n tokens to predict take n + 1
    T = batches.config.block_size
    assert [len(batches.validation_sequences(tokens).shards) for tokens in (1, 2 * T - 1, 2 * T, 99 * T)] == [
        1,
        1,
        2,
        8,
    ]
    batches.close()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_stream_gives_the_same_sequences_to_any_number_of_processes(streamed, processes):
    alone = streamed(micro_batch_size=8)
    together = [streamed(p, processes, micro_batch_size=1) for p in range(processes)]
    for step in range(10):
        assert torch.equal(interleaved([step_sequences(part, step) for part in together]), step_sequences(alone, step))


@pytest.mark.parametrize("step", [0, 1, 7, 13])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 4)])
def test_a_stream_resumes_with_the_very_next_sequence_on_other_processes(streamed, step, before, after):
    alone = streamed()
    expected = [step_sequences(alone, s) for s in range(20)]
    stopped = [streamed(p, before, micro_batch_size=1) for p in range(before)]
    for s in range(step):
        for part in stopped:
            step_sequences(part, s)
    states = [json.loads(json.dumps(part.state_dict())) for part in stopped]
    state = {
        "next_step": step,
        "lanes": {shard: position for part in states for shard, position in part["lanes"].items()},
    }
    resumed = [streamed(p, after, micro_batch_size=1) for p in range(after)]
    for part in resumed:
        part.load_state_dict(state)
    for s in range(step, 20):
        assert torch.equal(interleaved([step_sequences(part, s) for part in resumed]), expected[s])


def watch_reading(batches: StreamedBatches, before_reading) -> None:
    read = batches.source.read
    batches.source = SimpleNamespace(
        read=lambda partition, **more: (before_reading(partition), read(partition, **more))[1]
    )


def test_a_process_reads_only_the_partitions_of_its_own_logical_shards(streamed):
    own = []
    for process in range(4):
        batches = streamed(process, 4, micro_batch_size=1)
        partitions = []
        watch_reading(batches, partitions.append)
        for step in range(2):  # half an epoch
            step_sequences(batches, step)
        batches.close()
        own.append(set(partitions))
    assert sum(map(len, own)) == len(set.union(*own))  # no partition is read by two
    assert all(2 <= len(partitions) <= 4 for partitions in own)  # of 16: two used, one for a last token, one read ahead


def test_a_step_does_not_wait_for_partitions_that_are_read_ahead(streamed):
    batches = streamed(sequences_per_step=4, micro_batch_size=4)  # the second step takes a last token from the next
    begun = []
    may_be_read = threading.Event()
    first = {batches._partition(logical_shard, turn=0)[0] for logical_shard in range(4)}

    def before_reading(partition):
        begun.append(partition)
        assert partition in first or may_be_read.wait(PATIENCE_SECONDS)

    watch_reading(batches, before_reading)
    step_sequences(batches, 0)  # while nothing but its own partitions can be read
    wait_until(lambda: len(begun) == 4 + 4)  # those of the next step are asked for already
    may_be_read.set()
    for step in (1, 2):
        step_sequences(batches, step)
    wait_until(lambda: len(begun) == 4 + 4 + 4)  # none is read twice
    batches.close()


def test_a_stream_can_be_set_back(streamed):
    batches = streamed()
    start = json.loads(json.dumps(batches.state_dict()))
    expected = [step_sequences(batches, step) for step in range(9)]
    batches.load_state_dict(start)
    assert torch.equal(torch.cat([step_sequences(batches, step) for step in range(9)]), torch.cat(expected))


def test_a_stream_gives_the_first_step_again_where_one_batch_is_to_be_overfitted(streamed):
    first = step_sequences(streamed(), 0)
    batches = streamed()
    batches.config = replace(batches.config, overfit_one_batch=True)
    assert all(torch.equal(step_sequences(batches, step), first) for step in range(5))
    resumed = streamed(seed=1)
    resumed.config = batches.config
    resumed.load_state_dict(batches.state_dict())
    assert torch.equal(step_sequences(resumed, 5), first)
    assert resumed.sample_ids(5) == batches.sample_ids(0)


def test_positions_of_another_number_of_logical_shards_are_refused(streamed):
    batches = streamed()
    state = batches.state_dict()
    for lanes in ({"0": [0, 0]}, {**state["lanes"], "4": [0, 0]}):
        with pytest.raises(ValueError, match=rf"it has {len(lanes)} logical shards, and this stream 4"):
            batches.load_state_dict({"next_step": 0, "lanes": lanes})
    assert batches.state_dict() == state


def test_sequences_of_a_stream_overlap_by_one_token(tmp_path, tiny_texts, tiny_tokenizer):
    """In one logical shard a sequence begins with the last token of the one before, across documents, partitions and
    epochs."""
    source = local_source([write_parquet(tmp_path / "a.parquet", {"text": tiny_texts[:30]}, row_group_size=10)])
    batches = StreamedBatches(source, tiny_tokenizer, BatchConfig(64, 4, 2, seed=3), max_logical_shards=1)
    sequences = torch.cat([step_sequences(batches, step) for step in range(60)])
    assert torch.equal(sequences[1:, 0], sequences[:-1, -1])
    kept = [document for partition in batches.partitions for document in source.read(partition)]
    tokens = sum(1 + len(text_encoder(tiny_tokenizer)(document.text)) for document in kept)
    flat = sequences[:, :-1].flatten()
    assert len(flat) > 2 * tokens
    for epoch in (flat[:tokens], flat[tokens : 2 * tokens]):
        assert sorted(tiny_tokenizer.decode(epoch).split(END)[1:]) == sorted(document.text for document in kept)


def test_a_text_file_is_streamed_in_its_order(tmp_path, tiny_texts, tiny_tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(tiny_texts))
    source = Source(list_partitions([str(tmp_path / "a.txt")], partition_bytes=20_000), {"files": ["a.txt"]})
    batches = StreamedBatches(source, tiny_tokenizer, BatchConfig(64, 32, 32, seed=3), max_logical_shards=1)
    text = tiny_tokenizer.decode(step_sequences(batches, 0)[:, :-1].flatten()).removeprefix(END)
    assert len(text) > 2 * text_files.PIECE_CHARACTERS
    assert text.split(END)[0] in "\n".join(tiny_texts)
    assert len(text.split(END)) <= 2  # the next partition may have begun


def test_a_source_that_cannot_be_streamed_is_one_sentence(tmp_path, streamed, tiny_tokenizer, one_sentence):
    with pytest.raises(
        ValueError, match=r"5 processes cannot share the 4 logical shards of this stream, .*: use at most 4, or prepare"
    ) as error:
        streamed(0, 5)
    one_sentence(error)
    (tmp_path / "one.txt").write_text("the sea")
    with pytest.raises(ValueError, match=r"streaming needs two partitions or more, one for validation") as error:
        StreamedBatches(local_source([str(tmp_path / "one.txt")]), tiny_tokenizer, config())
    one_sentence(error)
    blank = local_source([write_parquet(tmp_path / "blank.parquet", {"text": [" "] * 9}, row_group_size=1)])
    batches = StreamedBatches(blank, tiny_tokenizer, config())
    with pytest.raises(ValueError, match=r"there is no text in the source") as error:
        next(batches.micro_batches(0))
    one_sentence(error)
    with pytest.raises(ValueError, match=r"the validation split holds 0 tokens") as error:
        batches.validation_sequences(100)
    one_sentence(error)


def test_the_fingerprint_of_a_stream_is_that_of_what_decides_its_sequences(tmp_path, streamed, tiny_tokenizer):
    source = streamed().source
    order = streamed().config
    data = build_streamed_data(source, tiny_tokenizer, order, 0.001, 100)
    same = build_streamed_data(source, tiny_tokenizer, replace(order, micro_batch_size=1), 0.001, 100)
    assert data.data_fingerprint == same.data_fingerprint
    for other in (
        build_streamed_data(source, tiny_tokenizer, replace(order, seed=9), 0.001, 100),
        build_streamed_data(source, tiny_tokenizer, order, 0.5, 100),
        build_streamed_data(
            local_source([source.partitions[0].path], "text"), train_tokenizer(["a b " * 99], 258), order, 0.001, 9
        ),
    ):
        assert other.data_fingerprint != data.data_fingerprint
    assert data.summary == "files, streamed: 16 partitions in 16 logical shards"
