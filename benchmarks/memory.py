"""How much memory a micro-batch takes on a GPU, and which batch fits: reckoned, not measured, and on any computer.

    python -m benchmarks.memory                                 # four sizes of GPT-2, eager and compiled
    python -m benchmarks.memory --presets gpt2-124m --optimizer muon

The step is the one of `train_accelerate.py`: weights, gradients and the optimizer's moments in fp32, bf16 autocast, sdpa
without a mask, and a second micro-batch on top of the gradients of the first. It runs on fake tensors, which have
shapes but no numbers and take no memory.

Eager: every operation runs, a storage counts from the operation that creates it until nothing refers to it, and the
peak is the largest sum. What an operation needs inside itself is not seen.

Compiled: torch.compile does everything up to the kernels: AOTAutograd splits the step into a forward and a backward
graph and decides what is saved between them, inductor fuses operations and orders the kernels. Of that plan the peak is
read (`torch._inductor.memory`): what lives between kernels, saved tensors included. The plan is that for a CPU, whose
inductor fuses much as it does for a GPU but not alike.

Both: the peak is linear in the depth, since every block adds the same, so that one and two blocks are reckoned. The
CPU's autocast is that of a GPU for the operations here, and its flash-attention saves what a GPU's does. A small step
is also measured on this CPU, where the allocator reports every allocation to the profiler.
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import add_to_file, in_fresh_process, result_header
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.outliers import OutlierDetector
from modeling_gpt2repro.training.presets import PRESETS
from train_accelerate import train_step

GPT2_PRESETS = [name for name in PRESETS if name.startswith("gpt2-")]
GPT2_124M = {"n_layer": 12, "n_head": 12, "n_embd": 768}  # what the presets differ from
VOCAB_SIZE = 50257
DEPTHS = (1, 2)  # blocks that are reckoned
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 128, "vocab_size": 1024}  # what is measured, too
MICRO_BATCHES = 2
MODES = ("eager", "compiled")


@dataclass
class BenchmarkArguments:
    presets: list[str] = arg(default_factory=lambda: list(GPT2_PRESETS), help="Presets of train_accelerate.py.")
    batches: list[int] = arg(
        default_factory=lambda: [1, 16, 128], help="Sequences of a micro-batch that are reckoned; lines in between."
    )
    block_size: int = arg(default=1024, minimum=1, help="Tokens of a sequence.")
    optimizer: Literal["adamw", "muon"] = arg(default="adamw", help="Whose moments are counted.")
    gpu_gb: list[int] = arg(default_factory=lambda: [16, 24, 40, 80], help="Memory of the GPUs, in 10^9 bytes.")
    allowance_gb: float = arg(
        default=1.5, minimum=0, help="Kept free for CUDA's context, cuBLAS, NCCL and an allocator's gaps."
    )
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        problems = list(check_limits(self))
        if unknown := [name for name in self.presets if name not in GPT2_PRESETS]:
            problems.append(f"presets ({', '.join(unknown)}) must be of {', '.join(GPT2_PRESETS)}.")
        if len(set(self.batches)) < 2 or min(self.batches) < 1:
            problems.append(f"batches ({self.batches}) must be two or more different numbers from 1, for a line.")
        if min(self.gpu_gb, default=0) <= self.allowance_gb:
            problems.append(f"gpu_gb ({self.gpu_gb}) must be above the allowance_gb ({self.allowance_gb:g}).")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Step:
    """One way to train."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    batch: int
    compiled: bool = False
    optimizer: str = "adamw"


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    result = result_header("memory", argv, args, ("torch", "transformers", "accelerate"))
    result["checks"] = [check(compiled) for compiled in (False, True) if not compiled or shutil.which("c++")]
    for row in result["checks"]:
        print(f"{row['mode']}, a small step on this CPU: {row['reckoned'] / row['measured']:.3f} x what was measured")
    result["rows"] = []
    for preset, mode in product(args.presets, MODES):
        result["rows"].append(reckon_preset(args, preset, mode))
        print(f"{preset}, {mode}: reckoned", flush=True)
    print(table(result))
    if args.output:
        add_to_file(Path(args.output), result)


def check(compiled: bool) -> dict:
    """Bytes of a small step, reckoned and measured."""
    step = Step(**SMALL, batch=4, compiled=compiled)
    reckoned, measured = (in_fresh_process(function, step) for function in (reckoned_peak, measured_peak))
    return {"mode": MODES[compiled], **asdict(step), "reckoned": reckoned, "measured": measured}


