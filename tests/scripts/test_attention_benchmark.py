"""What `python -m benchmarks.attention` measures is what `--attn_implementation auto` finds."""

import json
from pathlib import Path

import pytest
import torch
from toy_runs import as_flags

from benchmarks import attention as benchmark
from modeling_gpt2repro.runtime import attention
from modeling_gpt2repro.runtime.attention import Workload, device_kind

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
HERE = Workload(device_kind(torch.device("cpu")), "fp32", compiled=False, head_size=8, length=8)


def faster(median: float, lower_quartile: float) -> dict[str, float]:
    return {"median": median, "lower_quartile": lower_quartile, "upper_quartile": 2 * median}


def test_only_what_is_clearly_faster_comes_before_sdpa():
    found = {"a": faster(1.2, 1.1), "b": faster(1.4, 1.3), "slower": faster(0.9, 0.8)}
    assert benchmark.fastest_first(found) == ["b", "a", "sdpa"]
    assert benchmark.fastest_first({"hardly": faster(1.04, 1.03), "noisy": faster(1.3, 0.99)}) == ["sdpa"]
    assert benchmark.fastest_first({}) == ["sdpa"]


def test_the_benchmark_adds_this_machine_to_the_table_that_training_reads(tmp_path, monkeypatch, capsys):
    table = tmp_path / "attention.json"
    other = {"device": "cuda sm_90", "dtype": "bf16", "compiled": True, "head_size": 64, "length": 1024}
    table.write_text(json.dumps([other | {"fastest_first": ["sdpa_cudnn", "sdpa"]}]))
    monkeypatch.setattr(torch, "compile", lambda forward: forward)  # seconds each
    monkeypatch.setattr(benchmark, "cpu_lacks_bf16", lambda: False)
    sizes = {"lengths": 8, "head_sizes": 8, "width": 16, "tokens": 16, "rounds": 2}
    flags = as_flags(sizes | {"device": "cpu"})
    for _ in range(2):  # a second time replaces the first
        benchmark.main([*flags, "--output", str(tmp_path / "results.json"), "--table", str(table)])
    torch.use_deterministic_algorithms(False)
    [result] = json.loads((tmp_path / "results.json").read_text())
    assert result["command"].startswith("python -m benchmarks.attention --lengths 8")
    assert result["settings"]["kind"] == HERE.device
    assert [(row["dtype"], row["compiled"]) for row in result["rows"]] == [
        ("bf16", False),
        ("bf16", True),
        ("fp32", False),
        ("fp32", True),
    ]
    rows = json.loads(table.read_text())
    assert len(rows) == 4 + 1
    assert other | {"fastest_first": ["sdpa_cudnn", "sdpa"]} in rows
    monkeypatch.setattr(attention, "TABLE_FILE", table)
    assert list(attention.fastest_first(HERE)) == result["rows"][2]["fastest_first"]
    assert f"{HERE}: sdpa " in capsys.readouterr().out


def test_an_implementation_that_computes_something_else_is_refused(monkeypatch):
    def without_mask(module, query, key, value, attention_mask, scaling):
        return benchmark_eager(module, query, key, value, None, scaling)

    benchmark_eager = benchmark.eager_attention_forward
    monkeypatch.setattr(benchmark, "eager_attention_forward", without_mask)
    args = benchmark.BenchmarkArguments(device="cpu", head_sizes=[8], width=16, tokens=16)
    with pytest.raises(ValueError, match=r"eager and sdpa differ by .* of the largest output \(cpu"):
        benchmark.measure(HERE, args, torch.device("cpu"))


def test_a_kernel_that_fails_is_left_out(monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise RuntimeError("No available kernel.\nAborting execution.")

    monkeypatch.setattr(benchmark, "eager_attention_forward", failing)
    args = benchmark.BenchmarkArguments(device="cpu", head_sizes=[8], width=16, tokens=16, rounds=1)
    found = benchmark.measure(HERE, args, torch.device("cpu"))
    assert found["failed"] == {"eager": "No available kernel."}
    assert found["sdpa_over"] == {}
    assert found["fastest_first"] == ["sdpa"]
    assert "eager is left out: No available kernel." in capsys.readouterr().out


def test_the_candidates_of_a_gpu_are_all_that_are_here(monkeypatch):
    """The 16 bits that it computes in, and every kernel of sdpa; without a GPU nothing of it can be run."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    args = benchmark.BenchmarkArguments(device="cpu")
    found = list(benchmark.workloads(args, torch.device("cuda")))
    assert {(workload.device, workload.dtype) for workload in found} == {("cuda sm_75", "fp32"), ("cuda sm_75", "fp16")}
    here = [name for name in benchmark.CANDIDATES if attention.is_available(name, torch.device("cuda"))]
    assert here == ["eager", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient"]  # no package of flash attention


def test_bad_sizes_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--head_sizes", "48", "--lengths", "0", "--device", "cpu"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "head_sizes (48) must divide the width (256)." in error
    assert "lengths (0) must be at least 1." in error


def test_the_committed_table_is_that_of_the_committed_results():
    results = [result for file in RESULTS.glob("attention_*.json") for result in json.loads(file.read_text())]
    measured = [row for result in results for row in result["rows"]]
    names = [*Workload.__dataclass_fields__, "fastest_first"]
    table = attention.read_table()
    assert len(table) == len(measured) > 0
    for row in measured:
        assert row["fastest_first"] == benchmark.fastest_first(row["sdpa_over"])
        assert {name: row[name] for name in names} in table
