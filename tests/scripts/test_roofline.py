"""The arithmetic of docs/performance.md: operations as PyTorch counts them, and its tables as the script makes them."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import ROOT

from benchmarks import roofline, scaling
from benchmarks.reports.page import split_page
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


def test_the_operations_are_those_that_pytorch_counts_in_the_model():
    ids = torch.zeros(1, roofline.T, dtype=torch.long, device="meta")  # shapes without numbers
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig(attn_implementation="eager")).train()
    assert model.num_parameters() == roofline.PARAMETERS
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = {str(name): flops / roofline.T for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = counted.pop("aten.bmm")
    parts = {part.name: part.flops for part in roofline.parts_of_a_step()}
    blocks, head = parts["matrix products of the blocks"], parts["matrix products of the head"]
    assert sum(counted.values()) == blocks + head
    # Written out: 2 + 4 products over all pairs of positions. Flash: 2 + 5 over the half that causality leaves.
    assert parts["attention"] == 7 * attention / 6 / 2
    gpu = roofline.Gpu("", flops=sum(counted.values()) + attention, memory=1, nvlink=1)
    assert roofline.mfu(gpu, tokens_per_second=1) == pytest.approx(1, abs=0.001)  # which adds the weights of the norms


def test_more_gpus_are_less_efficient_and_a_faster_network_more():
    gpu = roofline.GPUS[1]
    fast, slow = roofline.NETWORKS.values()
    assert 0.9 < roofline.efficiency(gpu, 8, slow) < 1  # nothing leaves the machine
    assert roofline.efficiency(gpu, 8, slow) == roofline.efficiency(gpu, 8, fast)
    assert roofline.efficiency(gpu, 64, slow) < roofline.efficiency(gpu, 64, fast)
    assert roofline.efficiency(gpu, 512, fast) < roofline.efficiency(gpu, 64, fast)
    assert roofline.efficiency(gpu, 1, slow) == pytest.approx(1)


def test_a_step_of_eight_gpus_worked_out_by_hand():
    """A GPU that computes a token in 1 us and updates for free; a network that needs 4 s for the whole gradient."""
    assert roofline.ring_seconds(8.0, 8, bandwidth=3.5) == 4.0  # 2 x 7/8 x 8 / 3.5
    assert roofline.exposed_seconds(all_reduce=4.0, last_bucket=1.0, hiding=2.5) == 1.5
    assert roofline.exposed_seconds(all_reduce=4.0, last_bucket=1.0, hiding=3.5) == 1.0


@pytest.mark.parametrize("name", roofline.TABLES)
def test_the_page_has_the_tables_of_the_script(name):
    before, after = split_page(roofline.PAGE, roofline.markers(name))
    expected = before + roofline.TABLES[name]() + after
    assert roofline.PAGE.read_text(encoding="utf-8") == expected, "run python -m benchmarks.roofline --write"


def test_the_page_has_the_figures_of_the_two_processes():
    page = roofline.PAGE.read_text(encoding="utf-8")
    [result] = json.loads((ROOT / "benchmarks" / "results" / "scaling_cpu.json").read_text())
    for step in result["steps"]:
        times = f"{1e3 * step['alone_seconds']:.0f} | {1e3 * step['ddp_seconds']:.0f}"
        shares = f"{step['efficiency']:.2f} | {step['predicted_if_nothing_is_hidden']:.2f}"
        assert f"| {step['micro_batches']} | {times} | {shares} |" in page


def test_predictions_follow_from_the_measured_bandwidth():
    args = scaling.BenchmarkArguments(micro_batches=[1, 4])
    seconds = {"all_reduce": [0.5, 0.4], "passes 1": [0.3, 0.3], "ddp 1": [0.7, 0.65], "passes 4": [1.2, 1.3]}
    seconds |= {"ddp 4": [1.5, 1.6]}
    faster = {name: [value / 2 for value in values] for name, values in seconds.items()}
    found = scaling.summary(
        args, [{"bucket_bytes": [300, 100], "seconds": of_process} for of_process in (seconds, faster)]
    )
    assert found["bytes_per_second"] == pytest.approx(400 / 0.4)  # a ring of two sends as much as there is
    first, last = found["steps"]
    assert first["predicted_if_nothing_is_hidden"] == pytest.approx(0.3 / (0.3 + 0.4))
    assert first["predicted_if_the_rest_is_hidden"] == pytest.approx(0.3 / (0.3 + 0.2))  # 0.4 less 2/3 of 0.3
    assert last["predicted_if_the_rest_is_hidden"] == pytest.approx(1.2 / (1.2 + 0.2))
    assert last["efficiency"] == pytest.approx(1.2 / 1.5)
    args.clock = "processor"
    for step in scaling.summary(args, [{"bucket_bytes": [300, 100], "seconds": seconds}])["steps"]:
        assert step["predicted_if_the_rest_is_hidden"] == step["predicted_if_nothing_is_hidden"]


@pytest.mark.slow
def test_two_processes_measure_buckets_passes_and_ddp(tmp_path):
    scaling.main(["--shape", "toy", "--rounds", "2", "--micro_batches", "1", "2", "--output", str(tmp_path / "a.json")])
    [result] = json.loads((tmp_path / "a.json").read_text())
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64, "vocab_size": 512}
    parameters = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=None, eos_token_id=None)).num_parameters()
    assert sum(result["bucket_bytes"]) == 4 * parameters
    assert [step["micro_batches"] for step in result["steps"]] == [1, 2]
    assert all(step["ddp_seconds"] > 0 for step in result["steps"])
