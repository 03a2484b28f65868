"""The learning rate schedule, the decay groups, and the fused optimizer."""

import itertools

import pytest

from modeling_gpt2repro.training.optimization import build_optimizer, learning_rate_at


def test_the_rate_warms_up_linearly_and_falls_to_a_tenth():
    rates = [learning_rate_at(step, 19073, 715, 6e-4, 0.1) for step in range(19074)]
    assert rates[0] == pytest.approx(6e-4 / 715)
    assert rates[714] == rates[715] == 6e-4 == max(rates)
    assert rates[(715 + 19073) // 2] == pytest.approx(3.3e-4)
    assert rates[-1] == pytest.approx(6e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[715:]))


def test_only_matrices_and_embeddings_are_decayed(tiny_model):
    optimizer = build_optimizer(tiny_model, 1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in tiny_model.named_parameters():
        is_matrix = name.endswith("weight") and ".ln_" not in name
        assert decay[id(parameter)] == (0.1 if is_matrix else 0.0), name
    assert len(decay) == len(list(tiny_model.parameters()))


def test_the_optimizer_is_fused_where_torch_can(tiny_model):
    assert build_optimizer(tiny_model, 1e-3).defaults["fused"]
    assert not build_optimizer(tiny_model.to("meta"), 1e-3).defaults["fused"]
