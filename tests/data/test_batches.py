"""Sequences of tokens and their order, from prepared shards and from a stream."""

import json
import re
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from keyed_order import shuffled_epoch
from patience import PATIENCE_SECONDS, wait_until

from modeling_gpt2repro.data.batches.build import build_shuffled_data, build_streamed_data
from modeling_gpt2repro.data.batches.sequences import TokenSequences, as_batch, first_tokens, validation_batches
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, EpochShuffle, ShuffledBatches, keyed_permutation
from modeling_gpt2repro.data.batches.streaming import StreamedBatches
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources import text as text_files
from modeling_gpt2repro.data.sources.documents import Partition, list_partitions
from modeling_gpt2repro.data.sources.resolve import Source, local_source
from modeling_gpt2repro.data.tokenizer import text_encoder, train_tokenizer

END = "<|endoftext|>"


def write_parquet(path, columns, row_group_size=10):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def made_sequences(tokens=1_000, block_size=10, shard_tokens=137):
    """Ids 0, 1, 2, ... in shards that are no multiple of a sequence."""
    ids = np.arange(tokens, dtype=np.uint16)
    return TokenSequences([ids[i : i + shard_tokens] for i in range(0, tokens, shard_tokens)], block_size)


def config(sequences_per_step=12, micro_batch_size=3, seed=1, process_index=0, num_processes=1, block_size=10):
    return BatchConfig(block_size, sequences_per_step, micro_batch_size, seed, process_index, num_processes)


def step_sequences(batches, step):
    """The ids of a step's sequences, (R, T + 1) in their order; asserts that targets are the next tokens."""
    parts = list(batches.micro_batches(step))
    for part in parts:
        assert part["input_ids"].dtype == part["shift_labels"].dtype == torch.int64
        assert torch.equal(part["input_ids"][:, 1:], part["shift_labels"][:, :-1])
        assert len(part["input_ids"]) == batches.config.micro_batch_size
    return torch.cat([torch.cat([part["input_ids"], part["shift_labels"][:, -1:]], dim=1) for part in parts])


def interleaved(parts):
    """Sequences of the processes 0, 1, ... -> those of the run: process p has every P-th from the p-th on."""
    return torch.stack(parts, dim=1).flatten(0, 1)


@pytest.mark.parametrize("block_size", [1, 10, 136, 137, 500])
def test_sequences_read_across_shards_are_naive_slices(block_size):
    sequences = made_sequences(block_size=block_size)
    assert len(sequences) == 999 // block_size
    indices = np.random.default_rng(0).permutation(len(sequences))
    naive = np.stack([np.arange(i * block_size, i * block_size + block_size + 1) for i in indices])
    assert np.array_equal(sequences.read(indices), naive)
    assert sequences.read(indices).dtype == np.int64


def test_sequences_of_real_shards_are_slices_of_the_split(token_shards, all_ids):
    sequences = TokenSequences(token_shards.shards("train"), 64)
    ids = all_ids(token_shards)
    indices = np.arange(len(sequences))
    assert np.array_equal(sequences.read(indices), np.stack([ids[i * 64 : i * 64 + 65] for i in indices]))


@pytest.mark.parametrize(("tokens", "length"), [(1, 11), (19, 11), (20, 21), (300, 301), (10**9, 991)])
def test_the_first_ids_are_whole_sequences_and_one_more(tokens, length):
    ids = made_sequences().first_ids(tokens)
    assert ids.tolist() == list(range(length))
    assert ids.dtype == np.int64


def test_the_first_tokens_are_views_of_the_shards():
    shards = [np.arange(5), np.arange(5, 10), np.arange(10, 15)]
    assert [part.tolist() for part in first_tokens(shards, 7)] == [[0, 1, 2, 3, 4], [5, 6]]
    assert [len(part) for part in first_tokens(shards, 10)] == [5, 5]
    assert [len(part) for part in first_tokens(shards, 99)] == [5, 5, 5]
    assert all(np.shares_memory(part, shard) for part, shard in zip(first_tokens(shards, 7), shards, strict=False))


def test_an_epoch_holds_each_row_once_and_predicts_each_token_once():
    sequences = made_sequences(tokens=961)  # 96 sequences are 8 steps of 12
    batches = ShuffledBatches(sequences, config())
    epochs = [torch.cat([step_sequences(batches, step) for step in range(first, first + 8)]) for first in (0, 8)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 960, 10))
        assert sorted(epoch[:, 1:].flatten().tolist()) == list(range(1, 961))
    assert epochs[0][:, 0].tolist() != sorted(epochs[0][:, 0].tolist())
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0][:12], step_sequences(ShuffledBatches(sequences, config(seed=2)), 0))


