"""accelerate's own FSDP2 with the options of accelerate_configs/fsdp2.yaml, in two CPU processes and bf16.

On CPUs accelerate leaves FSDP out without a word. Here its state is made for several CPUs, with gloo between them, and
then says that they are GPUs; so the test looks for DTensors.
"""

import pytest
import torch
from launching import launcher_environment
from toy_runs import TOKENS_PER_STEP, logged_values, toy_flags

# Trains as the script does, and saves what its steps show.
TRAINED = """
import os, sys
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import train_accelerate

losses, gradients = [], []

def train_step(*arguments, **named):
    metrics = train_step_of_the_script(*arguments, **named)
    losses.append(metrics.loss)
    return metrics

def step_unless(skip, optimizer):
    gradients.extend(parameter.grad for group in optimizer.param_groups for parameter in group["params"])
    step_unless_of_the_script(skip, optimizer)

PartialState(cpu=True)
if os.environ["ACCELERATE_USE_FSDP"] == "true":
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
train_step_of_the_script, train_accelerate.train_step = train_accelerate.train_step, train_step
step_unless_of_the_script, train_accelerate.step_unless = train_accelerate.step_unless, step_unless
with patch("modeling_gpt2repro.runtime.precision.cpu_lacks_bf16", return_value=False):
    train_accelerate.main(sys.argv[2:])
if os.environ["RANK"] == "0":
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch.save({"losses": losses, "gradients": local, "sharded": isinstance(gradients[0], DTensor)}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def runs(shards, warm_python, tmp_path_factory):
    """The folder of a run of three steps, each of two micro-batches, by DDP and by FSDP2; and what the steps showed."""
    steps = {"train_tokens": 3 * TOKENS_PER_STEP, "warmup_tokens": 2 * TOKENS_PER_STEP, "eval_steps": 0}
    # A small rate: roundings, which differ between the two, would grow from step to step.
    flags = {
        **steps,
        "learning_rate": 1e-3,
        "save_steps": 0,
        "num_samples": 0,
        "hellaswag": "none",
        "per_device_train_batch_size": 2,
    }
    found = {}
    for name in ("ddp", "fsdp2"):
        folder = tmp_path_factory.mktemp(name)
        environment = launcher_environment("fsdp2.yaml") | {"ACCELERATE_USE_CPU": "true"}
        environment["ACCELERATE_USE_FSDP"] = str(name == "fsdp2").lower()
        # Gradients are not clipped: a factor would hide in what precision they were added up.
        command = ["-c", TRAINED, folder / "seen.pt", *toy_flags(folder / "run", shards, **flags, max_grad_norm=1e9)]
        warm_python.run_together(2, *command, **environment)
        found[name] = folder / "run", torch.load(folder / "seen.pt")
    return found


def test_the_loss_under_fsdp2_is_in_fp32_and_that_of_ddp(runs):
    (ddp, seen_in_ddp), (fsdp2, seen) = runs["ddp"], runs["fsdp2"]
    assert (seen_in_ddp["sharded"], seen["sharded"]) == (False, True)
    assert {loss.dtype for loss in seen["losses"]} == {torch.float32}
    assert len(logged_values(fsdp2)) == 3
    assert logged_values(fsdp2) == pytest.approx(logged_values(ddp), abs=1e-3)
    assert logged_values(fsdp2, "grad_norm") == pytest.approx(logged_values(ddp, "grad_norm"), rel=1e-2)


def test_gradients_under_fsdp2_are_added_up_in_fp32(runs):
    """A sum of bf16 numbers that was computed in fp32 has more digits than a bf16 number holds."""
    _, seen = runs["fsdp2"]
    values = torch.cat([gradient.flatten() for gradient in seen["gradients"]])
    assert values.dtype == torch.float32
    values = values[values != 0]  # those of tokens that do not occur
    assert (values.bfloat16().float() != values).float().mean() > 0.5
