"""Time our optimizer step against a plain loop around transformers' own GPT-2.

    python -m benchmarks.training_step                                      # tiny, eager, fp32
    python -m benchmarks.training_step --shape 124m --dtype bf16 --compile  # 124M as it is trained

Ours is what `train_accelerate.py` runs: Accelerator, `prepare`, `build_optimizer`, `train_step`. The other is a loop
written by hand: `GPT2LMHeadModel` without dropout, `torch.autocast`, fused AdamW with the same two groups,
`clip_grad_norm_`. Both start with the same weights and see the same rows, so their losses must agree. They take turns
in one process, and which goes first alternates; the figure is the median of the rounds' ratios, so that a machine that
is now fast and now slow does little harm. Memory is measured in a process each.
"""

import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.hf_argparser import HfArg

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.runtime.command_line import parse_command_line
from modeling_gpt2repro.runtime.hardware import device_name
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.outliers import OutlierDetector
from train_accelerate import train_step

MicroBatches = list[dict[str, torch.Tensor]]
Step = Callable[[MicroBatches], float]  # one optimizer step -> its loss

SHAPES = {
    "toy": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64, "vocab_size": 512},
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 4096},  # the quickstart's
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257},
}
BATCH_ROWS = {"cpu": {"toy": 2, "tiny": 8, "124m": 1}, "cuda": {"toy": 2, "tiny": 64, "124m": 16}}
# GPT-3, table 2.1 and appendix B; constant here, because the schedule costs nothing.
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, MAX_GRAD_NORM = 6e-4, 0.1, (0.9, 0.95), 1e-8, 1.0
WARMUP_STEPS = 2  # compile, first allocations
SEED = 1337
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}  # else a small vocabulary gets a warning for its 50256


@dataclass
class BenchmarkArguments:
    shape: Literal["toy", "tiny", "124m"] = HfArg(default="tiny", help="124m: GPT-2; tiny: the quickstart's model.")
    compile: bool = HfArg(default=False, help="Compile both.")
    dtype: Literal["fp32", "bf16"] = HfArg(default="fp32", help="bf16: autocast, weights stay fp32.")
    rounds: int = HfArg(default=10, help="How often the two take turns.")
    steps: int = HfArg(default=3, help="Optimizer steps a turn.")
    micro_batches: int = HfArg(default=1, help="Micro-batches that a step accumulates.")
    batch_rows: int | None = HfArg(default=None, help="Rows of a micro-batch; by shape and device, if not given.")
    stock_activation: str = HfArg(
        default="gelu_new", help="GPT-2's default, or gelu_pytorch_tanh: the same function in one kernel."
    )
    device: Literal["auto", "cpu", "cuda"] = HfArg(default="auto", help="auto: CUDA where there is one.")
    output: str | None = HfArg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch_rows = BATCH_ROWS[self.device][self.shape] if self.batch_rows is None else self.batch_rows
        small = [name for name in ("rounds", "steps", "micro_batches", "batch_rows") if getattr(self, name) < 1]
        problems = [f"--{name} ({getattr(self, name)}) must be at least 1." for name in small]
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("--device cuda cannot be used here: torch sees no GPU; say cpu.")
        if problems:
            raise ValueError("\n".join(problems))

    def draw_step(self, step: int) -> MicroBatches:
        """The random rows of a step, the same for both."""
        B, T, V = self.batch_rows, SHAPES[self.shape]["n_positions"], SHAPES[self.shape]["vocab_size"]
        generator = torch.Generator().manual_seed(SEED + step)
        ids = torch.randint(V, (self.micro_batches, B, T + 1), generator=generator)
        return [{"input_ids": row[:, :-1].contiguous(), "shift_labels": row[:, 1:].contiguous()} for row in ids]


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    load_before = os.getloadavg()[0]
    memory = {side: in_fresh_process(peak_memory, side, args) for side in ("ours", "stock")}  # while this one is small
    seconds, cpu_seconds, losses = take_turns(args)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.training_step", *(sys.argv[1:] if argv is None else argv)]),
        "settings": {name: value for name, value in asdict(args).items() if name not in ("rounds", "steps", "output")},
        "machine": machine(args.device) | {"load_average_before": load_before},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "accelerate", "numpy")},
        "step_seconds": {side: float(np.median(seconds[side])) / args.steps for side in seconds},
        "stock_over_ours": {"seconds": quartiles(seconds), "cpu_seconds": quartiles(cpu_seconds)},
        "peak_memory_bytes": memory,
        "losses": losses,
        "largest_loss_difference": float(np.abs(np.subtract(losses["ours"], losses["stock"])).max()),
    }
    report(args, result)
    if args.output:
        add_to_file(Path(args.output), result)


def build_step(
    side: str, args: BenchmarkArguments, weights: dict[str, torch.Tensor] | None = None
) -> tuple[nn.Module, Step]:
    """One side's model in training mode and its step, on the device; fresh weights where none are given."""
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32, on both sides
    set_seed(SEED)
    if side == "ours":
        return build_our_step(args)
    config = GPT2Config(
        **SHAPES[args.shape],
        **NO_SPECIAL_TOKENS,
        activation_function=args.stock_activation,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        loss_type="ForCausalLM",  # the loss it takes anyway, after a warning
    )
    model = GPT2LMHeadModel(config)
    if weights:
        model.load_state_dict(weights)
    return build_stock_step(args, model.to(args.device).train())