def reckon_preset(args: BenchmarkArguments, preset: str, mode: str) -> dict:
    """Bytes of the preset's step by batch."""
    shape = {name: PRESETS[preset].get(name, default) for name, default in GPT2_124M.items()}
    context = {"n_positions": args.block_size, "vocab_size": VOCAB_SIZE, "optimizer": args.optimizer}
    peaks = {}
    for batch in sorted(set(args.batches)):
        step = Step(**shape, **context, batch=batch, compiled=mode == "compiled")
        low, high = (reckoned_peak(replace(step, n_layer=depth)) for depth in DEPTHS)
        peaks[batch] = high + (step.n_layer - DEPTHS[1]) * (high - low) // (DEPTHS[1] - DEPTHS[0])
    return {"preset": preset, "mode": mode, "peak_bytes": peaks}


def reckoned_peak(step: Step) -> int:
    """Largest number of bytes that are alive in a step, found without computing anything."""
    with FakeTensorMode(), kernels_left_out():
        model, optimizer, train_once = build(step)
        train_once()  # compiles, and makes the moments
        with LiveBytes() as memory:
            moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
            for tensor in [*model.parameters(), *moments]:
                memory.add(tensor.untyped_storage())
            train_once()
        return memory.peak


def measured_peak(step: Step) -> int:
    """The same of real steps on this CPU, by its allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        *_, train_once = build(step)
        train_once()
        train_once()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = [event for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    first = min(events, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]  # what an earlier profile has left in the count
    return max(event["args"]["Total Allocated"] for event in events) - before


def build(step: Step) -> tuple[nn.Module, Optimizer, Callable]:
    """The model, its optimizer, and a function that does an optimizer step of two micro-batches."""
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16",
        device_placement=False,  # fake weights cannot be moved
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=MICRO_BATCHES, sync_with_dataloader=False),
    )
    shape = {name: getattr(step, name) for name in SMALL}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=None, eos_token_id=None))
    optimizer = build_optimizer(model, learning_rate=1e-4, optimizer=step.optimizer)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    prepared.train()
    if step.compiled:
        torch._dynamo.reset()
        prepared = torch.compile(prepared)
    detector = OutlierDetector(accelerator.device)
    size = (step.batch, step.n_positions)

    def train_once():
        names = ("input_ids", "shift_labels")
        micro_batches = ({name: torch.randint(step.vocab_size, size) for name in names} for _ in range(MICRO_BATCHES))
        train_step(
            accelerator,
            prepared,
            wrapped,
            micro_batches,
            tokens_per_step=MICRO_BATCHES * step.batch * step.n_positions,
            max_grad_norm=1.0,
            detector=detector,
        )

    return model, optimizer, train_once


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that an operation has created and something still refers to, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages: set[int] = set()
        self.bytes = self.peak = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else nothing would be compiled while it is on

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return result

    def add(self, storage: torch.UntypedStorage):
        """Count a storage, once: views share one."""
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key: int, size: int):
        self.storages.remove(key)
        self.bytes -= size


@contextmanager
def kernels_left_out() -> Iterator[None]:
    """Let inductor write its program for fake tensors: it allocates them, calls no kernel of its own, and frees them."""
    guards = torch._C._dynamo.guards  # allocations that would not be fake
    with (
        config.patch(force_disable_caches=True),  # a later run must not find such a program
        patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None),
        patch.object(guards, "_empty_strided_cpu", lambda *shape: torch.empty_strided(*shape[:2], dtype=shape[2])),
        patch.object(guards, "_reinterpret_tensor", torch.as_strided),
    ):
        yield


def largest_batch(peaks: dict[int, int], room: float) -> int:
    """The largest batch whose peak, on the line between two reckoned ones, is at most `room` bytes; 0 if none."""
    batches = sorted(peaks)
    fitting = [batch for batch in batches if peaks[batch] <= room]
    if not fitting:
        return 0
    # A peak is the largest of several lines, so that one between two of its points is never too low.
    start = min(batches.index(fitting[-1]), len(batches) - 2)
    low, high = batches[start : start + 2]
    return int(low + (room - peaks[low]) / (peaks[high] - peaks[low]) * (high - low))


def table(result: dict) -> str:
    """A Markdown table: GB of the smallest batch, GB of each further sequence, the largest batch of each GPU."""
    settings = result["settings"]
    head = ["preset", "mode", "batch 1 (GB)", "each sequence more (GB)"]
    head += [f"{gigabytes} GB" for gigabytes in settings["gpu_gb"]]
    lines = [head, ["---"] * len(head)]
    for row in result["rows"]:
        peaks = {int(batch): size for batch, size in row["peak_bytes"].items()}
        *_, low, high = sorted(peaks)
        slope = (peaks[high] - peaks[low]) / (high - low)
        rooms = [1e9 * (gigabytes - settings["allowance_gb"]) for gigabytes in settings["gpu_gb"]]
        cells = [row["preset"], row["mode"], f"{peaks[min(peaks)] / 1e9:.1f}", f"{slope / 1e9:.2f}"]
        lines.append(cells + [str(largest_batch(peaks, room) or "-") for room in rooms])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
