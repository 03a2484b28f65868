"""Ten CPU steps of a toy run against losses written down once: a change that claims to alter no numbers leaves them.

    PYTHONPATH=tests/support python tests/scripts/test_golden_losses.py  # writes the missing files of tests/golden

A file is named after what its numbers depend on: the order of the data, the attention, the loss, and precision and
processes. A new default adds a file; the old one stays as long as the old path does.
"""

import json
import sys
from itertools import product
from pathlib import Path

import pytest
from toy_runs import CPU_FP32, SCRIPT, logged_values, toy_flags

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 10
PATH = "sdpa_full-logits"
ORDERS = ("argsort", "keyed")
CASES = [("fp32", 1), ("bf16", 1), ("fp32", 2)]
# A new run is in the keyed order. One of the order before it cannot be begun, only be resumed; this begins one.
PROGRAM = """
from unittest.mock import patch
import train_accelerate
with patch("modeling_gpt2repro.pretrain.open_data.data_order", return_value="argsort"):
    train_accelerate.main()
"""
FP32_INSTEAD = "fp32 is taken"  # what the script prints where the processor emulates bf16
# Rounding differs between processors: in bf16, whose steps are 2**-8, more than in fp32.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


def golden_file(order: str, precision: str, processes: int) -> Path:
    return GOLDEN / f"{order}-order_{PATH}_{precision}_{processes}-processes.json"


def run_ten_steps(warm_python, shards: Path, output_dir: Path, order: str, precision: str, processes: int) -> str:
    """Train for ten steps of 8 sequences, in micro-batches of 2; returns what was printed."""
    sizes = {"train_tokens": STEPS * 8 * 32, "warmup_tokens": 3 * 8 * 32, "per_device_train_batch_size": 2}
    others = {"eval_steps": 0, "save_steps": 0, "num_samples": 0, "hellaswag": "none", "attn_implementation": "sdpa"}
    flags = toy_flags(output_dir, shards, **sizes, **others)
    environment = CPU_FP32 | {"ACCELERATE_MIXED_PRECISION": {"fp32": "no", "bf16": "bf16"}[precision]}
    command = {"argsort": ("-c", PROGRAM), "keyed": (SCRIPT,)}[order]
    return warm_python.run_together(processes, *command, *flags, **environment)[0].stdout


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("precision", "processes"), CASES)
def test_ten_steps_give_the_golden_losses(shards, warm_python, tmp_path, order, precision, processes):
    printed = run_ten_steps(warm_python, shards, tmp_path / "run", order, precision, processes)
    if precision == "bf16" and FP32_INSTEAD in printed:
        pytest.skip("this processor emulates bf16, so the script trains in fp32")
    golden = json.loads(golden_file(order, precision, processes).read_text())
    fingerprint = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["data"]
    assert fingerprint == golden["data"], "the toy data are others: tokenizer or text has changed"
    for name in ("loss", "grad_norm"):
        expected = pytest.approx(golden[name], abs=TOLERANCE[precision] * (1 if name == "loss" else 10))
        assert logged_values(tmp_path / "run", name) == expected, name
    assert logged_values(tmp_path / "run", "learning_rate") == pytest.approx(golden["learning_rate"], rel=1e-12)


if __name__ == "__main__":
    import os
    from tempfile import TemporaryDirectory

    from toy_runs import ROOT, make_shards
    from warm_python import WarmPython

    sys.path.insert(0, str(ROOT))
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    python = WarmPython({**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path})
    with TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        for order, (precision, processes) in product(ORDERS, CASES):
            file = golden_file(order, precision, processes)
            if file.exists():
                continue
            run = Path(folder, file.stem)
            printed = run_ten_steps(python, shards, run, order, precision, processes)
            if precision == "bf16" and FP32_INSTEAD in printed:
                print(f"{file} has to be written on a processor with bf16")
                continue
            record = json.loads((run / "run.json").read_text())
            numbers = {name: logged_values(run, name) for name in ("loss", "grad_norm", "learning_rate")}
            about = {"data": record["data"]["data"], "versions": record["versions"]}
            file.write_text(json.dumps(about | numbers, indent=1) + "\n")
            print(file)
