"""What a run costs: floating-point operations a token, the device's name, and an honest estimate for slow machines."""

import os
import platform
import time

import torch


def flops_per_token(parameters: int, n_layer: int, n_embd: int, block_size: int) -> int:
    """Forward and backward operations a token: 6 N + 12 L C T (PaLM, appendix B).

    Args:
        parameters: N, without the position embedding.
    """
    return 6 * parameters + 12 * n_layer * n_embd * block_size


def usable_cores() -> int:
    """Cores that this process may run on: fewer than there are under taskset, Slurm or a container's cpuset. More
    threads than that make a small model several times slower."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_lacks_bf16() -> bool:
    """Whether bf16 matrix products are emulated on this CPU: they then take several times as long as fp32 ones.

    Measured, because the instructions have many names. Training took 0.7 times as long as in fp32 with AVX-512 bf16,
    and 8 times with oneDNN restricted to AVX2, on the same processor: both far from the factor of two.
    """
    return matmul_seconds(torch.bfloat16, side=512) > 2 * matmul_seconds(torch.float32, side=512)


def matmul_seconds(dtype: torch.dtype, side: int) -> float:
    """Seconds of a (side, side) matrix product on this CPU, the best of five."""
    a, b = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def device_name(device: torch.device) -> str:
    """A name that a person recognizes: the GPU's, or the processor's with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()} (MPS)"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def estimate_cpu_seconds(flops: float, dtype: torch.dtype) -> float:
    """Seconds that `flops` would take on this CPU at the rate of one measured matrix product: a lower bound."""
    side = 1024
    return flops * matmul_seconds(dtype, side) / (2 * side**3)


def readable_duration(seconds: float) -> str:
    """95 -> '1 min 35 s'; 10_000_000 -> '116 days'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 2 * 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 86400:,.0f} days"
