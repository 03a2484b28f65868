"""What a run prints for people."""

from types import SimpleNamespace

import pytest
import torch

from modeling_gpt2repro.pretrain import messages
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.presets import PRESETS


def test_the_warning_of_a_slow_cpu_counts_the_operations_of_the_model_that_is_trained(monkeypatch):
    printed = []
    operations = []

    def estimate(flops: float, dtype: torch.dtype) -> float:
        operations.append(flops)
        return flops / 1e9

    monkeypatch.setattr(messages, "estimate_cpu_seconds", estimate)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", print=printed.append)
    for preset in ("quickstart", "gpt2-124m"):
        messages.warn_of_slow_cpu(TrainArguments(preset=preset, **PRESETS[preset]), accelerator)
    # 6 operations a parameter and token, and those of attention: 12 * layers * width * context.
    assert operations[0] == pytest.approx(2_867_200 * (6 * 675_328 + 12 * 2 * 128 * 128), rel=0.03)
    assert operations[1] == pytest.approx(1e10 * (6 * 124_439_808 + 12 * 12 * 768 * 1024), rel=0.03)
    assert "Fewer --train_tokens take less time." in printed[0]
    assert "--preset quickstart trains a small GPT-2 in minutes" in printed[1]