def test_a_step_may_lie_in_two_epochs():
    batches = ShuffledBatches(made_sequences(), config())  # 99 sequences: 8 steps and a quarter
    seen = torch.cat([step_sequences(batches, step) for step in range(33)])  # 4 epochs
    for epoch in seen.split(99):
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 990, 10))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_order_depends_neither_on_processes_nor_on_the_micro_batch(processes, micro_batch_size):
    sequences = made_sequences()
    alone = ShuffledBatches(sequences, config(36, 12))
    together = [ShuffledBatches(sequences, config(36, micro_batch_size, 1, p, processes)) for p in range(processes)]
    for step in range(20):
        assert torch.equal(interleaved([step_sequences(part, step) for part in together]), step_sequences(alone, step))


def test_a_step_reached_directly_is_the_one_reached_in_order():
    sequences = made_sequences()
    in_order = ShuffledBatches(sequences, config())
    reached = [step_sequences(in_order, step) for step in range(30)]
    for step in (29, 8, 17, 0):
        direct = ShuffledBatches(sequences, config())
        direct.load_state_dict(in_order.state_dict())
        assert torch.equal(step_sequences(direct, step), reached[step])


def test_the_order_of_a_seed_is_fixed_for_good():
    # As they were first released: a run that is resumed on a newer version must see the same sequences.
    for order, first in (
        ("argsort", [93, 61, 75, 9, 36, 39, 85, 55, 96, 31, 16, 2]),
        ("keyed", [57, 66, 16, 32, 11, 37, 95, 19, 78, 22, 89, 49]),
    ):
        batches = ShuffledBatches(made_sequences(), replace(config(), order=order))
        assert batches.sample_ids(0) == first
        assert batches.shuffle.indices(batches.sample_indices(0)).tolist() == first
    assert BatchConfig.order == "keyed"


def test_the_order_is_that_of_a_table_rolled_by_hand():
    for size in [*range(1, 40), 99, 100, 101, 257, 1000]:
        assert keyed_permutation(np.arange(size), size, [size, 3]).tolist() == shuffled_epoch(size, [size, 3])
    shuffle = ShuffledBatches(made_sequences(), config(seed=5)).shuffle
    assert shuffle.indices(np.arange(300)).tolist() == [i for e in range(4) for i in shuffled_epoch(99, [5, e])][:300]


def test_each_index_comes_once_for_every_size():
    for size in [*range(1, 300), 10**6, 10**6 + 1, 999**2 + 999, 1_048_573]:
        assert np.array_equal(np.sort(keyed_permutation(np.arange(size), size, [size])), np.arange(size)), size


