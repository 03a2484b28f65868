"""A compiled run with everything switched on: HellaSwag, samples, validation and checkpoints recompile nothing.

Where torch.compile does not work, the run says so and is not compiled.

pytest -m slow tests/scripts/test_compiled_run.py       # on the CPU; needs a C++ compiler
pytest -m gpu tests/scripts/test_compiled_run.py        # on a CUDA GPU, in bf16
"""

import os

import pytest
import torch
from toy_runs import CPU_FP32, SCRIPT, STEPS, logged_values, toy_flags, train

TWO_STEPS = {"train_tokens": 512, "warmup_tokens": 0, "eval_steps": 0, "save_steps": 0, "hellaswag": "none"}


@pytest.mark.slow
def test_a_compiled_run_on_the_cpu_equals_an_eager_one_and_compiles_once(finished, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    result = train(tmp_path / "run", shards, torch_compile=True)
    assert "compile: inductor" in result.stdout
    assert "Recompiling" not in result.stderr
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(finished[0]), abs=1e-4)
    for name in ("validation_loss", "hellaswag_completion_acc_norm", "hellaswag_lm_eval_acc"):
        assert logged_values(tmp_path / "run", name) == pytest.approx(logged_values(finished[0], name), abs=1e-4), name
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_two_compiled_processes_equal_one_eager_one(finished, shards, warm_python, tmp_path):
    flags = toy_flags(tmp_path / "run", shards, torch_compile=True, per_device_train_batch_size=2)
    result = warm_python.run_together(2, SCRIPT, *flags, **CPU_FP32)[0]
    assert "compile: inductor" in result.stdout
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(finished[0]), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_compiled_bf16_run_on_a_gpu_stays_near_fp32_on_the_cpu_and_resumes(finished, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    hardware = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_MIXED_PRECISION": "bf16"}
    result = train(tmp_path / "run", shards, environment=hardware)
    assert "precision    bf16" in result.stdout
    assert "compile: inductor" in result.stdout
    assert "Recompiling" not in result.stderr
    losses = logged_values(tmp_path / "run")
    assert len(losses) == STEPS
    assert losses == pytest.approx(logged_values(finished[0]), abs=0.1)
    train(tmp_path / "run", shards, environment=hardware, resume_from_checkpoint="latest")
    assert len(logged_values(tmp_path / "run")) == STEPS


def test_a_run_without_a_compiler_says_so_once_and_is_not_compiled(warm_python, shards, tmp_path):
    (tmp_path / "bin").mkdir()
    flags = toy_flags(tmp_path / "run", shards, **TWO_STEPS, torch_compile=True)
    result = warm_python.run(SCRIPT, *flags, **CPU_FP32, PATH=str(tmp_path / "bin"))
    assert result.stdout.count("Nothing is compiled, because torch.compile fails here (No working C++ compiler") == 1
    assert "compile: no" in result.stdout
    assert "compile: inductor" not in result.stdout
    assert len(logged_values(tmp_path / "run")) == 2


@pytest.mark.slow
def test_processes_agree_not_to_compile_if_one_lacks_the_headers(warm_python, shards, tmp_path):
    """Like a second machine with a compiler, but without Python.h. The other one has it and a working compiler."""
    compiler = tmp_path / "g++"
    broken = "x.cpp:1:10: fatal error: Python.h: No such file or directory"
    compiler.write_text(
        f'#!/bin/sh\n[ "$RANK$1" != 1--version ] && [ "$RANK" = 1 ] && echo "{broken}" >&2 && exit 1\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    flags = toy_flags(tmp_path / "run", shards, **TWO_STEPS, torch_compile=True)
    ranks = warm_python.run_together(2, SCRIPT, *flags, **CPU_FP32, PATH=path)
    printed = ranks[0].stdout
    assert f"torch.compile fails here ({broken})" in printed
    assert "compile: no" in printed
    assert len(logged_values(tmp_path / "run")) == 2
