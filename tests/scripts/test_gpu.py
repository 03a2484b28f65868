"""What a GPU computes is what a CPU computes; each test that can runs on the CPU, too, to show that it can pass.

pytest -m gpu       # these and all other tests that need a CUDA GPU; docs/first-real-run.md says what each one proves
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from patience import PATIENCE_SECONDS
from safetensors.torch import save_file
from steps import accelerator_for, random_sequences, take_step
from toy_runs import CPU_FP32, ROOT, STEPS, WEIGHTS, logged_values, toy_flags, train

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.evaluation.hellaswag.examples import PROTOCOLS
from modeling_gpt2repro.evaluation.hellaswag.score import score_hellaswag
from modeling_gpt2repro.pretrain.batch_size import find_batch_size
from modeling_gpt2repro.runtime.hardware import measured_flops, peak_flops
from modeling_gpt2repro.runtime.loss import ModelWithLoss, linear_cross_entropy
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.optimizer_state import RANDOM_FILE, load_random, random_tensors
from train_accelerate import step_unless

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TWO_GPUS = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]
CUDA = pytest.param("cuda", marks=GPU)
ON_GPU = {"ACCELERATE_USE_CPU": "false", "OMP_NUM_THREADS": "1"}
BF16 = ON_GPU | {"ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps device and precision of the first accelerator; and fp32 products are exact, not TF32."""
    precision = torch.get_float32_matmul_precision()
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_float32_matmul_precision("highest")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_float32_matmul_precision(precision)


# Single steps


def losses_of_five_steps(config: GPT2ReproConfig, device: str, **options) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(config).train()
    accelerator = accelerator_for(2, device, **options)
    model, optimizer = accelerator.prepare(ModelWithLoss(model), build_optimizer(model, 3e-3))
    steps = [take_step(accelerator, model, optimizer, random_sequences(8), 4) for _ in range(5)]
    return [metrics.loss.item() for metrics in steps]


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", None),
        pytest.param("cpu", "inductor", marks=pytest.mark.slow),
        pytest.param("cuda", None, marks=GPU),
        pytest.param("cuda", "inductor", marks=GPU),
    ],
)
def test_steps_in_bf16_eager_and_compiled_are_near_those_in_fp32(tiny_config, device, backend):
    expected = losses_of_five_steps(tiny_config, "cpu")
    found = losses_of_five_steps(tiny_config, device, mixed_precision="bf16", dynamo_backend=backend)
    assert found == pytest.approx(expected, abs=0.02)
    assert expected[0] - expected[4] > 0.2  # so that weights that are not updated would be seen


@pytest.mark.parametrize("device", [CUDA])
def test_steps_in_fp32_on_a_gpu_are_those_on_the_cpu(tiny_config, device):
    assert losses_of_five_steps(tiny_config, device) == pytest.approx(
        losses_of_five_steps(tiny_config, "cpu"), abs=1e-4
    )


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_loss_in_chunks_is_cross_entropy(device, dtype, tolerance):
    hidden_states, weight, labels = loss_problem(tokens=5000, channels=64, ids=301, device=device)
    results = []
    for loss, enabled in ((linear_cross_entropy, dtype != torch.float32), (cross_entropy, False)):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            total = loss(hidden_states, weight, labels)
        results.append([total, *torch.autograd.grad(total, (hidden_states, weight))])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("device", [CUDA])
def test_the_loss_in_chunks_takes_less_than_half_of_the_memory(device):
    problem = loss_problem(tokens=16_384, channels=768, ids=50_257, device=device)
    peaks = []
    for loss in (linear_cross_entropy, cross_entropy):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast(device, dtype=torch.bfloat16):
            total = loss(*problem)
        torch.autograd.grad(total, problem[:2])
        del total
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 0.5 * peaks[1]


def loss_problem(tokens: int, channels: int, ids: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(tokens, channels, generator=generator).to(device).requires_grad_()
    weight = torch.randn(ids, channels, generator=generator).to(device).requires_grad_()
    labels = torch.randint(ids, (tokens,), generator=generator)
    labels[::7] = -100
    return hidden_states, weight, labels.to(device)


def cross_entropy(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden_states, weight)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_fused_adamw_leaves_everything_as_it_is_where_a_step_is_skipped(device):
    weights = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    results = []
    for skips in ([False, False], [False, True, False]):
        parameter = torch.nn.Parameter(weights.to(device, copy=True))
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, fused=True)
        for skip in skips:
            parameter.grad = parameter.detach() ** 2 if not skip else torch.full_like(parameter, torch.nan)
            step_unless(torch.tensor(skip, device=device), optimizer)
        results.append([parameter.detach(), *optimizer.state[parameter].values()])
    for plain, with_a_skip in zip(*results, strict=True):  # weights, both moments, and the count of steps
        assert torch.equal(plain, with_a_skip)


