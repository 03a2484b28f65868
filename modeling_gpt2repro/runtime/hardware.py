"""The machine: its devices and their peak, memory, and what a run costs on it in floating-point operations."""

import os
import platform
import re
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel


def flops_per_token(parameters: int, n_layer: int, n_embd: int, block_size: int) -> int:
    """Floating-point operations of forward and backward per token: 6 N + 12 L C T (PaLM, appendix B).

    Args:
        parameters: N, without the position embedding, which is looked up and not multiplied.
    """
    # A weight takes one multiplication and one addition in the forward pass, and twice that in the backward pass. The
    # second term is attention: C T products for the scores and as many for the mixing, in each layer.
    return 6 * parameters + 12 * n_layer * n_embd * block_size


def flops_and_peak(model: PreTrainedModel, block_size: int, accelerator: Accelerator) -> tuple[int, float | None]:
    """Operations per token of this model, and peak operations per second of all devices; None for CPUs."""
    config = model.config
    parameters = model.num_parameters() - config.n_positions * config.n_embd
    peak = peak_flops(accelerator.device)
    flops = flops_per_token(parameters, config.n_layer, config.n_embd, block_size)
    return flops, peak and peak[0] * accelerator.num_processes


def hardware_record(accelerator: Accelerator) -> dict:
    """What the arguments do not contain, for run.json: device, its peak, processes, precision, machine."""
    return {
        "device": device_name(accelerator.device),
        "peak_flops": peak_flops(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
    }


def usable_cores() -> int:
    """Cores that this process may use; under taskset, Slurm or a container's cpuset, fewer than the machine has.

    More threads than that make a small model several times slower.
    """
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_lacks_bf16() -> bool:
    """Whether this CPU emulates bf16 matrix products, which then take several times as long as in fp32.

    Measured, because the instructions have many names. On one processor, training took 0.7 times as long as in fp32
    with AVX-512 bf16, and 8 times with oneDNN restricted to AVX2: both far from the factor of two used here.
    """
    cpu = torch.device("cpu")
    return measured_flops(cpu, torch.bfloat16, side=512) < 0.5 * measured_flops(cpu, torch.float32, side=512)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device; to a CUDA GPU while the host continues, which only works from pinned memory.

    Elsewhere the host waits. MPS would also take a copy from ordinary memory and return at once, and read it when
    `tensor` may be gone (pytorch#189690): the model would train on garbage, without a word.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def gpu_lacks_bf16() -> bool:
    """Whether this process's NVIDIA GPU emulates bf16, as those before Ampere do (T4, V100, RTX 20xx)."""
    return not torch.cuda.is_bf16_supported(including_emulation=False)


# Dense operations per second in bf16, or in fp16 where there is no bf16, from NVIDIA's data sheets. Only these very
# names: a laptop's GPU, a "Ti" or "D", a vGPU or a MIG slice of a card ("A100-SXM4-40GB MIG 1g.5gb") has other figures.
PEAK_FLOPS = {
    r"GB200": 2500e12,
    r"B200": 2250e12,
    r"GH200 (120GB|480GB|144G HBM3e)": 989e12,
    r"H200|H100 80GB HBM3": 989e12,  # SXM
    r"H200 NVL|H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"(A100|A800)(-SXM4?|-PCIE)-[48]0GB|(A100|A800) 80GB PCIe": 312e12,
    r"A40": 150e12,
    r"A30": 165e12,
    r"RTX A6000": 155e12,
    r"L40S": 362e12,
    r"L40": 181e12,
    r"L4": 121e12,
    r"GeForce RTX 5090": 209.5e12,
    r"GeForce RTX 4090": 165e12,
    r"GeForce RTX 3090": 71e12,
    r"V100S-PCIE-32GB": 130e12,
    r"V100-SXM2-(16|32)GB": 125e12,
    r"V100-PCIE-(16|32)GB": 112e12,
    r"T4": 65e12,
}


@cache
def peak_flops(device: torch.device) -> tuple[float, str] | None:
    """Peak operations per second of the device in 16 bits, and the source of that figure; None for a CPU.

    A GPU that is not in the table is measured by a large matrix product, which comes close to its peak.
    """
    if device.type == "cpu":
        return None
    name = re.sub("^(NVIDIA|Tesla) ", "", device_name(device))
    for known, flops in PEAK_FLOPS.items():
        if re.fullmatch(known, name):
            return flops, "data sheet"
    dtype = torch.float16 if device.type == "cuda" and gpu_lacks_bf16() else torch.bfloat16
    return measured_flops(device, dtype), "measured"


def measured_flops(device: torch.device, dtype: torch.dtype, side: int = 8192) -> float:
    """Operations per second of a (side, side) matrix product, the best of up to ten within a second."""
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the product
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > 1:  # a processor that emulates bf16 takes seconds for a product of 1024 by 1024
            break
    return 2 * side**3 / min(seconds)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 10**9 bytes: on the GPU, or else in main memory."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).max_memory_reserved(device) / 1e9
    if device.type == "hpu":  # reserves the whole device
        return torch.get_device_module(device).max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 1e9
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory(device: torch.device):
    """Let `peak_memory_gb` begin anew. On MPS, and on a CPU under another system than Linux, nothing can."""
    if device.type in ("cuda", "xpu", "hpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def device_name(device: torch.device) -> str:
    """A name that people recognize: that of the GPU, or of the processor with its threads."""
    if device.type in ("cuda", "xpu", "hpu"):
        return torch.get_device_module(device).get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()} (MPS)"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def estimate_cpu_seconds(flops: float, dtype: torch.dtype) -> float:
    """A lower bound of the seconds that `flops` take on this CPU: at the rate of one measured matrix product."""
    return flops / measured_flops(torch.device("cpu"), dtype, side=1024)


def readable_bytes(count: float) -> str:
    """8_100_000 -> '8.1 MB'; 1_500_000_000 -> '1.5 GB'."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def readable_duration(seconds: float) -> str:
    """95 -> '1 min 35 s'; 10_000_000 -> '116 days'."""
    seconds = round(seconds)  # or 179.6 would be 2 min 60 s
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 2 * 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 86400:,.0f} days"
