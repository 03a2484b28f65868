"""The precision that a run takes on GPUs and CPUs with and without bf16, and the loss scale of fp16."""

import math

import pytest
import torch
from accelerate import Accelerator

from modeling_gpt2repro.runtime import accelerator as build
from modeling_gpt2repro.runtime import precision
from modeling_gpt2repro.runtime.precision import check_same_precision, choose_precision, update_loss_scale


@pytest.fixture
def launch(monkeypatch):
    """launch(mixed precision, has_bf16, on_cpu, fsdp): what is chosen then, and the sentence on it."""

    def choose(asked: str | None, has_bf16: bool, on_cpu: bool = False, fsdp: bool = False) -> tuple[str, str]:
        if asked is None:
            monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        else:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", str(fsdp).lower())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: not on_cpu)
        # A T4 says True here, and computes without its tensor cores.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
        )
        monkeypatch.setattr(precision, "cpu_lacks_bf16", lambda: not has_bf16)
        return choose_precision(on_cpu)

    return choose


@pytest.mark.parametrize(
    ("asked", "has_bf16", "on_cpu", "taken", "sentence"),
    [
        ("bf16", True, False, "bf16", ""),
        ("bf16", False, False, "fp16", "This GPU only emulates bf16, so fp16 with a loss scale is taken."),
        ("fp16", False, False, "fp16", ""),
        ("fp16", True, False, "fp16", ""),
        ("no", True, False, "no", ""),
        ("no", False, False, "no", ""),
        ("bf16", True, True, "bf16", ""),
        ("bf16", False, True, "no", "bf16 is much slower than fp32 on this processor, so fp32 is taken."),
        (None, False, True, "no", ""),
    ],
)
def test_the_launchers_precision_is_taken_where_the_device_has_it(launch, asked, has_bf16, on_cpu, taken, sentence):
    assert launch(asked, has_bf16, on_cpu) == (taken, sentence)


@pytest.mark.parametrize(("has_bf16", "faster", "is_tf32"), [(True, "bf16", True), (False, "fp16", False)])
def test_without_a_launcher_a_gpu_trains_in_fp32_and_says_how_to_train_faster(launch, has_bf16, faster, is_tf32):
    taken, sentence = launch(None, has_bf16)
    assert taken == "no"
    assert ("TF32" in sentence) == is_tf32
    assert f"set ACCELERATE_MIXED_PRECISION={faster} or" in sentence
    assert f"accelerate launch --mixed_precision {faster} train_accelerate.py" in sentence


@pytest.mark.parametrize(
    ("asked", "on_cpu", "advice"), [("fp16", True, "bf16 or no"), ("bf16", False, "no, or without FSDP")]
)
def test_fp16_is_refused_on_a_cpu_and_in_shards(launch, asked, on_cpu, advice, one_sentence):
    with pytest.raises(ValueError, match=f"mixed precision fp16.*--mixed_precision {advice}") as error:
        launch(asked, has_bf16=False, on_cpu=on_cpu, fsdp=not on_cpu)
    one_sentence(error)


def test_the_accelerator_gets_what_is_chosen_and_the_sentence_is_printed(launch, monkeypatch, capsys):
    """As on a T4, up to where accelerate would look for it."""
    given = {}

    def accelerator_on_cpu(**options) -> Accelerator:
        given.update(options)
        return Accelerator(cpu=True, mixed_precision="no")

    sentence = launch("bf16", has_bf16=False)[1]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(build, "Accelerator", accelerator_on_cpu)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    build.build_accelerator(num_processes=1, torch_compile=False, deterministic=False)
    assert given["mixed_precision"] == "fp16"
    assert capsys.readouterr().out == f"{sentence}\n"


def test_processes_in_different_precisions_are_refused(monkeypatch, one_sentence):
    """A T4 beside an A100: the loss scale of the one would be in the gradients of the other."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    check_same_precision(accelerator)
    monkeypatch.setattr(precision, "gather_object", lambda own: [*own, "fp16"])
    with pytest.raises(ValueError, match=r"different precisions \(fp16, no\)") as error:
        check_same_precision(accelerator)
    one_sentence(error)


def take_steps(scaler, gradients: list[float], loss: float = 1.0) -> list[tuple[float, bool]]:
    """Scale and overflow of steps with such gradients, before they are scaled."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter])
    seen = []
    for gradient in gradients:
        scaler.scale(gradient * parameter).backward()
        scaler.unscale_(optimizer)
        scale, overflowed = update_loss_scale(scaler, torch.tensor(loss))
        seen.append((scale.item(), bool(overflowed)))
        optimizer.zero_grad()
    return seen


def test_the_scale_halves_after_an_overflow_and_doubles_after_enough_steps_without():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    seen = take_steps(scaler, [1.0, math.inf, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0])
    assert seen == [*((8, False), (8, True), (4, False), (4, False), (4, False), (8, False), (8, True), (4, False))]


def test_what_no_smaller_scale_would_mend_is_no_overflow():
    """So that such steps count, and a run that has diverged ends."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert take_steps(scaler, [math.inf] * 4) == [(4, True), (2, True), (1, False), (0.5, False)]
    for bad_loss in (math.inf, math.nan):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        assert take_steps(scaler, [math.nan, 1.0], bad_loss) == [(4, False), (2, False)]
