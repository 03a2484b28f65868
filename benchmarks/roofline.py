"""What limits a training step of GPT-2 124M on a GPU, and how several GPUs share it: arithmetic, nothing is measured.

    python -m benchmarks.roofline          # prints the tables of docs/performance.md
    python -m benchmarks.roofline --write  # writes them into the page

A part of a step takes as long as its operations at the rate that such kernels reach, or as long as its bytes at the
rate that memory reaches. Parts follow each other, so their times add up. The shares of the data sheet's peak are
assumptions, which the published speed of llm.c on an A100 bears out; everything else is counted.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reports.page import Markers, write_into_page
from modeling_gpt2repro.runtime.command_line import arg, parse_command_line

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"

# GPT-2 124M: L layers of C channels, V ids, T tokens of context.
L, C, V, T = 12, 768, 50257, 1024
PARAMETERS = V * C + T * C + L * (12 * C**2 + 13 * C) + 2 * C
TOKENS_PER_STEP = 524_288
MICRO_BATCH_TOKENS = 32 * T

GEMM_SHARE = 0.75  # of the peak, that large matrix products reach
ATTENTION_SHARE = 0.4  # that flash-attention reaches with heads of 64 channels, forward and backward
MEMORY_SHARE = 0.85  # of the memory's bandwidth, that fused elementwise kernels reach
NETWORK_SHARE = 0.75  # of a link's bandwidth, that NCCL reaches with messages of 25 MB and more
HOP_SECONDS = 10e-6  # of one message between machines
LAST_BUCKET = V * C / PARAMETERS  # of the gradient: the tied embedding's is complete when the backward pass ends


@dataclass(frozen=True)
class Gpu:
    """By its data sheet: dense bf16 operations, bytes of memory, and bytes of NVLink in one direction, per second."""

    name: str
    flops: float
    memory: float
    nvlink: float


GPUS = (
    Gpu("A100 80 GB", 312e12, 2.039e12, 300e9),
    Gpu("H100 SXM", 989e12, 3.35e12, 450e9),
    Gpu("H200", 989e12, 4.8e12, 450e9),
)
# Bytes a second that leave a machine of eight GPUs.
NETWORKS = {"8 x 400 Gb/s": 400e9, "1 x 100 Gb/s": 12.5e9}


@dataclass(frozen=True)
class Part:
    """A part of a step, per token: floating-point operations, or bytes that pass through the GPU's memory."""

    name: str
    flops: float = 0
    bytes: float = 0
    share: float = MEMORY_SHARE

    def seconds(self, gpu: Gpu) -> float:
        """Per token."""
        return self.flops / (self.share * gpu.flops) if self.flops else self.bytes / (self.share * gpu.memory)


def parts_of_a_step() -> list[Part]:
    """What a compiled step under bf16 autocast does for a token, forward and backward.

    A weight takes two operations forward and four backward. Attention has two products forward and, because flash
    recomputes the scores, five backward, each of 2 C T operations of which causality leaves half.

    Bytes: the residual stream is fp32 (4 C bytes), what goes into and comes out of products is bf16 (2 C, 8 C in the
    MLP). Forward, a layer adds and normalizes twice (reads 4 C + 2 C, writes 4 C + 2 C) and has one GELU (reads and
    writes 8 C). Backward, it has GELU (16 C read, 8 C written), two norms (10 C read, 6 C written each) and the sums
    for four biases (18 C read). The loss reads the bf16 logits twice and writes their gradient once, in place.
    """
    layer_bytes = 2 * 12 * C + 16 * C + 24 * C + 2 * 16 * C + 18 * C
    casts = (4 + 2) + (2 + 4 + 4)  # weights to bf16; gradients from bf16 and added up
    adamw = 16 + 12 + 12  # weight, gradient and moments read, three of them written; the norm, and clipping
    return [
        Part("matrix products of the blocks", flops=6 * L * 12 * C**2, share=GEMM_SHARE),
        Part("matrix products of the head", flops=6 * V * C, share=GEMM_SHARE),
        Part("attention", flops=7 * L * C * T, share=ATTENTION_SHARE),
        Part("elementwise: norms, residuals, GELU, biases", bytes=L * layer_bytes),
        Part("loss, in chunks of bf16 logits", bytes=3 * 2 * V),
        Part("casts of weights, sums of gradients", bytes=casts * PARAMETERS / MICRO_BATCH_TOKENS),
        Part("clipping and AdamW", bytes=adamw * PARAMETERS / TOKENS_PER_STEP),
    ]


def seconds_per_token(gpu: Gpu) -> float:
    """Of one GPU that takes the whole step."""
    return sum(part.seconds(gpu) for part in parts_of_a_step())


def mfu(gpu: Gpu, tokens_per_second: float) -> float:
    """As it is logged: 6 N + 12 L C T operations a token, N without the position embedding (PaLM, appendix B)."""
    return tokens_per_second * (6 * (PARAMETERS - T * C) + 12 * L * C * T) / gpu.flops


