"""run.json: what a run began with."""

import json
from dataclasses import asdict

import torch

from modeling_gpt2repro.runs.config import make_writable, write_run_config
from modeling_gpt2repro.training.arguments import TrainArguments


def test_run_json_can_be_read_back(tmp_path):
    args = TrainArguments(output_dir=str(tmp_path / "run"))
    make_writable(tmp_path / "run")
    write_run_config(
        tmp_path / "run", asdict(args), hardware={"processes": 1}, attention={}, data_fingerprint={"seed": 1}
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"]["train_tokens"] == 10_000_000_000
    assert record["versions"]["torch"] == torch.__version__
