"""Time the opening of 100 M prepared tokens, and batches of 64 sequences of 1,024 out of them.

    python -m benchmarks.rows

Each of five times in a fresh process; the figures are medians. The file holds random ids and lies in the page cache, as
on a machine that trains.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.harness import add_to_file, in_fresh_process, machine_name, result_header
from modeling_gpt2repro.data.batches.sequences import TokenSequences
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches
from modeling_gpt2repro.data.shards.shard_file import ShardFile
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line

BLOCK_SIZE = 1024
MICRO_BATCH_SIZE = 64
MICRO_BATCHES_PER_STEP = 8
STEPS = 25
FEWEST_TOKENS = BLOCK_SIZE * MICRO_BATCH_SIZE * MICRO_BATCHES_PER_STEP + 1  # of one step


@dataclass
class BenchmarkArguments:
    tokens: int = arg(default=100_000_000, minimum=FEWEST_TOKENS, help="Prepared tokens.")
    rounds: int = arg(default=5, minimum=1, help="How often they are opened.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        if problems := list(check_limits(self)):
            raise ValueError("\n".join(problems))


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    header = result_header("rows", argv, args, ("numpy", "torch"))
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train_000000.npy"
        np.save(shard, np.random.default_rng(0).integers(0, 50257, args.tokens, dtype=np.uint16))
        results = [in_fresh_process(measure, shard, args.tokens) for _ in range(args.rounds)]
    result = header | {name: float(np.median([result[name] for result in results])) for name in results[0]}
    print(
        f"{args.tokens:,} tokens open in {result['open_ms']:.0f} ms and {result['open_mb']:.0f} MB; a batch of "
        f"{MICRO_BATCH_SIZE} x {BLOCK_SIZE} takes {result['batch_ms']:.2f} ms; {machine_name(result['machine'])}"
    )
    if args.output:
        add_to_file(Path(args.output), result)


def measure(shard: Path, tokens: int) -> dict[str, float]:
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
    sequences = TokenSequences([ShardFile(shard, offset, tokens)], BLOCK_SIZE)  # as a run reads them
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
