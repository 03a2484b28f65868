"""Time forward and backward of each attention implementation, and note the fastest ones where training looks them up.

    python -m benchmarks.attention                                              # prints
    python -m benchmarks.attention --output benchmarks/results/attention_cpu.json  # and adds this machine to the table

Timed is what `GPT2ReproAttention` does between its two matmuls: from q, k and v side by side (B, T, 3C) to the heads
side by side (B, T, C), with the mask that the model builds for the implementation, under autocast as in training,
compiled and not. All take turns, and a figure is the median of the rounds' ratios to sdpa. Each must give sdpa's output
and gradient. `--output` also writes the choices into `modeling_gpt2repro/runtime/attention.json`, where
`--attn_implementation auto` looks up those of machines of the same kind.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.harness import add_to_file, machine_name, quartiles, result_header, sides_in_turn, timed
from modeling_gpt2repro.configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproAttention, attention_masking, eager_attention_forward
from modeling_gpt2repro.runtime.accelerator import enable_determinism
from modeling_gpt2repro.runtime.attention import (
    DEFAULT,
    SDPA_KERNELS,
    TABLE_FILE,
    Workload,
    device_kind,
    is_available,
    read_table,
    sdpa_kernels,
)
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line
from modeling_gpt2repro.runtime.hardware import cpu_lacks_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CANDIDATES = ("eager", *SDPA_KERNELS, "flash_attention_2", "flash_attention_3")  # flex has no backward pass on a CPU
MIN_GAIN = 1.05  # less is not worth another default, and within what the same code differs by from day to day
# Of the largest entry. The gradients pass through a softmax in bf16's 8 bits, or in TF32's 11 on a GPU.
MAX_DIFFERENCE = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}
WIDTHS = {"cpu": 256, "cuda": 768}
TOKENS = {"cpu": 2048, "cuda": 16384}  # of a micro-batch
WARMUP_CALLS = 2  # compile, first allocations

Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]  # -> output and gradient, (B, T, C) and (B, T, 3C)


@dataclass
class BenchmarkArguments:
    lengths: list[int] = arg(
        default_factory=lambda: [64, 128, 256, 512, 1024], help="Tokens of a sequence, several in a row."
    )
    head_sizes: list[int] = arg(default_factory=lambda: [64, 32], help="Channels of a head, several in a row.")
    width: int | None = arg(default=None, minimum=1, help="Channels of all heads; by device, if not given.")
    tokens: int | None = arg(default=None, minimum=1, help="Tokens of a micro-batch; by device, if not given.")
    rounds: int = arg(default=9, minimum=1, help="How often the implementations take turns.")
    device: Literal["auto", "cpu", "cuda"] = arg(default="auto", help="auto: CUDA if there is a GPU.")
    output: str | None = arg(default=None, help="Add the result to this JSON file, and its choices to --table.")
    table: str | None = arg(default=None, help="Table for the choices. If not given, the one that training reads.")

    def __post_init__(self):
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.width = WIDTHS[self.device] if self.width is None else self.width
        self.tokens = TOKENS[self.device] if self.tokens is None else self.tokens
        problems = list(check_limits(self))
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("--device cuda cannot be used here: torch sees no GPU; give cpu.")
        problems += [
            f"head_sizes ({size}) must divide the width ({self.width})."
            for size in self.head_sizes
            if size < 1 or self.width % size
        ]
        problems += [f"lengths ({length}) must be at least 1." for length in self.lengths if length < 1]
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    header = result_header("attention", argv, args, ("torch", "transformers"), device=args.device)
    device = torch.device(args.device)
    header["settings"]["kind"] = device_kind(device)
    print(f"{machine_name(header['machine'])} ({device_kind(device)}): sdpa's time over that of each\n")
    torch.set_float32_matmul_precision("high")  # as in training
    if device.type == "cpu":
        enable_determinism()  # the default in training
    rows = []
    for workload in workloads(args, device):
        rows.append(asdict(workload) | measure(workload, args, device))
        ratios = ", ".join(f"{name} {found['median']:.2f}" for name, found in rows[-1]["sdpa_over"].items())
        print(f"{workload}: sdpa {1000 * rows[-1]['sdpa_seconds']:.2f} ms; {ratios}", flush=True)
        if args.output:  # each time, so that an interruption loses one row
            add_to_file(Path(args.output), header | {"rows": rows})
            write_table(Path(args.table or TABLE_FILE), rows)


def workloads(args: BenchmarkArguments, device: torch.device) -> Iterator[Workload]:
    """All that is measured on this device, first in the 16 bits that training computes in there."""
    if device.type == "cpu":
        dtypes = ["fp32"] if cpu_lacks_bf16() else ["bf16", "fp32"]
    else:
        dtypes = ["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16", "fp32"]
    for dtype, compiled, head_size, length in product(dtypes, (False, True), args.head_sizes, args.lengths):
        yield Workload(device_kind(device), dtype, compiled, head_size, length)


def measure(workload: Workload, args: BenchmarkArguments, device: torch.device) -> dict:
    """Seconds of sdpa, its time over that of each other implementation, those that failed, and the table's order."""
    torch.compiler.reset()
    names = [name for name in CANDIDATES if is_available(name, device)]
    if workload.dtype == "fp32":
        names = [name for name in names if "flash" not in name]  # 16 bits only
    calls, outputs, failed = {}, {}, {}
    for name in (DEFAULT, *names):
        try:
            with sdpa_kernels(name):
                call = build_call(name, workload, args, device)
                outputs[name] = [call() for _ in range(WARMUP_CALLS)][-1]
        except (ImportError, NotImplementedError, RuntimeError) as error:  # a kernel that this device or size has not
            if name == DEFAULT:
                raise
            failed[name] = str(error).splitlines()[0]
            print(f"{name} is left out: {failed[name]}")
            continue
        check_equal(name, outputs[name], outputs[DEFAULT], workload)
        calls[name] = call
    names = [name for name in names if name in calls]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(args.rounds):
        for name in sides_in_turn(tuple(calls), number):
            with sdpa_kernels(name), timed(seconds[name], cpu_seconds[name]):
                calls[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
    # Other programs disturb processor time less; of several threads it is the sum.
    taken = cpu_seconds if device.type == "cpu" and torch.get_num_threads() == 1 else seconds
    sdpa_over = {name: quartiles({"ours": taken[name], DEFAULT: taken[DEFAULT]}) for name in names}
    return {
        "sdpa_seconds": float(np.median(taken[DEFAULT])),
        "sdpa_over": sdpa_over,
        "failed": failed,
        "fastest_first": fastest_first(sdpa_over),
    }


def fastest_first(sdpa_over: dict[str, dict[str, float]]) -> list[str]:
    """{'a': 1.2, 'b': 1.4, 'c': 0.9} -> ['b', 'a', 'sdpa']: those that are faster than sdpa beyond doubt, and sdpa."""
    faster = [name for name, found in sdpa_over.items() if found["median"] >= MIN_GAIN and found["lower_quartile"] > 1]
    return [*sorted(faster, key=lambda name: -sdpa_over[name]["median"]), DEFAULT]


def build_call(name: str, workload: Workload, args: BenchmarkArguments, device: torch.device) -> Call:
    """One layer's attention, forward and backward, on the same random numbers for each implementation."""
    T, D = workload.length, workload.head_size
    B, C = max(1, args.tokens // T), args.width
    dtype = DTYPES[workload.dtype]
    implementation = DEFAULT if name in SDPA_KERNELS else name
    ids = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
    config = GPT2ReproConfig(
        n_layer=1, n_head=C // D, n_embd=C, n_positions=T, attn_implementation=implementation, **ids
    )
    module = GPT2ReproAttention(config, layer_idx=0)
    # Of fp32 embeddings, as under autocast.
    hidden_states = torch.zeros(B, T, C, device=device)
    mask = attention_masking(config, hidden_states, None, {}, attention_mask=None, past_key_values=None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    generator = torch.Generator().manual_seed(T)
    qkv = torch.randn(B, T, 3 * C, generator=generator).to(device, dtype).requires_grad_()
    grad_output = torch.randn(B, T, C, generator=generator).to(device, dtype)

    def forward(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.view(B, T, -1, D).transpose(1, 2) for x in qkv.split(C, dim=-1))  # (B, H, T, D) each
        attn_output, _ = attention(module, q, k, v, mask["attention_mask"], scaling=module.scaling)
        return attn_output.reshape(B, T, C)  # (B, T, H, D) -> (B, T, C)

    run = torch.compile(forward) if workload.compiled else forward

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        qkv.grad = None
        with torch.autocast(device.type, dtype=dtype, enabled=workload.dtype != "fp32"):
            output = run(qkv)
        output.backward(grad_output)
        return output.detach(), qkv.grad

    return call


def check_equal(
    name: str,
    found: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    workload: Workload,
):
    """Raise ValueError if an implementation computes something else than sdpa: its time would mean nothing."""
    for what, ours, theirs in zip(("output", "gradient"), found, expected, strict=True):
        difference = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        if not difference <= MAX_DIFFERENCE[workload.dtype]:
            raise ValueError(f"{name} and sdpa differ by {difference:.1e} of the largest {what} ({workload}).")


def write_table(file: Path, rows: list[dict]):
    """Put the choices of `rows` into the table, in place of those of the same workloads; a row a line."""
    names = list(Workload.__dataclass_fields__)
    table = {tuple(row[name] for name in names): row["fastest_first"] for row in [*read_table(file), *rows]}
    lines = [
        json.dumps(dict(zip(names, key, strict=True)) | {"fastest_first": found})
        for key, found in sorted(table.items())
    ]
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
