"""How much memory a micro-batch takes on a GPU, and which batch fits: reckoned on any computer, not seen on a GPU.

    python -m benchmarks.memory --workers 2               # four sizes of GPT-2; half an hour of processor time
    python -m benchmarks.memory --presets gpt2-124m --modes eager            # a minute

What runs is `train_step` of `train_accelerate.py`: weights, gradients and the optimizer's moments in fp32, bf16
autocast, sdpa without a mask, and a second micro-batch on top of the gradients of the first. It runs on fake tensors,
which have a shape but no numbers, so that nothing is computed and no memory taken. A storage counts from the operation
that creates it until nothing refers to it; the peak is the largest sum. Compiled, inductor writes its whole program,
with what is fused, saved for the backward pass and reused; only the kernels are left out.

The loss is the one of training, in chunks without the logits, or the usual one, a linear layer and cross-entropy.

Not seen are the memory that a kernel takes for itself (cuBLAS, flash-attention's fp32 gradient of the queries), CUDA's
context, NCCL, and gaps in the allocator; an allowance is kept for all. The program is that for a CPU: inductor fuses
for a GPU by the same rules, but not always alike. Every block adds the same, so that two and three of them are reckoned
and the others lie on a line, as batches in between do. Small steps are also measured on this CPU, whose allocator
reports every allocation to the profiler.
"""

import json
import multiprocessing
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks.harness import add_to_file, in_fresh_process, result_header
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.runtime import loss as runtime_loss
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line
from modeling_gpt2repro.runtime.loss import CHUNK_TOKENS, ModelWithLoss
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.outliers import OutlierDetector
from modeling_gpt2repro.training.presets import PRESETS
from train_accelerate import train_step

GPT2_PRESETS = [name for name in PRESETS if name.startswith("gpt2-")]
GPT2_124M = {"n_layer": 12, "n_head": 12, "n_embd": 768}  # what the presets differ from
VOCAB_SIZE = 50257
DEPTHS = (2, 3)  # blocks that are reckoned; with one, the peak may be at another moment
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 128, "vocab_size": 1024}  # what is measured, too
MICRO_BATCHES = 2
MODES = ("eager", "compiled")
LOSSES = ("in chunks", "from logits")


