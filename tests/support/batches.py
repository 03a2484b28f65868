"""Whole steps of training batches, put together from their micro-batches and processes."""

import torch

from modeling_gpt2repro.data.batches.shuffled import BatchConfig


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
