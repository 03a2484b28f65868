"""Memory that is reckoned is what the CPU's allocator reports; storages and batches by hand; wrong input."""

import re
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from benchmarks import memory
from benchmarks.harness import in_fresh_process


@pytest.fixture(autouse=True)
def clean_accelerator():
    """Other tests of this process have made an accelerator of another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


SMALL = memory.Step(**memory.SMALL, batch=2)


@pytest.mark.parametrize("loss", memory.LOSSES)
def test_the_reckoned_peak_is_what_the_allocator_reports(loss):
    step = replace(SMALL, loss=loss)
    assert memory.reckoned_peak(step) == pytest.approx(memory.measured_peak(step), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("loss", memory.LOSSES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_reckoned_peak_is_what_the_allocator_reports_at_a_larger_size(compiled, optimizer, loss):
    step = replace(SMALL, n_embd=128, batch=6, compiled=compiled, optimizer=optimizer, loss=loss)
    reckoned, measured = (in_fresh_process(peak, step) for peak in (memory.reckoned_peak, memory.measured_peak))
    assert reckoned == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [1, 16])
def test_the_peak_is_linear_in_the_depth(compiled, batch):
    args = memory.BenchmarkArguments(batches=[batch, batch + 1])
    row = memory.reckon_preset(args, "in chunks", "gpt2-124m", memory.MODES[compiled])
    whole = memory.Step(12, 12, 768, 1024, memory.VOCAB_SIZE, batch, compiled)
    assert row["peak_bytes"][batch] == pytest.approx(memory.reckoned_peak(whole), rel=0.01)


def test_a_storage_counts_once_and_until_nothing_refers_to_it():
    with memory.LiveBytes() as live:
        numbers = torch.zeros(100)
        view = numbers.view(10, 10)
        assert live.bytes == 400
        other = numbers + 1
        del numbers
        assert live.bytes == 800
        del view, other
        assert live.bytes == 0
        kept = torch.zeros(10)
    assert (live.bytes, live.peak) == (kept.nbytes, 800)


def test_the_largest_batch_is_on_the_line_between_two_that_are_reckoned():
    peaks = {1: 100, 4: 400, 16: 1000}  # 100 a sequence, then 50
    assert [memory.largest_batch(peaks, room) for room in (99, 100, 399, 400, 449, 450, 1000, 2000)] == [
        *(0, 1, 3, 4, 4, 5, 16, 36)
    ]


def test_the_table_leaves_the_allowance_free():
    row = {"preset": "gpt2-124m", "loss": "in chunks", "mode": "eager", "peak_bytes": {"1": 2e9, "4": 5e9}}
    settings = {"batches": [4, 1], "gpu_gb": [3, 24], "allowance_gb": 1.5}
    *_, line = memory.table([{"settings": settings, "rows": [row]}]).splitlines()
    assert line == "| gpt2-124m | eager | in chunks | 2.0 | 5.0 | 1.00 | - | 21 |"  # 22.5 GB are left


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--presets", "gpt3"], r"presets \(gpt3\) must be of gpt2-124m, gpt2-350m, gpt2-774m, gpt2-1558m"),
        (["--modes", "fast"], r"modes \(fast\) must be of eager, compiled"),
        (["--losses", "none"], r"losses \(none\) must be of in chunks, from logits"),
        (["--batches", "4"], r"batches \(4\) must be two or more numbers from 1"),
        (["--batches", "0", "4"], r"batches \(0, 4\) must be two or more numbers from 1"),
        (["--gpu_gb", "1"], r"gpu_gb \(1\) must be above allowance_gb \(1.5\)"),
    ],
)
def test_wrong_input_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        memory.main(flags)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