def build_our_step(args: BenchmarkArguments) -> tuple[nn.Module, Step]:
    """As in `train_accelerate.py`."""
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision="bf16" if args.dtype == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.micro_batches, sync_with_dataloader=False
        ),
        dynamo_backend="inductor" if args.compile else None,
    )
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPES[args.shape], **NO_SPECIAL_TOKENS))
    optimizer = build_optimizer(model, LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    guard = OutlierDetector(accelerator.device)

    def step(micro_batches: MicroBatches) -> float:
        tokens = sum(micro_batch["input_ids"].numel() for micro_batch in micro_batches)
        numbers = train_step(
            accelerator,
            prepared,
            optimizer,
            micro_batches,
            tokens_per_step=tokens,
            max_grad_norm=MAX_GRAD_NORM,
            detector=guard,
        )
        return torch.stack([numbers.loss, numbers.grad_norm]).tolist()[0]

    return model, step


def build_stock_step(args: BenchmarkArguments, module: nn.Module) -> tuple[nn.Module, Step]:
    """A plain loop's step."""
    groups = [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    model = torch.compile(module) if args.compile else module

    def step(micro_batches: MicroBatches) -> float:
        losses = []
        for micro_batch in micro_batches:
            ids = micro_batch["input_ids"].to(args.device, non_blocking=True)
            targets = micro_batch["shift_labels"].to(args.device, non_blocking=True)
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
                # `labels` only switches the loss on; with `shift_labels` beside it nothing is shifted or copied.
                loss = model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        grad_norm = nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        grad_norm.item()
        return torch.stack(losses).mean().item()

    return module, step


def stock_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our weights under stock's names, which are ours, in its shapes: its `Conv1D` is a transposed `Linear`."""
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: w.t() if name.endswith(conv1d) else w for name, w in model.state_dict().items()}


def take_turns(args: BenchmarkArguments) -> tuple[dict, dict, dict]:
    """Seconds of each turn, seconds of processor time in it, and the loss of each step; each by side."""
    model, our_step = build_step("ours", args)
    steps = {"ours": our_step, "stock": build_step("stock", args, stock_weights(model))[1]}
    seconds, cpu_seconds, losses = ({side: [] for side in steps} for _ in range(3))
    for side, step in steps.items():
        losses[side] += [step(args.draw_step(number)) for number in range(WARMUP_STEPS)]
    for number in range(args.rounds):
        first_step = WARMUP_STEPS + number * args.steps
        rows = [args.draw_step(first_step + offset) for offset in range(args.steps)]
        for side in ("ours", "stock") if number % 2 == 0 else ("stock", "ours"):
            started, cpu_started = time.perf_counter(), time.process_time()
            losses[side] += [steps[side](micro_batches) for micro_batches in rows]
            if args.device == "cuda":
                torch.cuda.synchronize()  # the last update
            seconds[side].append(time.perf_counter() - started)
            cpu_seconds[side].append(time.process_time() - cpu_started)
    return seconds, cpu_seconds, losses


def in_fresh_process(function: Callable[..., int], *arguments) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(side: str, args: BenchmarkArguments) -> int:
    """Bytes of weights, gradients, optimizer and activations over a few steps; on a CPU, what the process grew by."""
    before = resident_peak()
    _, step = build_step(side, args)
    for number in range(WARMUP_STEPS + 1):
        step(args.draw_step(number))
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else resident_peak() - before


def resident_peak() -> int:
    """Most bytes that this process has had in memory."""
    if sys.platform == "win32":
        import psutil  # accelerate needs it, so it is there

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): Linux counts in kilobytes, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def quartiles(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of stock's time over ours, round by round: 1.0 and more means that ours is at least as fast."""
    low, median, high = np.quantile(np.divide(seconds["stock"], seconds["ours"]), (0.25, 0.5, 0.75))
    return {"median": float(median), "lower_quartile": float(low), "upper_quartile": float(high)}


def machine(device: str) -> dict[str, str | int]:
    """What ran it; the processor's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    found = {"cpu": cpu, "threads": torch.get_num_threads(), "system": platform.system()}
    return found | ({"gpu": device_name(torch.device(device))} if device == "cuda" else {})


def report(args: BenchmarkArguments, result: dict):
    """A table, and one line to take away."""
    seconds, memory, losses = result["step_seconds"], result["peak_memory_bytes"], result["losses"]
    ratio, cpu_ratio = result["stock_over_ours"]["seconds"], result["stock_over_ours"]["cpu_seconds"]
    tokens = args.micro_batches * args.batch_rows * SHAPES[args.shape]["n_positions"]
    how = f"{args.dtype}, {'compiled' if args.compile else 'eager'}"
    where = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['machine']['threads']} threads"
    print(f"{args.shape}, {how}, {tokens:,} tokens a step, {args.rounds} rounds of {args.steps} steps; {where}\n")
    print(f"{'':6} {'ms a step':>10} {'tokens/s':>10} {'peak MB':>9} {'first loss':>11} {'last loss':>11}")
    for side in ("ours", "stock"):
        print(
            f"{side:6} {1000 * seconds[side]:10.1f} {tokens / seconds[side]:10,.0f} {memory[side] / 1e6:9,.0f} "
            f"{losses[side][0]:11.6f} {losses[side][-1]:11.6f}"
        )
    print(
        f"\nours is {ratio['median']:.3f} times as fast (quartiles {ratio['lower_quartile']:.3f} to "
        f"{ratio['upper_quartile']:.3f}; by processor time {cpu_ratio['median']:.3f}), takes "
        f"{memory['ours'] / memory['stock']:.3f} times the memory; {len(losses['ours'])} losses differ by at most "
        f"{result['largest_loss_difference']:.1e}"
    )


def add_to_file(file: Path, result: dict):
    """Put the result into the file's list, in place of an earlier one with the same settings."""
    results = json.loads(file.read_text()) if file.exists() else []
    results = [old for old in results if old["settings"] != result["settings"]] + [result]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