@dataclass
class BenchmarkArguments:
    presets: list[str] = arg(default_factory=lambda: list(GPT2_PRESETS), help="Presets of train_accelerate.py.")
    batches: list[int] = arg(
        default_factory=lambda: [1, 4, 16],
        help="Sequences of a micro-batch that are reckoned; between and beyond, a line.",
    )
    modes: list[str] = arg(default_factory=lambda: list(MODES), help="Which of eager and compiled.")
    losses: list[str] = arg(default_factory=lambda: list(LOSSES), help="Which of 'in chunks' and 'from logits'.")
    block_size: int = arg(default=1024, minimum=1, help="Tokens of a sequence.")
    optimizer: Literal["adamw", "muon"] = arg(default="adamw", help="Whose moments are counted.")
    gpu_gb: list[int] = arg(default_factory=lambda: [16, 24, 40, 80], help="Memory of the GPUs, in 10^9 bytes.")
    allowance_gb: float = arg(
        default=1.5, minimum=0, help="Kept free for CUDA's context, cuBLAS, NCCL and an allocator's gaps."
    )
    workers: int = arg(default=1, minimum=1, help="Processes.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        problems = list(check_limits(self))
        for name, known in (("presets", GPT2_PRESETS), ("modes", MODES), ("losses", LOSSES)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                problems.append(f"{name} ({', '.join(unknown)}) must be of {', '.join(known)}.")
        if len(set(self.batches)) < 2 or min(self.batches) < 1:
            problems.append(
                f"batches ({', '.join(map(str, self.batches))}) must be two or more numbers from 1, for a line."
            )
        if min(self.gpu_gb, default=0) <= self.allowance_gb:
            problems.append(
                f"gpu_gb ({', '.join(map(str, self.gpu_gb))}) must be above allowance_gb ({self.allowance_gb:g})."
            )
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
    loss: str = LOSSES[0]
    optimizer: str = "adamw"


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    result = result_header("memory", argv, args, ("torch", "transformers", "accelerate")) | {"rows": [], "checks": []}
    ways = list(product(args.losses, args.presets, args.modes))
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(reckon_preset, [args] * len(ways), *zip(*ways, strict=True)):
            save(args, result, "rows", row)
        for row in pool.map(check, checked_steps(args)):
            save(args, result, "checks", row)
            ratio = row["reckoned"] / row["measured"]
            print(
                f"small, loss {row['loss']}, {row['mode']}: {ratio:.3f} x what this CPU's allocator reports", flush=True
            )
    print(table([result]))


def save(args: BenchmarkArguments, result: dict, name: str, row: dict):
    """Add a row to the result, and write it at once."""
    result[name].append(row)
    if args.output:
        add_to_file(Path(args.output), result)


def checked_steps(args: BenchmarkArguments) -> list[Step]:
    """Small steps; compiled only where kernels can be compiled."""
    modes = [mode for mode in args.modes if mode == "eager" or shutil.which("c++")]
    return [Step(**SMALL, batch=4, compiled=mode == "compiled", loss=loss) for mode in modes for loss in args.losses]


def check(step: Step) -> dict:
    """Bytes of a step, reckoned and measured."""
    names = {"reckoned": reckoned_peak, "measured": measured_peak}
    peaks = {name: in_fresh_process(function, step) for name, function in names.items()}
    return {"mode": MODES[step.compiled], "loss": step.loss, **peaks}


def reckon_preset(args: BenchmarkArguments, loss: str, preset: str, mode: str) -> dict:
    """Bytes of the preset's step by batch."""
    shape = {name: PRESETS[preset].get(name, default) for name, default in GPT2_124M.items()}
    context = {"n_positions": args.block_size, "vocab_size": VOCAB_SIZE, "optimizer": args.optimizer}
    peaks = {}
    for batch in sorted(set(args.batches)):
        step = Step(**shape, **context, batch=batch, compiled=mode == "compiled", loss=loss)
        low, high = (reckoned_peak(replace(step, n_layer=depth)) for depth in DEPTHS)
        peaks[batch] = high + (step.n_layer - DEPTHS[1]) * (high - low) // (DEPTHS[1] - DEPTHS[0])
    print(f"{preset}, loss {loss}, {mode}: " + ", ".join(f"{peak / 1e9:.2f} GB" for peak in peaks.values()), flush=True)
    return {"preset": preset, "loss": loss, "mode": mode, "peak_bytes": peaks}


def reckoned_peak(step: Step) -> int:
    """Largest number of bytes that are alive in a step, found without computing anything."""
    on_gpu = CHUNK_TOKENS["cuda"]
    with FakeTensorMode(), kernels_left_out(), patch.object(runtime_loss, "CHUNK_TOKENS_ELSEWHERE", on_gpu):
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
        *_, train_once = build(step)  # its few tokens are less than a chunk
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
    with_loss = ModelWithLoss if step.loss == "in chunks" else LossFromLogits
    prepared, wrapped = accelerator.prepare(with_loss(model), optimizer)
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


class LossFromLogits(nn.Module):
    """The model with its own loss, which makes all logits at once."""

    def __init__(self, model: GPT2ReproForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, **inputs) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(self.model(**inputs).loss)


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
    """Let inductor write its program for fake tensors: it makes them, calls no kernel of its own, and frees them."""
    guards = torch._C._dynamo.guards  # allocations that would not be fake
    with (
        inductor_config.patch(fx_graph_cache=False, compile_threads=1),  # a later run must not find such a program
        functorch_config.patch(enable_autograd_cache=False),
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


def table(results: list[dict]) -> str:
    """A Markdown table of results for the same batches and GPUs: GB by batch, and the largest batch of each GPU."""
    settings = results[0]["settings"]
    batches = sorted(settings["batches"])
    head = ["preset", "mode", "loss", *(f"batch {batch}" for batch in batches), "one more"]
    head += [f"largest in {gigabytes} GB" for gigabytes in settings["gpu_gb"]]
    lines = [head, ["---"] * len(head)]
    rows = [row for result in results for row in result["rows"]]
    for row in sorted(rows, key=lambda row: (GPT2_PRESETS.index(row["preset"]), MODES.index(row["mode"]))):
        peaks = {int(batch): peak for batch, peak in row["peak_bytes"].items()}  # JSON has made them words
        low, high = batches[-2:]
        more = (peaks[high] - peaks[low]) / (high - low)
        rooms = [1e9 * (gigabytes - settings["allowance_gb"]) for gigabytes in settings["gpu_gb"]]
        cells = [row["preset"], row["mode"], row["loss"], *(f"{peaks[batch] / 1e9:.1f}" for batch in batches)]
        lines.append([*cells, f"{more / 1e9:.2f}", *(str(largest_batch(peaks, room) or "-") for room in rooms)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