@pytest.mark.parametrize("size", [10**8 + 7, 2**40 - 1, 2**62])
def test_of_a_large_epoch_any_part_is_taken_without_the_rest(size):
    parts = [np.arange(100_000), np.arange(size // 2, size // 2 + 100_000), np.arange(size - 100_000, size)]
    indices = keyed_permutation(np.concatenate(parts), size, [1, 0])
    assert len(np.unique(indices)) == 300_000
    assert 0 <= indices.min() < indices.max() < size
    counts, _ = np.histogram(indices, bins=100, range=(0, size))
    assert chi_square(counts) < CHI_SQUARE_LIMIT[99]
    again = keyed_permutation(parts[1][:10], size, [1, 0])
    assert np.array_equal(again, indices[100_000:100_010])


def chi_square(counts: np.ndarray) -> float:
    """Distance of the counts from equal ones, where by chance it is about their number."""
    expected = np.mean(counts)
    return float(np.sum((counts - expected) ** 2) / expected)


# Degrees of freedom -> what chi-square exceeds once in a million times; the seeds are fixed, so this is no lottery.
CHI_SQUARE_LIMIT = {23: 71.2, 81: 156.8, 99: 181.1}


def test_all_orders_of_four_items_are_equally_likely():
    orders = Counter(tuple(keyed_permutation(np.arange(4), 4, [seed, 0]).tolist()) for seed in range(4800))
    assert len(orders) == 24
    assert chi_square(np.array(list(orders.values()))) < CHI_SQUARE_LIMIT[23]


@pytest.mark.parametrize("varied", ["seed", "epoch"])
def test_an_item_is_equally_likely_everywhere(varied):
    counts = np.zeros((10, 10))
    for number in range(3000):
        seed = [number, 0] if varied == "seed" else [0, number]
        counts[np.arange(10), keyed_permutation(np.arange(10), 10, seed)] += 1
    assert chi_square(counts) < CHI_SQUARE_LIMIT[81]  # rows and columns each add up to 3000, so 9 x 9 are free


def test_neighbours_seeds_and_epochs_have_nothing_in_common():
    size, seeds = 1000, 300
    epochs = [[keyed_permutation(np.arange(size), size, [seed, epoch]) for epoch in (0, 1)] for seed in range(seeds)]
    first = [epoch for epoch, _ in epochs]
    # Each would happen once in an epoch by chance: 300 times, give or take five times the root of it.
    by_chance = pytest.approx(seeds, abs=5 * seeds**0.5)
    assert sum(np.count_nonzero(epoch == np.arange(size)) for epoch in first) == by_chance  # left where it was
    assert sum(np.count_nonzero(np.diff(epoch) == 1) for epoch in first) == by_chance  # neighbours stay neighbours
    assert sum(np.count_nonzero(np.diff(epoch) == 32) for epoch in first) == by_chance  # 32 columns
    assert sum(np.count_nonzero(a == b) for a, b in epochs) == by_chance  # the next epoch
    assert sum(np.count_nonzero(a == b) for a, b in pairwise(first)) == by_chance  # the next seed
    correlations = [np.corrcoef(epoch, np.arange(size))[0, 1] for epoch in first]
    assert abs(np.mean(correlations)) < 5 / (size * seeds) ** 0.5
    assert np.std(correlations) == pytest.approx(size**-0.5, rel=0.25)


def test_an_epoch_of_a_hundred_million_sequences_takes_no_memory():
    shuffle = EpochShuffle(10**8, [1])
    shuffle.indices(np.arange(512))
    tracemalloc.start()
    started = time.process_time()
    for epoch in range(10):
        shuffle.indices(np.arange(512) + epoch * 10**8)
    seconds = (time.process_time() - started) / 10
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6
    assert seconds < 0.1  # 0.3 ms; 20 s where an epoch is sorted


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_validation_takes_the_first_sequences_once_over_all_processes(processes):
    sequences = made_sequences()
    for tokens, count in ((70, 7), (79, 7), (1, 1), (10**9, 99)):
        parts = [list(validation_batches(sequences, tokens, 4, p, processes)) for p in range(processes)]
        assert all(len(batch["input_ids"]) <= 4 for part in parts for batch in part)
        firsts = sorted(int(first) for part in parts for batch in part for first in batch["input_ids"][:, 0])
        assert firsts == list(range(0, count * 10, 10))


def test_positions_start_again_at_each_document(token_shards):
    ids = np.array([[5, 6, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6, 7]])
    batch = as_batch(ids, end_of_text=0)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert "position_ids" not in as_batch(ids)
    data = build_shuffled_data(token_shards, replace(config(block_size=64), document_mask=True))
    for batch in (next(data.batches.micro_batches(0)), next(data.validation_batches(640, 4))):
        starts = batch["input_ids"] == token_shards.tokenizer.eos_token_id
        assert (batch["position_ids"][starts] == 0).all()
        assert (batch["position_ids"] == 0).sum() == starts.sum() + (~starts[:, 0]).sum()


def test_too_little_text_for_one_sequence_is_an_error_of_each_split(token_shards, one_sentence):
    with pytest.raises(
        ValueError, match=r"the training split holds 10 tokens, but one sequence takes 11: give"
    ) as error:
        made_sequences(tokens=10)
    one_sentence(error)
    assert len(made_sequences(tokens=11)) == 1
    with pytest.raises(ValueError, match=r"the training split .*\nthe validation split .*--block_size\.$"):
        build_shuffled_data(token_shards, config(block_size=100_000))


def test_the_fingerprint_depends_on_the_seed_and_not_on_the_processes(token_shards):
    data = build_shuffled_data(token_shards, config(block_size=64))
    again = build_shuffled_data(
        open_shards(token_shards.folder), config(block_size=64, process_index=1, num_processes=2)
    )
    assert data.data_fingerprint == again.data_fingerprint
    assert data.data_fingerprint != build_shuffled_data(token_shards, config(block_size=64, seed=2)).data_fingerprint
    assert sum(len(batch["input_ids"]) for batch in data.validation_batches(640, 4)) == 10


# Streaming


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
    batches.source = SimpleNamespace(read=lambda partition: (before_reading(partition), read(partition))[1])


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
