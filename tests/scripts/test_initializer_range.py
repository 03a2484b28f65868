"""--initializer_range: in the weights, in the model's config, taken from a model, and kept by a resumed run."""

import json
import math

import pytest
from safetensors.torch import load_file
from toy_runs import TOKENS_PER_STEP, WEIGHTS, train_here

from modeling_gpt2repro.pretrain.initial_weights import take_shape
from modeling_gpt2repro.runtime.command_line import parse_command_line
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.presets import PRESETS


def test_weights_have_it_and_the_config_says_so_and_a_resumed_run_keeps_it(shards, tmp_path, capsys):
    run = tmp_path / "run"
    # A rate at which two steps change nothing that could be seen.
    flags = {"learning_rate": 1e-9, "eval_steps": 0, "save_steps": 0, "num_samples": 0, "save_total_limit": 0}
    two_steps = {**flags, "train_tokens": 2 * TOKENS_PER_STEP, "warmup_tokens": 0}
    assert train_here(run, shards, **two_steps, initializer_range=0.3) == 0
    weights = load_file(run / WEIGHTS)
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(0.3, rel=0.05)
    # Two layers, and two projections into the residual stream of each.
    assert weights["transformer.h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.3 / math.sqrt(4), rel=0.05)
    assert json.loads((run / "model" / "config.json").read_text())["initializer_range"] == 0.3

    longer = {**two_steps, "train_tokens": 3 * TOKENS_PER_STEP, "resume_from_checkpoint": "latest"}
    assert train_here(run, shards, **longer) == 2
    assert "has another shape than was asked for: give " in (printed := capsys.readouterr().err)
    assert "--initializer_range 0.3." in printed
    assert train_here(run, shards, **longer, initializer_range=0.3) == 0


def test_fine_tuning_takes_it_from_the_model(tiny_model, tmp_path, one_sentence):
    tiny_model.config.initializer_range = 0.05
    flags = ["--init_from", "tiny", "--shards", str(tmp_path)]
    args = parse_command_line(TrainArguments, flags, PRESETS)
    assert args.initializer_range is None
    take_shape(args, tiny_model, "tiny")
    assert args.initializer_range == 0.05
    other = parse_command_line(TrainArguments, [*flags, "--initializer_range", "0.02"], PRESETS)
    with pytest.raises(ValueError, match=r"tiny has another shape .* --initializer_range 0\.05\.") as error:
        take_shape(other, tiny_model, "tiny")
    one_sentence(error)
