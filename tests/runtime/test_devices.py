"""What is done on devices that the tests do not have: CUDA and Intel's GPUs (xpu), Gaudi (hpu), Apple's (mps)."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from steps import accelerator_for, random_sequences, take_step

from modeling_gpt2repro.evaluation.validation import validation_loss
from modeling_gpt2repro.runtime import accelerator, hardware
from modeling_gpt2repro.training.optimization import build_optimizer


@pytest.fixture
def copies(monkeypatch):
    """Copies to other devices than the CPU, which stay here: (kind of device, from pinned memory, asynchronous)."""
    seen = []
    pinned = []
    move = torch.Tensor.to

    def to(self, *arguments, **options):
        device = next((value for value in arguments if isinstance(value, torch.device)), options.get("device"))
        if device is None or torch.device(device).type == "cpu":
            return move(self, *arguments, **options)
        is_pinned = any(self is tensor for tensor in pinned)
        seen.append((torch.device(device).type, is_pinned, options.get("non_blocking", False)))
        return self.clone()

    def pin_memory(self):
        pinned.append(self.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return seen


KINDS = ["cuda", "mps", "xpu", "hpu"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_copies_asynchronously_to_cuda_alone(tiny_model, copies, kind, monkeypatch):
    prepared = accelerator_for(2)
    model, optimizer = prepared.prepare(tiny_model, build_optimizer(tiny_model, 1e-3))
    monkeypatch.setattr(Accelerator, "device", torch.device(kind))
    take_step(prepared, model, optimizer, random_sequences(4), micro_batch_size=2)
    assert copies == [(kind, kind == "cuda", kind == "cuda")] * 4  # two tensors of two micro-batches


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_copies_asynchronously_to_cuda_alone(tiny_model, copies, kind, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))  # stays here, too
    batch = {"input_ids": random_sequences(2)[:, :-1], "shift_labels": random_sequences(2)[:, 1:]}
    assert validation_loss(tiny_model, [batch], torch.device(kind))[1] == 64
    assert copies == [(kind, kind == "cuda", kind == "cuda")] * 2


@pytest.mark.parametrize(
    ("kind", "peak"), [("cuda", "max_memory_reserved"), ("xpu", "max_memory_reserved"), ("hpu", "max_memory_allocated")]
)
def test_peak_memory_and_name_are_those_of_the_device(kind, peak, monkeypatch):
    functions = {peak: lambda device: 7e9, "get_device_name": lambda device: f"a {device}"}
    modules = {torch.device(kind): SimpleNamespace(**functions)}
    monkeypatch.setattr(torch, "get_device_module", modules.get)  # which keeps what it has found
    assert hardware.peak_memory_gb(torch.device(kind)) == 7
    assert hardware.device_name(torch.device(kind)) == f"a {kind}"


@pytest.mark.parametrize(
    ("kind", "triton", "backend"),
    [
        ("cuda", True, "inductor"),
        ("cuda", False, None),
        ("xpu", True, "inductor"),
        ("xpu", False, None),
        ("hpu", True, None),  # which has a compiler of its own
        ("mps", True, None),
    ],
)
def test_training_is_compiled_where_triton_makes_code_for_the_device(kind, triton, backend, monkeypatch):
    class Started(Exception):
        pass

    def start(**options):
        raise Started(options["dynamo_backend"])

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda name=name: name == kind)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(accelerator, "has_triton", lambda: triton)
    monkeypatch.setattr(accelerator, "Accelerator", start)
    with pytest.raises(Started) as started:
        accelerator.build_accelerator(num_processes=1, deterministic=False)
    assert started.value.args == (backend,)
