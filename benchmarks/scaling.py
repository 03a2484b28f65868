"""Check the arithmetic of several processes (benchmarks/roofline.py) with two that talk by gloo on this machine.

    python -m benchmarks.scaling

Measured in the same two processes, in turn: forward and backward passes without DDP; an all-reduce of each of DDP's
buckets, from which the bandwidth follows; and the same passes under DDP, of which all but the last are inside
`no_sync`. What DDP adds should lie between the last bucket alone (everything else hidden behind the backward pass) and
all buckets (nothing hidden). By the processor's clock nothing can be hidden, since sending is counted wherever it is
done; it is for a machine that other programs keep busy, and shows what a step sends, not when. A round counts by its
slower process, and the fastest round is taken, since whatever else the machine does can only add to it.
"""

import gc
import multiprocessing
import os
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import add_to_file, machine_name, result_header, sides_in_turn
from benchmarks.roofline import exposed_seconds, ring_seconds
from benchmarks.training_step import NO_SPECIAL_TOKENS, SEED, SHAPES
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line

PROCESSES = 2
TIMEOUT = timedelta(minutes=10)
BUCKET_MB = 2  # DDP's 25 are more than the whole gradient of a tiny model


@dataclass
class BenchmarkArguments:
    shape: str = arg(default="tiny", choices=("toy", "tiny", "124m"), help="tiny: four layers, 256 wide.")
    tokens: int = arg(default=16, minimum=1, help="Tokens of a micro-batch, which is one sequence.")
    micro_batches: list[int] = arg(
        default_factory=lambda: [1, 2, 4], help="Micro-batches of a step, several in a row: more hide more."
    )
    rounds: int = arg(default=60, minimum=1, help="How often each is measured.")
    clock: Literal["wall", "processor"] = arg(default="wall", help="processor: that of a process and its threads.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        problems = list(check_limits(self))
        if min(self.micro_batches) < 1:
            problems.append(f"--micro_batches {min(self.micro_batches)} must be at least 1.")
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    header = result_header("scaling", argv, args, packages=("torch", "transformers"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(measure, args, rank, port) for rank in range(PROCESSES)]
        by_process = [future.result() for future in futures]
    result = header | summary(args, by_process)
    report(args, result)
    if args.output:
        add_to_file(Path(args.output), result)


def measure(args: BenchmarkArguments, rank: int, port: int) -> dict[str, Any]:
    """In one of the processes: bytes of DDP's buckets, and the seconds of each measurement, by round."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES, timeout=TIMEOUT)
    try:
        return measure_in_group(args, rank)
    finally:
        gc.collect()  # DDP has to go before the group, whose end may otherwise hang: see pretrain/setup.py: shutdown
        dist.destroy_process_group()


def measure_in_group(args: BenchmarkArguments, rank: int) -> dict[str, Any]:
    """The same, once the processes have found each other."""
    alone = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPES[args.shape], **NO_SPECIAL_TOKENS)).train()
    copy = GPT2ReproForCausalLM(alone.config).train()
    ddp = DistributedDataParallel(copy, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(alone.config.vocab_size, (1, args.tokens), generator=generator)
    for model in (alone, ddp, ddp):  # DDP puts its buckets into their order after its first pass
        take_passes(model, ids, 1)
    buckets = [bucket.buffer() for bucket in ddp.reducer._get_zeros_like_grad_buckets()]
    actions = {"all_reduce": lambda: [dist.all_reduce(bucket) for bucket in buckets]}
    for count in args.micro_batches:
        actions[f"passes {count}"] = partial(take_passes, alone, ids, count)
        actions[f"ddp {count}"] = partial(take_passes, ddp, ids, count)
    clock = {"wall": time.perf_counter, "processor": time.process_time}[args.clock]
    seconds = {name: [] for name in actions}
    for number in range(args.rounds):
        for name in sides_in_turn(tuple(actions), number):
            dist.barrier()
            started = clock()
            actions[name]()
            seconds[name].append(clock() - started)
    return {"bucket_bytes": [bucket.nbytes for bucket in buckets], "seconds": seconds}


def take_passes(model: nn.Module, ids: torch.Tensor, count: int):
    """Forward and backward of so many micro-batches, as in a step: gradients are sent in the last one."""
    for number in range(count):
        waits = number < count - 1 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if waits else nullcontext():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def summary(args: BenchmarkArguments, by_process: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest rounds, by the slower process, and for each number of micro-batches what was expected."""
    names = by_process[0]["seconds"]
    fastest = {name: float(np.max([found["seconds"][name] for found in by_process], axis=0).min()) for name in names}
    buckets = by_process[0]["bucket_bytes"]
    bandwidth = ring_seconds(sum(buckets), PROCESSES, bandwidth=1) / fastest["all_reduce"]
    all_reduce, last_bucket = (ring_seconds(size, PROCESSES, bandwidth) for size in (sum(buckets), buckets[-1]))
    steps = []
    for count in args.micro_batches:
        alone, ddp = fastest[f"passes {count}"], fastest[f"ddp {count}"]
        hiding = 2 / 3 * alone / count if args.clock == "wall" else 0
        most = alone / (alone + exposed_seconds(all_reduce, last_bucket, hiding))
        least = alone / (alone + exposed_seconds(all_reduce, last_bucket, hiding=0))
        steps.append({"micro_batches": count, "alone_seconds": alone, "ddp_seconds": ddp, "efficiency": alone / ddp})
        steps[-1] |= {"predicted_if_nothing_is_hidden": least, "predicted_if_the_rest_is_hidden": most}
    return {
        "bucket_bytes": buckets,
        "all_reduce_seconds": fastest["all_reduce"],
        "bytes_per_second": bandwidth,
        "steps": steps,
    }


def report(args: BenchmarkArguments, result: dict[str, Any]):
    """Print a table."""
    sizes = ", ".join(f"{size / 1e6:.1f}" for size in result["bucket_bytes"])
    print(f"{args.shape}, two gloo processes of one thread; {machine_name(result['machine'])}")
    print(f"buckets of {sizes} MB; all-reduce at {result['bytes_per_second'] / 1e6:,.0f} MB/s\n")
    print("micro-batches   alone ms     DDP ms   efficiency   predicted")
    for step in result["steps"]:
        low, high = step["predicted_if_nothing_is_hidden"], step["predicted_if_the_rest_is_hidden"]
        print(
            f"{step['micro_batches']:13} {1e3 * step['alone_seconds']:10.0f} {1e3 * step['ddp_seconds']:10.0f} "
            f"{step['efficiency']:12.2f}   {low:.2f} to {high:.2f}"
        )


if __name__ == "__main__":
    main()
