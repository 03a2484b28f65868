"""Steps that do not divide evenly over processes and micro-batches: the same sequences, each counted once."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from modeling_gpt2repro.data.batches.mixture import MixedBatches
from modeling_gpt2repro.data.batches.sequences import TokenSequences, as_batch
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches, split_into_micro_batches
from modeling_gpt2repro.data.batches.streaming import StreamedBatches
from modeling_gpt2repro.data.sources.documents import Document, Partition
from modeling_gpt2repro.data.sources.resolve import Source

T = 10


def config(sequences_per_step, micro_batch_size=3, process_index=0, num_processes=1) -> BatchConfig:
    return BatchConfig(T, sequences_per_step, micro_batch_size, 1, process_index, num_processes)


def shuffled(order: BatchConfig) -> ShuffledBatches:
    return ShuffledBatches(TokenSequences([np.arange(1_000, dtype=np.uint16)], T), order)


def mixed(order: BatchConfig) -> MixedBatches:
    ids = np.arange(2_000, dtype=np.uint16)
    return MixedBatches([TokenSequences([ids[:1_000]], T), TokenSequences([ids[1_000:]], T)], [0.7, 0.3], order, 0)


@pytest.fixture
def streamed(tiny_tokenizer):
    """A stream of 8 logical shards whose partitions hold 1 to 9 sequences of text."""
    source = MadeUp([Partition("made", number, number + 1) for number in range(24)], {"dataset": "made"})
    return lambda order: StreamedBatches(source, tiny_tokenizer, order, max_logical_shards=8)


class Uneven(Source):
    """Each partition is one document of so many bytes as it says."""

    def read(self, partition, on_wait=None):
        text = "the sea was cold " * (partition.text_bytes // 17 + 1)
        return [Document(partition.name, text[: partition.text_bytes])]


def uneven(tokenizer, sizes: list[int], order: BatchConfig) -> StreamedBatches:
    partitions = [Partition("made", number, number + 1, text_bytes=size) for number, size in enumerate(sizes)]
    return StreamedBatches(Uneven(partitions, {}), tokenizer, order, validation_share=0.001)


class MadeUp(Source):
    def read(self, partition, on_wait=None):
        text = f"the ship {partition.start} sailed over the sea " * (1 + partition.start % 9)
        return [Document(f"{partition.start} {word}", text + word) for word in ("sea", "wind")]


def counted_sequences(batches, step) -> list[tuple[int, ...]]:
    """The sequences of a step that count: those with targets. The others have none at all."""
    sequences = []
    for part in batches.micro_batches(step):
        assert part["input_ids"].shape == part["shift_labels"].shape == (batches.micro_batch_shape[1], T)
        assert part["input_ids"].min() >= 0
        empty = (part["shift_labels"] == -100).all(dim=1)
        assert not (part["shift_labels"][~empty] == -100).any()
        sequences += [tuple(sequence) for sequence in part["input_ids"][~empty].tolist()]
    return sequences


@pytest.mark.parametrize(
    ("sequences", "max_size", "expected"),
    [(8, 8, (1, 8)), (9, 8, (2, 5)), (17, 8, (3, 6)), (3, 8, (1, 3)), (1, 1, (1, 1))],
)
def test_micro_batches_are_as_even_as_they_can_be(sequences, max_size, expected):
    assert split_into_micro_batches(sequences, max_size) == expected


@pytest.mark.parametrize("kind", [shuffled, mixed, "streamed"])
@pytest.mark.parametrize("sequences_per_step", [1, 5, 8, 13])
@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 16])
def test_each_sequence_of_a_step_counts_once(request, kind, sequences_per_step, processes, micro_batch_size):
    build = request.getfixturevalue(kind) if isinstance(kind, str) else kind
    alone = build(config(sequences_per_step, sequences_per_step))
    together = [build(config(sequences_per_step, micro_batch_size, p, processes)) for p in range(processes)]
    assert len({part.micro_batch_shape for part in together}) == 1
    assert together[0].micro_batch_shape[1] <= micro_batch_size
    for step in range(6):
        parts = [counted_sequences(part, step) for part in together]
        expected = counted_sequences(alone, step)
        assert len(expected) == sequences_per_step
        assert sorted(chain(*parts)) == sorted(expected)
        names = chain(*(part.sample_ids(step) for part in together))
        assert sorted(map(str, names)) == sorted(map(str, alone.sample_ids(step)))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (5, 1)])
def test_a_stream_resumes_on_processes_that_do_not_divide_its_logical_shards(streamed, before, after):
    alone = streamed(config(13, 13))
    expected = [sorted(counted_sequences(alone, step)) for step in range(8)]
    stopped = [streamed(config(13, 2, p, before)) for p in range(before)]
    for step in range(4):
        for part in stopped:
            counted_sequences(part, step)
    positions = {}
    for part in stopped:
        positions |= json.loads(json.dumps(part.state_dict()))["lanes"]
    resumed = [streamed(config(13, 2, p, after)) for p in range(after)]
    for part in resumed:
        part.load_state_dict({"next_step": 4, "lanes": positions})
    for step in range(4, 8):
        assert sorted(chain(*(counted_sequences(part, step) for part in resumed))) == expected[step]


def test_sample_ids_say_where_a_sequence_is_found():
    batches = shuffled(config(5))
    first_ids = [sequence[0] for sequence in counted_sequences(batches, 3)]
    assert [T * index for index in batches.sample_ids(3)] == first_ids
    batches = mixed(config(5))
    first_ids = [sequence[0] for sequence in counted_sequences(batches, 3)]
    assert [1_000 * folder + T * index for folder, index in batches.sample_ids(3)] == first_ids


def test_sample_ids_of_a_stream_are_partition_and_token(streamed, tiny_tokenizer):
    batches = streamed(config(4))
    sequences = counted_sequences(batches, 0)
    assert json.loads(json.dumps(batches.sample_ids(0))) == batches.sample_ids(0)  # they go into metrics.jsonl
    for sequence, (name, token) in zip(sequences, batches.sample_ids(0), strict=True):
        partition = next(partition for partition in batches.partitions if partition.name == name)
        assert token == 0  # the first sequence of its logical shard
        assert f"the ship {partition.start} " in tiny_tokenizer.decode(sequence)


def test_padding_has_no_targets_and_leaves_the_loss_alone(tiny_model):
    ids = torch.randint(1, 97, (2, T + 1), generator=torch.Generator().manual_seed(0)).numpy()
    plain = as_batch(ids)
    padded = as_batch(ids, pad_to=5)
    assert torch.equal(padded["input_ids"][:2], plain["input_ids"])
    losses = [tiny_model(**batch, num_items_in_batch=2 * T).loss.item() for batch in (plain, padded)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_no_partition_is_repeated_over_and_over_before_the_largest_has_been_read(tiny_tokenizer):
    """One of 120 partitions holds 40 % of the text: by the time that one of 64 logical shards had read it, the others
    had been read 37 times."""
    sizes = [250] * 60 + [20_000] + [250] * 60
    batches = uneven(tiny_tokenizer, sizes, config(8, 8))
    assert len(batches.partitions) == len(sizes) - 1  # and not the largest is held out
    assert batches.num_logical_shards == 4
    lengths = {partition.name: len(batches._tokenize(partition)) for partition in batches.partitions}
    taken = Counter()
    for step in range(10_000):
        list(batches.micro_batches(step))
        taken.update(name for name, _ in batches.sample_ids(step))
        if any(name == "made:60" and token > lengths[name] - 2 * T for name, token in batches.sample_ids(step)):
            break
    read = {name: count * T / lengths[name] for name, count in taken.items()}
    assert max(read.values()) < 5
    assert len(read) > 100
    batches.close()


def test_a_stream_says_why_it_has_few_logical_shards(tiny_tokenizer, one_sentence):
    sizes = [250] * 60 + [20_000] + [250] * 60
    with pytest.raises(
        ValueError,
        match=r"^8 processes cannot share the 4 logical shards of this stream, whose largest partition holds 40\.2% "
        r"of its text: use at most 4, or prepare the data and give --shards\.$",
    ) as error:
        uneven(tiny_tokenizer, sizes, config(8, 1, 0, 8))
    one_sentence(error)


@pytest.mark.parametrize(
    ("sizes", "logical_shards"),
    [
        ([100] * 65, 64),
        ([100] * 129, 64),
        ([60, 90, 100, 110, 120, 90, 70, 80, 95], 8),
        ([0] * 65, 64),
        ([0, 9] * 40, 64),
    ],
)
def test_partitions_of_about_one_size_or_of_unknown_ones_have_as_many_as_before(tiny_tokenizer, sizes, logical_shards):
    assert uneven(tiny_tokenizer, sizes, config(64, 1)).num_logical_shards == logical_shards


def test_a_stream_in_the_order_of_older_versions_keeps_its_logical_shards(tiny_tokenizer):
    sizes = [250] * 60 + [20_000] + [250] * 60
    assert uneven(tiny_tokenizer, sizes, replace(config(8, 8), order="argsort")).num_logical_shards == 64