def ring_seconds(size: float, processes: int, bandwidth: float, hop_seconds: float = 0.0) -> float:
    """All-reduce of `size` bytes: each process sends 2 (n - 1) / n of them; latency is that of a tree, there and back.

    >>> ring_seconds(8.0, 2, bandwidth=4.0)
    2.0
    """
    return 2 * (processes - 1) / processes * size / bandwidth + 2 * math.log2(processes) * hop_seconds


def exposed_seconds(all_reduce: float, last_bucket: float, hiding: float) -> float:
    """What DDP's all-reduce adds to a step.

    Buckets are sent while the backward pass of the last micro-batch computes the rest, `hiding` seconds; the last
    bucket is complete when it ends, so nothing hides that one.

    >>> exposed_seconds(all_reduce=10.0, last_bucket=2.0, hiding=5.0)
    5.0
    >>> exposed_seconds(all_reduce=10.0, last_bucket=2.0, hiding=50.0)
    2.0
    """
    return max(all_reduce - hiding, last_bucket)


def efficiency(gpu: Gpu, gpus: int, network: float, tokens_per_step: int = TOKENS_PER_STEP, gradient: int = 4) -> float:
    """Speed of `gpus` GPUs in machines of eight, divided by `gpus` times that of one.

    Args:
        network: Bytes a second that leave a machine.
        gradient: Bytes of a gradient on the wire: 4 in fp32, 2 in bf16.
    """
    *per_token, optimizer = [part.seconds(gpu) for part in parts_of_a_step()]
    tokens = tokens_per_step // gpus
    compute = tokens * sum(per_token)
    update = optimizer * TOKENS_PER_STEP  # of all weights, on every GPU, whatever its share of the tokens
    hiding = 2 / 3 * min(tokens, MICRO_BATCH_TOKENS) * sum(per_token)  # the backward pass of the last micro-batch

    def all_reduce(size: float) -> float:
        within = ring_seconds(size, min(gpus, 8), NETWORK_SHARE * gpu.nvlink)
        machines = gpus // 8
        between = ring_seconds(size, machines, NETWORK_SHARE * network, HOP_SECONDS) if machines > 1 else 0
        return max(within, between)  # rings on the way into and out of a machine work at the same time

    size = gradient * PARAMETERS
    exposed = exposed_seconds(all_reduce(size), all_reduce(LAST_BUCKET * size), hiding)
    alone = tokens_per_step * sum(per_token) + update
    return alone / (gpus * (compute + update + exposed))


def roofline_table() -> str:
    """Parts of a step: MFLOP and kB a token, and nanoseconds a token on each GPU."""
    lines = [
        f"| part | MFLOP a token | kB a token | {' | '.join(f'ns on {gpu.name}' for gpu in GPUS)} |",
        "|---" * (3 + len(GPUS)) + "|",
    ]
    for part in parts_of_a_step():
        counted = f"{part.flops / 1e6:.0f} | " if part.flops else f" | {part.bytes / 1e3:,.0f}"
        times = " | ".join(f"{1e9 * part.seconds(gpu):,.0f}" for gpu in GPUS)
        lines.append(f"| {part.name} | {counted} | {times} |")
    totals = [seconds_per_token(gpu) for gpu in GPUS]
    lines.append(f"| sum | | | {' | '.join(f'{1e9 * total:,.0f}' for total in totals)} |")
    lines.append(f"| tokens/s | | | {' | '.join(f'{1 / total / 1e3:,.0f} k' for total in totals)} |")
    shares = " | ".join(f"{mfu(gpu, 1 / total):.0%}" for gpu, total in zip(GPUS, totals, strict=True))
    lines.append(f"| MFU | | | {shares} |")
    return "\n".join(lines) + "\n"


def scaling_table() -> str:
    """Efficiency of H100s, by network, tokens of a step and bytes of a gradient."""
    gpu = GPUS[1]
    lines = [
        "| GPUs | tokens of a step | between machines | gradients in fp32 | in bf16 |",
        "|---|---|---|---|---|",
    ]
    rows = [(8, TOKENS_PER_STEP, "one machine")]
    for gpus, tokens in ((64, TOKENS_PER_STEP), (512, TOKENS_PER_STEP), (512, 8 * TOKENS_PER_STEP)):
        rows += [(gpus, tokens, network) for network in NETWORKS]
    for gpus, tokens, network in rows:
        found = [efficiency(gpu, gpus, NETWORKS.get(network, math.inf), tokens, size) for size in (4, 2)]
        lines.append(f"| {gpus} | {tokens:,} | {network} | {found[0]:.2f} | {found[1]:.2f} |")
    return "\n".join(lines) + "\n"


TABLES = {"roofline": roofline_table, "scaling": scaling_table}


@dataclass
class RooflineArguments:
    write: bool = arg(default=False, help="Write the tables into docs/performance.md.")


def main(argv: list[str] | None = None):
    args = parse_command_line(RooflineArguments, argv, description=__doc__)
    if args.write:
        for name, table in TABLES.items():
            write_into_page(PAGE, markers(name), table())
    for table in TABLES.values():
        print(table())


def markers(name: str) -> Markers:
    """The lines around a table in the page."""
    return f"<!-- {name}: python -m benchmarks.roofline --write -->\n", f"<!-- end of {name} -->"


if __name__ == "__main__":
    main()
