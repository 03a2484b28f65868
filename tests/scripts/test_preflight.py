"""What a run will take, and the largest batch that fits."""

import math
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from toy_runs import rows_of, train_here

from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.pretrain import batch_size, checkpointing
from modeling_gpt2repro.pretrain.batch_size import apply_batch_size_finder, find_batch_size, largest
from modeling_gpt2repro.pretrain.preflight import StepTimings, disk_bytes, preflight_report, whole_run_seconds
from modeling_gpt2repro.training.arguments import TrainArguments

MEASURED = StepTimings(30.0, 0.3, 0.01, 40.0, 5.0, 1_500_000_000, 60.0)


def test_the_whole_run_is_the_sum_of_its_parts():
    args = TrainArguments()
    parts = whole_run_seconds(args, MEASURED)
    assert parts["training"] == pytest.approx(30 + 0.3 * 19072)
    assert parts["evaluation"] == 40 * 78  # steps 0, 250, ..., 19000, and the end
    assert parts["saving"] == 5 * 20
    assert disk_bytes(args, 10) == 50  # three kept, one being written, the result
    assert disk_bytes(TrainArguments(save_total_limit=0, keep_every=5000), 10) == (20 + 3 + 2) * 10


def test_the_report_says_speed_cost_and_what_is_missing(tmp_path, monkeypatch):
    args = TrainArguments(output_dir=str(tmp_path), preflight=True, price_per_hour=10.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 7_000_000_000))
    report, problems = preflight_report(args, MEASURED, flops_per_token=10**9, peak_flops=312e12 * 8, epochs=1.01)
    hours = sum(whole_run_seconds(args, MEASURED).values()) / 3600
    assert "1,747,627 tokens/s" in report
    assert f"{1747626.7 * 1e9 / (312e12 * 8):.1%} of 2,496 TFLOP/s" in report
    assert f"{10 * hours:,.2f} at 10 an hour" in report
    assert "7.5 GB at most, 7.0 GB free" in report
    assert problems == [
        f"output_dir ({tmp_path}) has 7.0 GB free, and the run needs 7.5 GB: free some space, or keep fewer "
        "checkpoints than --save_total_limit 3."
    ]


def test_a_preflight_leaves_nothing_behind_and_the_run_is_as_without(finished, shards, tmp_path, capsys):
    assert train_here(tmp_path / "run", shards, preflight=True, save_steps=5) == 0
    said = capsys.readouterr().out
    for expected in (
        "without --deterministic a step takes",
        "tokens/s",
        "whole run",
        "a checkpoint",
        "training data",
        "memory",
    ):
        assert expected in said
    assert list((tmp_path / "run").iterdir()) == []
    assert train_here(tmp_path / "run", shards, preflight=True, deterministic=False) == 0
    assert "without --deterministic" not in capsys.readouterr().out
    assert train_here(tmp_path / "run", shards, find_batch_size=True) == 0
    assert rows_of(tmp_path / "run") == pytest.approx(rows_of(finished[0]), abs=1e-5)


def test_a_preflight_of_a_run_that_goes_on_leaves_its_checkpoints(finished, shards, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("step-000030", "model"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert (
        train_here(tmp_path / "run", shards, preflight=True, resume_from_checkpoint="latest", save_total_limit=1) == 0
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_preflight_says_where_the_numbers_are_none(shards, tmp_path, capsys):
    assert train_here(tmp_path / "run", shards, preflight=True, learning_rate=1e20) == 1
    assert "of 26 steps was not usable: try a lower --learning_rate than 1e+20" in capsys.readouterr().out


def test_a_preflight_that_cannot_write_says_so(shards, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing, "save_hub_folder", full)
    assert train_here(tmp_path / "run", shards, preflight=True) == 1
    assert "(No space left on device): free some space there" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 8, 31, 96, 100, 512, 900])
def test_the_largest_that_fits_is_found_to_within_an_eighth(limit):
    tried = []
    found = largest(lambda n: (tried.append(n), n <= limit)[1], 512)
    assert found <= limit
    assert found >= min(512, limit) * 7 / 8 - 1
    assert max(tried) <= 2 * limit  # nothing far beyond is tried
    assert len(tried) == len(set(tried)) <= 16


def test_nothing_fits():
    assert largest(lambda n: False, 512) == 0


def test_the_batch_is_found_where_memory_runs_out_and_weights_stay(tiny_model, monkeypatch, one_sentence):
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    tiny_model.train()

    def run_out(rows):
        def check(module, inputs):
            if len(inputs[0]) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return tiny_model.get_input_embeddings().register_forward_pre_hook(check)

    hook, state = run_out(5), torch.get_rng_state()
    assert find_batch_size(Accelerator(cpu=True), tiny_model, block_size=64, vocab_size=97, largest_useful=64) == 5
    hook.remove()
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, was in zip(tiny_model.parameters(), before, strict=True):
        assert torch.equal(parameter, was)
        assert parameter.grad is None
    assert find_batch_size(Accelerator(cpu=True), tiny_model, block_size=64, vocab_size=97, largest_useful=4) == 4
    run_out(0)
    with pytest.raises(ValueError, match="not even one sequence of block_size 64 fits") as error:
        find_batch_size(Accelerator(cpu=True), tiny_model, block_size=64, vocab_size=97, largest_useful=4)
    one_sentence(error)


class OneLargeParameter(torch.nn.Module):
    """40 MB, which a system takes back as soon as they are free; `note()` is called in each forward pass."""

    def __init__(self, note):
        super().__init__()
        self.weight, self.note = torch.nn.Parameter(torch.ones(10**7)), note

    def forward(self, **inputs):
        self.note()
        return SimpleNamespace(loss=self.weight[0])


def test_two_moments_and_a_gradient_a_parameter_are_held_while_batches_are_tried():
    resident, held = psutil.Process().memory_info, []
    model = OneLargeParameter(lambda: held.append((resident().rss - before) / 40e6))
    before = resident().rss
    find_batch_size(Accelerator(cpu=True), model, block_size=64, vocab_size=97, largest_useful=2)
    assert held == pytest.approx([3, 3], abs=0.4)
    assert (resident().rss - before) / 40e6 == pytest.approx(0, abs=0.4)


def test_on_a_cpu_less_than_half_of_the_free_memory_is_taken(tiny_model, monkeypatch):
    monkeypatch.setattr(batch_size, "peak_memory_gb", lambda device: math.inf)
    assert not batch_size.one_pass_fits(tiny_model, 1, 64, 97, torch.device("cpu"))


@pytest.mark.slow
def test_a_compiled_model_under_ddp_keeps_it_when_its_batch_is_found(tiny_model, monkeypatch):
    """Without DDP's `no_sync` every micro-batch would be sent around."""
    import torch.distributed as dist

    monkeypatch.setattr(batch_size, "find_batch_size", lambda *arguments, **limits: 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(tiny_model)
        compiled = torch.compile(wrapped)
        args = TrainArguments(block_size=64, tokens_per_step=512)
        batches = SimpleNamespace(config=BatchConfig(64, 8, 8, 1))
        apply_batch_size_finder(args, Accelerator(cpu=True), compiled, batches)
        assert compiled._orig_mod is wrapped
        assert compiled.no_sync == wrapped.no_sync
    finally:
        dist.destroy_process_group()
    assert args.per_device_train_batch_size == batches.config.micro_batch_size == 2
