"""What the machine can do: emulated bf16, and the peak of a GPU by its name."""

import itertools
import platform

import pytest
import torch

from modeling_gpt2repro.runtime import hardware


def test_emulated_bf16_is_noticed(warm_python):
    if platform.machine() not in ("x86_64", "AMD64") or hardware.cpu_lacks_bf16():
        pytest.skip("needs an x86 processor with bf16 instructions, which oneDNN can be made to leave unused")
    program = f"import runpy; print(runpy.run_path({hardware.__file__!r})['cpu_lacks_bf16']())"
    result = warm_python.run("-c", program, ONEDNN_MAX_CPU_ISA="AVX2")  # which is read at the first product
    assert result.stdout == "True\n", result.stderr


@pytest.fixture
def peak_of(monkeypatch):
    """peak_of(name of a GPU, has_bf16) -> its peak and where that comes from; 7e12 if it is measured."""

    def peak(name: str, has_bf16: bool = True) -> tuple[float, str]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
        rates = {torch.bfloat16 if has_bf16 else torch.float16: 7e12}
        monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: rates[dtype])
        return hardware.peak_flops.__wrapped__(torch.device("cuda"))

    return peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),  # as older drivers name it
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 4090", 165),
        ("GeForce RTX 3090", 71),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla V100S-PCIE-32GB", 130),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(peak_of, name, teraflops):
    assert peak_of(name) == (teraflops * 1e12, "data sheet")


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H200 MIG 1g.18gb",
        "GRID A100-10C",
        "NVIDIA A40-8Q",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA RTX A4000",
        "NVIDIA A10G",
    ],
)
def test_a_part_or_a_relative_of_a_known_gpu_is_measured(peak_of, name):
    assert peak_of(name) == (7e12, "measured")


def test_a_gpu_without_bf16_is_measured_in_fp16_and_a_cpu_has_no_peak(peak_of):
    assert peak_of("NVIDIA GeForce RTX 2080 Ti", has_bf16=False) == (7e12, "measured")
    assert hardware.peak_flops.__wrapped__(torch.device("cpu")) is None


@pytest.mark.parametrize(("seconds_each", "most"), [(0.001, 10), (3, 1)])
def test_a_slow_processor_is_measured_by_fewer_products(seconds_each, most, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock) * seconds_each)
    flops = hardware.measured_flops(torch.device("cpu"), torch.float32, side=8)
    assert flops == pytest.approx(2 * 8**3 / seconds_each)
    assert next(clock) == 2 * most  # two looks at the clock for each product


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (95, "1 min 35 s"),
        (179.6, "3 min 0 s"),
        (3599.7, "1 h 0 min"),
        (1e7, "116 days"),
    ],
)
def test_a_duration_never_has_sixty_seconds(seconds, text):
    assert hardware.readable_duration(seconds) == text
