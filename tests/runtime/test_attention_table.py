"""The table of measured attention implementations: what is looked up in it, and what this machine has of it."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from modeling_gpt2repro.runtime import attention
from modeling_gpt2repro.runtime.attention import Workload

GPU = Workload(device="cuda sm_90", dtype="bf16", compiled=True, head_size=64, length=1024)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table((length, implementations), ...) writes the rows of GPU that training will find."""

    def write(*rows):
        file = tmp_path / "attention.json"
        file.write_text(
            json.dumps([asdict(GPU) | {"length": length, "fastest_first": names} for length, names in rows])
        )
        monkeypatch.setattr(attention, "TABLE_FILE", file)

    return write


def test_the_row_of_the_shortest_length_that_is_not_shorter_counts(table):
    table((1024, ["sdpa_cudnn", "sdpa"]), (256, ["eager", "sdpa"]), (512, ["sdpa"]))
    found = {length: attention.fastest_first(replace(GPU, length=length)) for length in (1, 256, 257, 513, 1024, 1025)}
    assert found == {
        1: ("eager", "sdpa"),
        256: ("eager", "sdpa"),
        257: ("sdpa",),
        513: ("sdpa_cudnn", "sdpa"),
        1024: ("sdpa_cudnn", "sdpa"),
        1025: (),  # nobody knows
    }


@pytest.mark.parametrize("other", [{"device": "cuda sm_80"}, {"dtype": "fp32"}, {"compiled": False}, {"head_size": 32}])
def test_another_workload_finds_nothing(table, other):
    table((1024, ["eager", "sdpa"]))
    assert attention.fastest_first(GPU) == ("eager", "sdpa")
    assert attention.fastest_first(replace(GPU, **other)) == ()


def test_without_a_table_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "TABLE_FILE", tmp_path / "missing.json")
    assert attention.fastest_first(GPU) == ()


def test_machines_of_one_kind_have_one_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert attention.device_kind(torch.device("cuda", 3)) == "cuda sm_90"
    assert attention.device_kind(torch.device("mps")) == "mps"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False}, raising=False)
    assert attention.device_kind(torch.device("cpu")) == "cpu avx512 avx512_bf16"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.11
    assert attention.device_kind(torch.device("cpu")) == "cpu avx512"


def test_kernels_of_nvidia_gpus_are_not_available_elsewhere(monkeypatch):
    assert {name for name in attention.IMPLEMENTATIONS if attention.is_available(name, torch.device("cpu"))} >= {"sdpa"}
    for name in attention.SDPA_KERNELS:
        assert not attention.is_available(name, torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", None)
    assert attention.is_available("sdpa_cudnn", torch.device("cuda"))
    assert not attention.is_available("sdpa_flash3", torch.device("cuda"))  # flash-attn-3 is not installed
    assert not attention.is_available("flash_attention_2", torch.device("cuda"))


def priority() -> list[SDPBackend]:
    return torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)


def test_sdpa_takes_the_kernels_of_the_implementation_inside_the_block_only():
    before = priority()
    with attention.sdpa_kernels("sdpa_cudnn"):
        assert priority()[:2] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with attention.sdpa_kernels("sdpa_efficient"):
        assert priority() == [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with attention.sdpa_kernels("eager"):
        assert priority() == before
    assert set(priority()) == set(before)
