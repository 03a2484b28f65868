"""How often a run reads its data, and the warning where that is too often."""

from collections import Counter

import pytest

from modeling_gpt2repro.data.batches.build import build_mixed_data, build_shuffled_data
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.pretrain import open_data
from modeling_gpt2repro.pretrain.messages import epochs_line, repetition_warning
from modeling_gpt2repro.training.arguments import TrainArguments

CONFIG = BatchConfig(block_size=32, sequences_per_step=8, micro_batch_size=8, seed=1)


def arguments(**given) -> TrainArguments:
    return TrainArguments(block_size=32, tokens_per_step=256, train_tokens=None, **given)


class NoAccelerator:
    """What `set_lengths` asks of the accelerator, on a machine with a GPU."""

    class device:
        type = "cuda"


def test_the_epochs_of_a_mix_are_those_of_each_folder(token_shards, tmp_path):
    """As often as a sequence of the folder comes in all steps, on average."""
    other = tmp_path / "other"
    other.symlink_to(token_shards.folder)
    mix = f"{token_shards.folder}:3,{other}:1"
    data = build_mixed_data({str(token_shards.folder): 0.75, str(other): 0.25}, CONFIG, 320)
    args = arguments(mix=mix, num_train_epochs=2)
    open_data.set_lengths(args, NoAccelerator(), data)
    sequences = len(data.batches.sources[0])
    assert args.train_tokens == 2 * (2 * sequences) * 32  # of both folders together
    seen = Counter(folder for step in range(args.total_steps) for folder, _ in data.batches.sample_ids(step))
    epochs = open_data.epochs_of_run(args, data.batches)
    assert list(epochs.values()) == pytest.approx([seen[0] / sequences, seen[1] / sequences], rel=0.02)
    assert epochs_line(epochs) == f"3.00 of {token_shards.folder}, 1.00 of {other}"


def test_the_epochs_of_a_folder_count_its_sequences(token_shards):
    data = build_shuffled_data(open_shards(token_shards.folder), CONFIG, 1_000)
    args = arguments(shards=str(token_shards.folder), num_train_epochs=1.5)
    open_data.set_lengths(args, NoAccelerator(), data)
    first_steps = [index for step in range(args.total_steps) for index in data.batches.sample_ids(step)]
    assert max(Counter(first_steps).values()) == 2
    epochs = open_data.epochs_of_run(args, data.batches)
    assert epochs == {str(token_shards.folder): len(first_steps) / len(data.batches.sequences)}
    assert epochs_line(epochs) == "1.50 of the training data"


def test_a_run_that_repeats_its_data_more_than_four_times_is_warned():
    assert repetition_warning({"data/a": 4.2, "data/b": 0.1}) == ""
    warning = repetition_warning({"data/a": 126_800.04, "data/b": 4.4, "data/c": 4.6})
    assert "The run reads data/a 126,800.0 times, and data/c 4.6 times." in warning
    assert "give it a smaller share of the mix, or more text" in warning
    assert "give --num_train_epochs 4, or more text" in repetition_warning({"data/a": 4.6})
    assert "arxiv.org/abs/2305.16264" in warning
    assert repetition_warning({}) == ""
    assert epochs_line({}) == "unknown: streamed"
