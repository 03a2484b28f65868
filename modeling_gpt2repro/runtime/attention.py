"""Which attention implementation is the fastest one for a workload: a table of measurements, and what is here of it.

`python -m benchmarks.attention --output FILE` measures the machine it runs on and writes its rows of the table.
"""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

TABLE_FILE = Path(__file__).with_name("attention.json")
DEFAULT = "sdpa"  # with the kernel that torch chooses
# sdpa with the kernels to try on an NVIDIA GPU, in this order. cuDNN, which torch may try first, is left out of the
# other lists; math takes what the fused kernels cannot, such as fp64.
SDPA_KERNELS = {
    "sdpa_cudnn": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "sdpa_flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "sdpa_flash3": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "sdpa_efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
IMPLEMENTATIONS = ("eager", DEFAULT, *SDPA_KERNELS, "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Workload:
    """What decides which implementation is the fastest: one row of the table."""

    device: str  # see `device_kind`
    dtype: str  # of query, key and value: fp32, bf16 or fp16
    compiled: bool
    head_size: int
    length: int  # tokens of a sequence

    def __str__(self) -> str:
        compiled = "compiled" if self.compiled else "not compiled"
        return f"{self.device}, {self.dtype}, {compiled}, heads of {self.head_size} channels, {self.length:,} tokens"


def device_kind(device: torch.device) -> str:
    """What devices of one kind have in common: 'cuda sm_90', 'cpu avx512 avx512_bf16', or only the type: 'mps'.

    A processor's name is no such thing: virtual machines hide it, and one with the same instructions runs the same
    kernels.
    """
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda sm_{major}{minor}"
    if device.type == "cpu":
        found = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
        bf16 = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if found.get(name)]
        return " ".join(["cpu", torch.backends.cpu.get_cpu_capability().lower(), *bf16])
    return "hip" if device.type == "cuda" else device.type


def fastest_first(workload: Workload) -> tuple[str, ...]:
    """The implementations that were measured to be no slower than sdpa, which is the last; () if none was measured.

    Counts the row of the shortest length that is not shorter: the longer the sequence, the less may be left out of
    sdpa, so beyond the longest measured one nothing is known.
    """
    wanted = asdict(workload)
    length = wanted.pop("length")
    rows = [row for row in read_table() if row["length"] >= length and wanted.items() <= row.items()]
    return tuple(min(rows, key=lambda row: row["length"])["fastest_first"]) if rows else ()


def read_table(file: Path | None = None) -> list[dict]:
    """The rows: the fields of a Workload, and `fastest_first`."""
    file = file or TABLE_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def is_available(implementation: str, device: torch.device) -> bool:
    """Whether this machine has it, without downloading a kernel from the Hub."""
    if implementation in SDPA_KERNELS and (device.type != "cuda" or torch.version.hip is not None):
        return False
    if implementation == "sdpa_flash3":  # torch takes the kernels of the package flash-attn-3
        has_kernels = importlib.util.find_spec("flash_attn_interface") is not None
        return has_kernels and "FA3" in getattr(torch_attention, "list_flash_attention_impls", list)()
    checks = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    return checks.get(implementation, lambda: True)()


@contextmanager
def sdpa_kernels(implementation: str) -> Iterator[None]:
    """Inside the block, sdpa takes the kernels of an implementation in SDPA_KERNELS; of any other, torch's choice."""
    if implementation not in SDPA_KERNELS:
        yield
        return
    if implementation == "sdpa_flash3":
        torch_attention.activate_flash_attention_impl("FA3")
    try:
        with torch_attention.sdpa_kernel(SDPA_KERNELS[implementation], set_priority=True):
            yield
    finally:
        if implementation == "sdpa_flash3":
            torch_attention.restore_flash_attention_impl()
