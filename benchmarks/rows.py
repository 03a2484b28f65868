"""Time the opening of 100 M prepared tokens, and batches of 64 rows of 1,024 out of them.

    python -m benchmarks.rows

Each in a fresh process; the file holds random ids and lies in the page cache, as on a machine that trains.
"""

import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches, TokenSequences

TOKENS, BLOCK_SIZE, MICRO_BATCH_ROWS = 100_000_000, 1024, 64
BATCHES = 200


def main():
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train_000000.npy"
        np.save(shard, np.random.default_rng(0).integers(0, 50257, TOKENS, dtype=np.uint16))
        results = [in_fresh_process(measure, shard) for _ in range(5)]
    print(json.dumps({name: float(np.median([result[name] for result in results])) for name in results[0]}, indent=1))


def measure(shard: Path) -> dict[str, float]:
    """Milliseconds to open, with the first epoch's order; megabytes that took; milliseconds a batch."""
    process = psutil.Process()
    np.random.SeedSequence(0)  # numpy imports its generators when they are first used
    before, started = process.memory_info().rss, time.perf_counter()
    rows = TokenSequences([np.lib.format.open_memmap(shard, mode="r")], BLOCK_SIZE)
    batches = ShuffledBatches(rows, BatchConfig(BLOCK_SIZE, 8 * MICRO_BATCH_ROWS, MICRO_BATCH_ROWS, seed=1))
    batches.order.row_numbers(batches.places(0))
    opened, memory = time.perf_counter() - started, process.memory_info().rss - before
    seconds = []
    for step in range(BATCHES // 8):
        micro_batches = batches.micro_batches(step)
        for _ in range(8):
            started = time.perf_counter()
            next(micro_batches)
            seconds.append(time.perf_counter() - started)
    return {"open_ms": 1e3 * opened, "open_mb": memory / 1e6, "batch_ms": 1e3 * float(np.median(seconds))}


def in_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
