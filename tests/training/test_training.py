"""The training room: schedule, optimizer, step, metrics, hardware; the command line is in tests/runtime."""

import itertools
import json
import math
import platform
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_gpt2repro.data.batches.sequences import TokenSequences, as_batch
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches
from modeling_gpt2repro.pretrain import messages as words
from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import MetricsLog, StepMetrics
from modeling_gpt2repro.runs.read import read_metrics
from modeling_gpt2repro.runtime import hardware
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.optimization import build_optimizer, learning_rate_at, set_learning_rate
from modeling_gpt2repro.training.outliers import OutlierDetector
from modeling_gpt2repro.training.presets import PRESETS
from modeling_gpt2repro.training.state import TimedIterator, is_due
from train_accelerate import train_step


def accelerator_for(micro_batches: int) -> Accelerator:
    plugin = GradientAccumulationPlugin(num_steps=micro_batches, sync_with_dataloader=False)
    return Accelerator(cpu=True, gradient_accumulation_plugin=plugin)


def random_rows(count: int, length: int = 33, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def step_of(accelerator, model, optimizer, rows, size, max_grad_norm=1.0, guard=None) -> StepMetrics:
    """A step over `rows` in micro-batches of `size`; the last one is filled up as in the data room."""
    micro_batches = [as_batch(part.numpy(), pad_to=size) for part in rows.split(size)]
    guard = guard or OutlierDetector(torch.device("cpu"))
    tokens = rows[:, 1:].numel()
    limits = {"tokens_per_step": tokens, "max_grad_norm": max_grad_norm, "detector": guard}
    return train_step(accelerator, model, optimizer, micro_batches, **limits)


def test_the_rate_warms_up_linearly_and_falls_to_a_tenth():
    rates = [learning_rate_at(step, 19073, 715, 6e-4, 0.1) for step in range(19074)]
    assert rates[0] == pytest.approx(6e-4 / 715)
    assert rates[714] == rates[715] == 6e-4 == max(rates)
    assert rates[(715 + 19073) // 2] == pytest.approx(3.3e-4)
    assert rates[-1] == pytest.approx(6e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[715:]))


def test_only_matrices_and_embeddings_are_decayed(tiny_model):
    optimizer = build_optimizer(tiny_model, 1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in tiny_model.named_parameters():
        matrix = name.endswith("weight") and ".ln_" not in name
        assert decay[id(parameter)] == (0.1 if matrix else 0.0), name
    assert len(decay) == len(list(tiny_model.parameters()))


def test_the_optimizer_is_fused_where_torch_can(tiny_model):
    assert build_optimizer(tiny_model, 1e-3).defaults["fused"]
    assert not build_optimizer(tiny_model.to("meta"), 1e-3).defaults["fused"]


@pytest.mark.parametrize("small", [2, 3, 5])
def test_micro_batches_of_two_three_or_five_rows_equal_one_of_eight(tiny_config, small):
    from modeling_gpt2repro import GPT2ReproForCausalLM

    results = []
    for size in (8, small):
        torch.manual_seed(0)
        model = GPT2ReproForCausalLM(tiny_config)
        accelerator = accelerator_for(-(-8 // size))
        model, optimizer = accelerator.prepare(model, build_optimizer(model, 1e-2))
        steps = [step_of(accelerator, model, optimizer, random_rows(8, seed=s), size)[:2] for s in range(3)]
        results.append((torch.tensor(steps), [parameter.detach().clone() for parameter in model.parameters()]))
    (one, one_weights), (four, four_weights) = results
    torch.testing.assert_close(one, four, atol=1e-5, rtol=0)
    for a, b in zip(one_weights, four_weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_gradient_is_clipped_and_the_norm_is_that_before_clipping(tiny_model):
    accelerator = accelerator_for(1)
    model, optimizer = accelerator.prepare(tiny_model, torch.optim.SGD(tiny_model.parameters(), lr=1.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _, norm, _ = step_of(accelerator, model, optimizer, random_rows(4), 4, max_grad_norm=0.01)
    moved = math.sqrt(sum(((a - b) ** 2).sum().item() for a, b in zip(before, model.parameters(), strict=True)))
    assert norm > 0.1
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_one_batch_is_learned_by_heart(tiny_model):
    accelerator = accelerator_for(1)
    model, optimizer = accelerator.prepare(tiny_model.train(), build_optimizer(tiny_model, 3e-3, weight_decay=0.0))
    losses = [step_of(accelerator, model, optimizer, random_rows(4), 4).loss.item() for _ in range(200)]
    assert losses[0] == pytest.approx(math.log(97), abs=0.1)
    assert losses[-1] < 0.1


class CopiesBetweenDevices(TorchDispatchMode):
    """Notes each: shape, and whether the host goes on meanwhile."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        tensors = [value for value in (result, *arguments) if isinstance(value, torch.Tensor)]
        if "copy" in str(operation) and len({tensor.device for tensor in tensors}) > 1:
            self.seen.append((tuple(result.shape), (options or {}).get("non_blocking", False)))
        return result


@pytest.fixture
def run_without_numbers(tiny_config, tmp_path, monkeypatch):
    """run(skip_outliers) on torch's meta device, which holds no numbers: reading one, so waiting, is an error."""
    from modeling_gpt2repro import GPT2ReproForCausalLM

    meta, tiny_config.n_layer = torch.device("meta"), 1
    monkeypatch.setattr(Accelerator, "device", meta)
    # Kernels only tell the shape of their result there, the fused optimizer's too, which torch does not offer.
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])

    def run(skip_outliers: bool) -> SimpleNamespace:
        with meta:
            model = GPT2ReproForCausalLM(tiny_config).train()
        accelerator = accelerator_for(2)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, False])
        rows = TokenSequences([np.arange(1000) % 97], 32)
        return SimpleNamespace(
            args=TrainArguments(block_size=32, tokens_per_step=4 * 32),
            accelerator=accelerator,
            data=SimpleNamespace(batches=ShuffledBatches(rows, BatchConfig(32, 4, 2, seed=1))),
            model=model,
            optimizer=optimizer,
            detector=OutlierDetector(meta, skip_outliers),
            logger=RunLogger(
                accelerator,
                MetricsLog(tmp_path, None, enabled=True),
                total_steps=100,
                tokens_per_step=4 * 32,
                logging_steps=2,
            ),
        )

    return run


@pytest.mark.parametrize("skip_outliers", [False, True])
def test_the_device_is_waited_for_at_logging_steps_only(run_without_numbers, skip_outliers, monkeypatch):
    run, reads = run_without_numbers(skip_outliers), []

    def read(numbers: torch.Tensor) -> list[list[float]]:
        reads.append(tuple(numbers.shape))
        return [[3.0, 1.0, 0.0]] * len(numbers)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    with CopiesBetweenDevices() as copies:
        for step in range(1, 6):
            take_step_as_main_does(run, step)
            assert reads == [(2, 3)] * (step // 2)  # loss, norm and whether it was skipped, of two steps at once
    assert copies.seen == [((2, 32), True)] * (5 * 2 * 2)  # steps, micro-batches of each, tensors of those


def take_step_as_main_does(run: SimpleNamespace, step: int):
    """The body of the loop in train_accelerate.py."""
    learning_rate = learning_rate_at(step - 1, 100, 10, 1e-3, 0.1)
    set_learning_rate(run.optimizer, learning_rate)
    micro_batches = TimedIterator(run.data.batches.micro_batches(step - 1))
    limits = {"tokens_per_step": 4 * 32, "max_grad_norm": 1.0, "detector": run.detector}
    metrics = train_step(run.accelerator, run.model, run.optimizer, micro_batches, **limits)
    run.logger.log_step(step, metrics, learning_rate, data_seconds=micro_batches.seconds)


def test_due_at_the_start_and_at_multiples():
    assert [step for step in range(7) if is_due(step, 3)] == [0, 3, 6]
    assert [step for step in range(7) if is_due(step, 0)] == [0]


def test_metrics_read_as_if_the_run_had_never_stopped(tmp_path):
    log = MetricsLog(tmp_path, resumed_step=None, enabled=True)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": float(step)})
    log = MetricsLog(tmp_path, resumed_step=2, enabled=True)
    log.append({"step": 3, "loss": 33.0})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 33.0]


def test_an_evaluation_at_the_resumed_step_counts_once_and_a_cut_line_costs_only_itself(tmp_path):
    log = MetricsLog(tmp_path, resumed_step=None, enabled=True)
    log.append({"step": 0, "validation_loss": 9.0})
    log.append({"step": 1, "loss": 8.0})
    log.append({"step": 1, "validation_loss": 7.0})
    with open(log.path, "a") as file:
        file.write('{"step": 2, "lo')
    log = MetricsLog(tmp_path, resumed_step=1, enabled=True)
    log.append({"step": 1, "validation_loss": 7.0})
    log.append({"step": 2, "loss": 6.0})
    rows = read_metrics(tmp_path)
    assert [row["validation_loss"] for row in rows if "validation_loss" in row] == [9.0, 7.0]
    assert [row["loss"] for row in rows if "loss" in row] == [8.0, 6.0]


def test_the_defaults_are_the_lectures_run():
    args = TrainArguments()
    assert (args.total_steps, args.warmup_steps, args.sequences_per_step) == (19073, 715, 512)
    assert args.tokens_per_step == 524288


def test_emulated_bf16_is_noticed(warm_python):
    if platform.machine() not in ("x86_64", "AMD64") or hardware.cpu_lacks_bf16():
        pytest.skip("needs an x86 processor with bf16 instructions, which can be told to do without them")
    program = f"import runpy; print(runpy.run_path({hardware.__file__!r})['cpu_lacks_bf16']())"
    result = warm_python.run("-c", program, ONEDNN_MAX_CPU_ISA="AVX2")  # which is read at the first product
    assert result.stdout == "True\n", result.stderr


def test_the_run_record_can_be_read_back(tmp_path):
    from modeling_gpt2repro.runs.config import make_writable, write_run_config

    args = TrainArguments(output_dir=str(tmp_path / "run"))
    make_writable(tmp_path / "run")
    write_run_config(tmp_path / "run", asdict(args), hardware={"processes": 1}, data_fingerprint={"seed": 1})
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"]["train_tokens"] == 10_000_000_000
    assert record["versions"]["torch"] == torch.__version__


def test_mfu_is_the_share_of_the_peak_that_training_alone_reaches(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 104.0])  # begun; an evaluation until 100; two steps until 104
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    logger = RunLogger(
        Accelerator(cpu=True),
        MetricsLog(tmp_path, None, enabled=True),
        total_steps=2,
        tokens_per_step=1_000,
        logging_steps=2,
        flops_per_token=50,
        peak_flops=1e6,
    )
    with logger.untimed():
        pass
    for step in (1, 2):
        metrics = StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False))
        logger.log_step(step, metrics, 1e-3, data_seconds=0.0)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert {(row["step_seconds"], row["tokens_per_second"], row["mfu"]) for row in rows} == {(2.0, 500.0, 0.025)}
    assert logger.train_seconds == 4.0


