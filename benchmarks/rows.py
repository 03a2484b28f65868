"""Time the opening of 100 M prepared tokens, and batches of 64 sequences of 1,024 out of them.

    python -m benchmarks.rows

Each of five times in a fresh process; the median is printed. The file holds random ids and lies in the page cache, as
on a machine that trains.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.harness import in_fresh_process
from modeling_gpt2repro.data.batches.sequences import TokenSequences
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches
from modeling_gpt2repro.data.shards.shard_file import ShardFile

TOKENS = 100_000_000
BLOCK_SIZE = 1024
MICRO_BATCH_SIZE = 64
MICRO_BATCHES_PER_STEP = 8
STEPS = 25
REPETITIONS = 5


def main():
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train_000000.npy"
        np.save(shard, np.random.default_rng(0).integers(0, 50257, TOKENS, dtype=np.uint16))
        results = [in_fresh_process(measure, shard) for _ in range(REPETITIONS)]
    medians = {name: float(np.median([result[name] for result in results])) for name in results[0]}
    print(json.dumps(medians, indent=1))


def measure(shard: Path) -> dict[str, float]:
    """Milliseconds to open with the first step's order, megabytes that this takes, and milliseconds a batch."""
    config = BatchConfig(
        block_size=BLOCK_SIZE,
        sequences_per_step=MICRO_BATCHES_PER_STEP * MICRO_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        seed=1,
    )
    process = psutil.Process()
    np.random.SeedSequence(0)  # numpy imports its generators when they are first used
    memory_before = process.memory_info().rss
    started = time.perf_counter()
    offset = np.lib.format.open_memmap(shard, mode="r").offset
    sequences = TokenSequences([ShardFile(shard, offset, TOKENS)], BLOCK_SIZE)  # as a run reads them
    batches = ShuffledBatches(sequences, config)
    batches.sample_ids(step=0)  # computes the order of the first step
    open_seconds = time.perf_counter() - started
    open_bytes = process.memory_info().rss - memory_before
    batch_seconds = []
    for step in range(STEPS):
        micro_batches = batches.micro_batches(step)
        for _ in range(MICRO_BATCHES_PER_STEP):
            started = time.perf_counter()
            next(micro_batches)
            batch_seconds.append(time.perf_counter() - started)
    return {
        "open_ms": 1e3 * open_seconds,
        "open_mb": open_bytes / 1e6,
        "batch_ms": 1e3 * float(np.median(batch_seconds)),
    }


if __name__ == "__main__":
    main()
