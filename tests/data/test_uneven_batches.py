"""Steps that do not divide evenly over processes and micro-batches: the same rows, and each counted once."""

import json
from itertools import chain

import numpy as np
import pytest
import torch

from modeling_gpt2repro.data.batches import streaming as stream
from modeling_gpt2repro.data.batches.mixture import MixedBatches
from modeling_gpt2repro.data.batches.shuffled import (
    BatchConfig,
    ShuffledBatches,
    TokenSequences,
    as_batch,
    split_into_micro_batches,
)
from modeling_gpt2repro.data.batches.streaming import StreamedBatches
from modeling_gpt2repro.data.sources.documents import Document, Partition
from modeling_gpt2repro.data.sources.resolve import Source

T = 10


def shape(sequences_per_step, micro_batch_size=3, process_index=0, num_processes=1) -> BatchConfig:
    return BatchConfig(T, sequences_per_step, micro_batch_size, 1, process_index, num_processes)


def shuffled(order: BatchConfig) -> ShuffledBatches:
    return ShuffledBatches(TokenSequences([np.arange(1_000, dtype=np.uint16)], T), order)


def mixed(order: BatchConfig) -> MixedBatches:
    ids = np.arange(2_000, dtype=np.uint16)
    return MixedBatches([TokenSequences([ids[:1_000]], T), TokenSequences([ids[1_000:]], T)], [0.7, 0.3], order, 0)


@pytest.fixture
def streamed(monkeypatch, tiny_tokenizer):
    """A stream in 8 lanes of partitions that hold 1 to 9 rows of text."""
    monkeypatch.setattr(stream, "MOST_LANES", 8)
    partitions = [Partition("made", number, number + 1) for number in range(24)]
    return lambda order: StreamedBatches(MadeUp(partitions, {"dataset": "made"}), tiny_tokenizer, order)


class MadeUp(Source):
    def read(self, partition, skipped=None):
        text = f"the ship {partition.start} sailed over the sea " * (1 + partition.start % 9)
        return [Document(f"{partition.start} {word}", text + word) for word in ("sea", "wind")]


def counted_rows(batches, step) -> list[tuple[int, ...]]:
    """The rows of a step that count: those with targets. The others have none at all."""
    rows = []
    for part in batches.micro_batches(step):
        assert part["input_ids"].shape == part["shift_labels"].shape == (batches.micro_batch_shape[1], T)
        assert part["input_ids"].min() >= 0
        empty = (part["shift_labels"] == -100).all(dim=1)
        assert not (part["shift_labels"][~empty] == -100).any()
        rows += [tuple(row) for row in part["input_ids"][~empty].tolist()]
    return rows


@pytest.mark.parametrize(
    ("rows", "most", "expected"), [(8, 8, (1, 8)), (9, 8, (2, 5)), (17, 8, (3, 6)), (3, 8, (1, 3)), (1, 1, (1, 1))]
)
def test_micro_batches_are_as_even_as_they_can_be(rows, most, expected):
    assert split_into_micro_batches(rows, most) == expected


@pytest.mark.parametrize("kind", [shuffled, mixed, "streamed"])
@pytest.mark.parametrize("sequences_per_step", [1, 5, 8, 13])
@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 16])
def test_each_row_of_a_step_counts_once(request, kind, sequences_per_step, processes, micro_batch_size):
    build = request.getfixturevalue(kind) if isinstance(kind, str) else kind
    alone = build(shape(sequences_per_step, sequences_per_step))
    together = [build(shape(sequences_per_step, micro_batch_size, p, processes)) for p in range(processes)]
    assert len({part.micro_batch_shape for part in together}) == 1
    assert together[0].micro_batch_shape[1] <= micro_batch_size
    for step in range(6):
        parts = [counted_rows(part, step) for part in together]
        expected = counted_rows(alone, step)
        assert len(expected) == sequences_per_step
        assert sorted(chain(*parts)) == sorted(expected)
        names = chain(*(part.sample_ids(step) for part in together))
        assert sorted(map(str, names)) == sorted(map(str, alone.sample_ids(step)))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (5, 1)])
def test_a_stream_goes_on_over_processes_that_do_not_divide_its_lanes(streamed, before, after):
    alone = streamed(shape(13, 13))
    expected = [sorted(counted_rows(alone, step)) for step in range(8)]
    stopped = [streamed(shape(13, 2, p, before)) for p in range(before)]
    for step in range(4):
        for part in stopped:
            counted_rows(part, step)
    lanes = {}
    for part in stopped:
        lanes |= json.loads(json.dumps(part.state_dict()))["lanes"]
    resumed = [streamed(shape(13, 2, p, after)) for p in range(after)]
    for part in resumed:
        part.load_state_dict({"next_step": 4, "lanes": lanes})
    for step in range(4, 8):
        assert sorted(chain(*(counted_rows(part, step) for part in resumed))) == expected[step]


def test_rows_are_named_so_that_they_can_be_found():
    batches = shuffled(shape(5))
    rows = [row[0] for row in counted_rows(batches, 3)]
    assert [T * name for name in batches.sample_ids(3)] == rows
    batches = mixed(shape(5))
    rows = [row[0] for row in counted_rows(batches, 3)]
    assert [1_000 * folder + T * number for folder, number in batches.sample_ids(3)] == rows


def test_a_streamed_row_is_named_by_unit_and_token(streamed, tiny_tokenizer):
    batches = streamed(shape(4))
    rows = counted_rows(batches, 0)
    for row, (name, token) in zip(rows, batches.sample_ids(0), strict=True):
        partition = next(partition for partition in batches.partitions if partition.name == name)
        assert token == 0  # the first row of its lane
        assert f"the ship {partition.start} " in tiny_tokenizer.decode(row)


def test_filled_rows_have_no_targets_and_leave_the_loss_alone(tiny_model):
    ids = torch.randint(1, 97, (2, T + 1), generator=torch.Generator().manual_seed(0)).numpy()
    plain, filled = as_batch(ids), as_batch(ids, fill_to=5)
    assert torch.equal(filled["input_ids"][:2], plain["input_ids"])
    losses = [tiny_model(**batch, num_items_in_batch=2 * T).loss.item() for batch in (plain, filled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