def test_a_gpu_is_known_by_a_word_of_its_name(monkeypatch):
    device = torch.device("cuda")
    for name, flops in (("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12)):
        monkeypatch.setattr(hardware, "device_name", lambda device, name=name: name)
        assert hardware.peak_flops.__wrapped__(device) == (flops, "data sheet")
    monkeypatch.setattr(hardware, "device_name", lambda device: "NVIDIA RTX A4000")  # no A40
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: 7e12)
    assert hardware.peak_flops.__wrapped__(device) == (7e12, "measured")
    assert hardware.peak_flops.__wrapped__(torch.device("cpu")) is None


def test_a_slow_cpu_is_told_of_by_the_size_of_the_model_that_is_trained(monkeypatch):
    said, operations = [], []
    monkeypatch.setattr(words, "estimate_cpu_seconds", lambda flops, dtype: (operations.append(flops), flops / 1e9)[1])
    on_cpu = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", print=said.append)
    for preset in ("quickstart", "gpt2-124m"):
        words.warn_of_slow_cpu(TrainArguments(preset=preset, **PRESETS[preset]), on_cpu)
    # 6 operations a parameter and token, and those of attention: 12 * layers * width * context.
    assert operations[0] == pytest.approx(2_867_200 * (6 * 675_328 + 12 * 2 * 128 * 128), rel=0.03)
    assert operations[1] == pytest.approx(1e10 * (6 * 124_439_808 + 12 * 12 * 768 * 1024), rel=0.03)
    assert "Fewer --train_tokens take less time." in said[0]
    assert "--preset quickstart trains a small GPT-2 in minutes" in said[1]
