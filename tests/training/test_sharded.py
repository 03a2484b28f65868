"""A whole run with parameters sharded over two processes: its step, its evaluation, its checkpoints.

Sharded by torch's own `fully_shard`, because accelerate's FSDP runs on GPUs only.
"""

import shutil

import pytest
from toy_runs import CPU_FP32, logged_values, toy_flags, train_here

SHARDED = """
import sys
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import train_accelerate

prepare = Accelerator.prepare

def sharded(self, model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    for block in model.model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    parameters = dict(model.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    head = model.model.lm_head
    assert head.weight is model.model.transformer.wte.weight
    for group, of_group in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parameters[name] for name in of_group]
    print("sharded:", tuple(head.weight.to_local().shape), "of", tuple(head.weight.shape), flush=True)
    return model, prepare(self, optimizer)

Accelerator.prepare = sharded
train_accelerate.main(sys.argv[1:])
"""


@pytest.mark.parametrize("recipe", ["lecture", "muon"])
def test_a_sharded_run_equals_an_unsharded_one_and_each_resumes_from_the_others_checkpoint(
    finished, finished_muon, shards, warm_python, tmp_path, recipe
):
    unsharded = finished_muon if recipe == "muon" else finished[0]
    resumed = {"recipe": recipe, "resume_from_checkpoint": "latest"}
    later = shutil.ignore_patterns("step-000020", "step-000030", "model")
    shutil.copytree(unsharded, tmp_path / "run", ignore=later)
    flags = toy_flags(tmp_path / "run", shards, per_device_train_batch_size=2, **resumed)
    result = warm_python.run_together(2, "-c", SHARDED, *flags, **CPU_FP32)[0]
    assert "sharded: (150, 32) of (300, 32)" in result.stdout
    assert "resuming from step 10" in result.stdout
    for name in ("loss", "grad_norm", "validation_loss", "hellaswag_completion_acc_norm"):
        assert logged_values(tmp_path / "run", name) == pytest.approx(logged_values(unsharded, name), abs=1e-5), name

    shutil.rmtree(tmp_path / "run" / "step-000030")
    assert train_here(tmp_path / "run", shards, **resumed) == 0
    assert len(logged_values(tmp_path / "run")) == 30
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(unsharded), abs=1e-5)
