"""What a run prints for people."""

from types import SimpleNamespace

import pytest
import torch

from modeling_gpt2repro.pretrain import messages
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.presets import PRESETS


def test_the_warning_of_a_slow_cpu_counts_the_operations_of_the_model_that_is_trained(monkeypatch, tmp_path):
    printed = []
    operations = []

    def estimate(flops: float, dtype: torch.dtype) -> float:
        operations.append(flops)
        return flops / 1e9

    monkeypatch.setattr(messages, "estimate_cpu_seconds", estimate)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", print=printed.append)
    for preset in ("quickstart", "gpt2-124m"):
        args = TrainArguments(preset=preset, **PRESETS[preset])
        messages.warn_of_slow_cpu(args, accelerator)
        messages.warn_of_slow_cpu(args, accelerator, 50257)  # once the data are open; it has been said
    # 6 operations a parameter and token, and those of attention: 12 * layers * width * context.
    assert operations[0] == pytest.approx(2_867_200 * (6 * 675_328 + 12 * 2 * 128 * 128), rel=0.03)
    assert operations[1] == pytest.approx(1e10 * (6 * 124_439_808 + 12 * 12 * 768 * 1024), rel=0.03)
    assert "Fewer --train_tokens take less time." in printed[0]
    assert "--preset quickstart trains a small GPT-2 in minutes" in printed[1]

    # What the arguments leave open is in the model and the data.
    args = TrainArguments(init_from="gpt2", shards=str(tmp_path), n_layer=None, block_size=None)
    messages.warn_of_slow_cpu(args, accelerator)
    assert len(printed) == 2
    args.n_layer, args.block_size = 12, 512
    messages.warn_of_slow_cpu(args, accelerator, 1000)
    parameters = 124_439_808 - (50_257 - 1000 + 1024) * 768
    assert operations[2] == pytest.approx(1e10 * (6 * parameters + 12 * 12 * 768 * 512), rel=0.03)
    assert len(printed) == 3


def test_the_message_of_a_jump_holds_where_a_schedule_ends_at_zero():
    before = {"train_tokens": 100, "tokens_per_step": 1, "warmup_tokens": 0, "learning_rate": 0.01}
    before["final_learning_rate_ratio"] = 0.0
    longer = {**before, "train_tokens": 200}
    for schedules, step, jump in (
        ((before, longer), 100, "after step 100 from 0.00e+00 to 5.00e-03, because"),
        ((longer, before), 100, "after step 100 from 5.00e-03 to 0.00e+00, because"),
    ):
        message = messages.learning_rate_message(*schedules, step)
        assert jump in message
        assert "--learning_rate" not in message
    assert messages.learning_rate_message({}, longer, 100) is None
