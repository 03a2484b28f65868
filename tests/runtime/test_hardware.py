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


def test_the_peak_of_a_gpu_is_found_by_a_word_of_its_name(monkeypatch):
    device = torch.device("cuda")
    for name, flops in (("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert hardware.peak_flops.__wrapped__(device) == (flops, "data sheet")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A4000")  # no A40
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: 7e12)
    assert hardware.peak_flops.__wrapped__(device) == (7e12, "measured")
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