@pytest.mark.parametrize("device", [CUDA])
def test_a_step_waits_for_nothing_on_the_gpu(tiny_config, device):
    model = GPT2ReproForCausalLM(tiny_config).train()
    accelerator = accelerator_for(2, device, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(ModelWithLoss(model), build_optimizer(model, 1e-3))
    take_step(accelerator, model, optimizer, random_sequences(8), 4)  # allocates the moments
    torch.cuda.set_sync_debug_mode("error")  # whatever reads a number from the GPU raises
    try:
        metrics = take_step(accelerator, model, optimizer, random_sequences(8), 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.loss.item() > 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_random_states_come_back_from_a_checkpoint(device, tmp_path):
    accelerator = accelerator_for(1, device)
    save_file(random_tensors(accelerator), tmp_path / RANDOM_FILE)
    drawn = torch.rand(5, device=device)
    assert not torch.equal(torch.rand(5, device=device), drawn)
    load_random(tmp_path, accelerator)
    assert torch.equal(torch.rand(5, device=device), drawn)


@pytest.mark.parametrize("device", [CUDA])
def test_the_batch_that_is_found_fits_into_a_small_part_of_the_gpu(tiny_config, device):
    limit = 2e9 / torch.cuda.get_device_properties(0).total_memory
    model = GPT2ReproForCausalLM(tiny_config).train()
    accelerator = accelerator_for(1, device)
    model = accelerator.prepare(ModelWithLoss(model))
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        size = find_batch_size(accelerator, model, block_size=32, vocab_size=97, largest_useful=2**20)
        assert 64 < size < 2**18  # a sequence takes at least 32 tokens x 3 layers x 64 channels x 4 bytes
        optimizer = accelerator.prepare(build_optimizer(model, 1e-3))
        take_step(accelerator, model, optimizer, random_sequences(size), size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Inference


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_hellaswag_scores_are_those_of_the_cpu_in_fp32(
    make_model, hellaswag_tokenizer, hellaswag_rows, device, dtype, tolerance
):
    def scores(model):
        found = score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows, PROTOCOLS)
        return np.array([example.log_likelihoods for example in found])

    expected = scores(make_model("ours", len(hellaswag_tokenizer)))
    found = scores(make_model("ours", len(hellaswag_tokenizer)).to(device, dtype))
    np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_greedy_text_is_that_of_the_cpu_with_and_without_cache(make_model, device):
    ids = torch.arange(1, 9)[None]
    expected = make_model("ours", 97).generate(ids, max_new_tokens=30, do_sample=False, use_cache=False)
    model = make_model("ours", 97).to(device)
    for use_cache in (True, False):
        found = model.generate(ids.to(device), max_new_tokens=30, do_sample=False, use_cache=use_cache)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_sdpa_computes_what_attention_written_out_computes(device, dtype, tolerance):
    """Heads of 64 channels, as the kernels of a GPU like them."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 128, "n_positions": 128, "vocab_size": 97}
    ids = torch.randint(97, (2, 128), generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
        model = GPT2ReproForCausalLM(config).to(device, dtype)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        results.append((output.logits.float(), model.transformer.h[0].attn.c_attn.weight.grad.float()))
    for written_out, found in zip(*results, strict=True):
        assert (found - written_out).norm() < tolerance * written_out.norm()


@pytest.mark.parametrize("device", [CUDA])
def test_the_peak_of_this_gpu_is_one_that_it_comes_near_to(device):
    peak, source = peak_flops(torch.device(device, 0))
    measured = measured_flops(torch.device(device, 0), torch.bfloat16)
    assert 0.3 * peak < measured < 1.1 * peak, (torch.cuda.get_device_name(), source)


# Whole runs


@pytest.mark.parametrize(
    "environment", [pytest.param(CPU_FP32, marks=pytest.mark.slow, id="cpu"), pytest.param(BF16, marks=GPU, id="gpu")]
)
def test_deterministic_runs_and_a_resumed_one_are_equal_in_every_bit(shards, tmp_path, environment):
    flags = {"deterministic": True, "num_samples": 0, "environment": environment}
    train(tmp_path / "one", shards, **flags)
    train(tmp_path / "two", shards, **flags)
    shutil.copytree(tmp_path / "one", tmp_path / "resumed", ignore=shutil.ignore_patterns("step-000030", "model"))
    resumed = train(tmp_path / "resumed", shards, **flags, resume_from_checkpoint="latest")
    assert "resuming from step 20" in resumed.stdout
    for other in ("two", "resumed"):
        assert logged_values(tmp_path / other) == logged_values(tmp_path / "one"), other
        assert (tmp_path / other / WEIGHTS).read_bytes() == (tmp_path / "one" / WEIGHTS).read_bytes(), other


@pytest.mark.parametrize("environment", [pytest.param(ON_GPU | {"ACCELERATE_MIXED_PRECISION": "fp16"}, marks=GPU)])
def test_a_run_in_fp16_stays_near_fp32_and_resumes(finished, shards, tmp_path, environment):
    result = train(tmp_path / "run", shards, environment=environment)
    assert re.search(r"precision +fp16", result.stdout)
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(finished[0]), abs=0.1)
    for folder in ("model", "step-000030"):
        shutil.rmtree(tmp_path / "run" / folder)
    resumed = train(tmp_path / "run", shards, environment=environment, resume_from_checkpoint="latest")
    assert "resuming from step 20" in resumed.stdout
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(finished[0]), abs=0.1)


@pytest.mark.parametrize("environment", [pytest.param(BF16, marks=TWO_GPUS)])
def test_two_gpus_equal_one_process_on_the_cpu(finished, shards, tmp_path, environment):
    result = train(tmp_path / "run", shards, processes=2, environment=environment)
    assert "2 processes" in result.stdout
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(finished[0]), abs=0.1)


@pytest.mark.parametrize("config", [pytest.param("fsdp2.yaml", marks=TWO_GPUS)])
def test_two_gpus_that_share_the_weights_equal_one_process_on_the_cpu(finished, shards, tmp_path, config):
    launch = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / config]
    words = [sys.executable, *launch, "--num_processes", "2", ROOT / "train_accelerate.py"]
    flags = toy_flags(tmp_path / "run", shards)
    subprocess.run([*map(str, words), *flags], check=True, timeout=PATIENCE_SECONDS)
    assert len(logged_values(tmp_path / "run")) == STEPS
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(finished[0]), abs=0.1)
