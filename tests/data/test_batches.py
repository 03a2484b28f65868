"""Sequences of tokens and their order, from prepared shards."""

import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from batches import config, interleaved, step_sequences
from keyed_order import shuffled_epoch

from modeling_gpt2repro.data.batches.build import build_shuffled_data
from modeling_gpt2repro.data.batches.sequences import TokenSequences, as_batch, first_tokens, validation_batches
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, EpochShuffle, ShuffledBatches, keyed_permutation
from modeling_gpt2repro.data.shards.dataset import open_shards


def made_sequences(tokens=1_000, block_size=10, shard_tokens=137):
    """Ids 0, 1, 2, ... in shards that are no multiple of a sequence."""
    ids = np.arange(tokens, dtype=np.uint16)
    return TokenSequences([ids[i : i + shard_tokens] for i in range(0, tokens, shard_tokens)], block_size)


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
    data = build_shuffled_data(token_shards, replace(config(block_size=64), document_mask=True), 10_000)
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
        build_shuffled_data(token_shards, config(block_size=100_000), 10_000)


def test_the_fingerprint_depends_on_the_seed_and_not_on_the_processes(token_shards):
    data = build_shuffled_data(token_shards, config(block_size=64), 10_000)
    again = build_shuffled_data(
        open_shards(token_shards.folder), config(block_size=64, process_index=1, num_processes=2), 10_000
    )
    assert data.data_fingerprint == again.data_fingerprint
    assert (
        data.data_fingerprint
        != build_shuffled_data(token_shards, config(block_size=64, seed=2), 10_000).data_fingerprint
    )
    assert sum(len(batch["input_ids"]) for batch in data.validation_batches(640, 4)) == 10


@pytest.mark.parametrize("processes", [1, 2])
def test_every_step_has_the_sequences_of_the_first_where_one_batch_is_to_be_overfitted(processes):
    of_process = [
        ShuffledBatches(
            made_sequences(), replace(config(process_index=p, num_processes=processes), overfit_one_batch=True)
        )
        for p in range(processes)
    ]
    usual = step_sequences(ShuffledBatches(made_sequences(), config()), 0)
    for step in (0, 1, 70):
        assert torch.equal(interleaved([step_sequences(batches, step) for batches in of_process]), usual)
        assert of_process[0].sample_ids(step) == of_process[0].sample_ids(0)
