"""Muon: against torch's own, against the singular value decomposition, on shards, and where a step is skipped."""

import math

import pytest
import torch

from modeling_gpt2repro.training.muon import UPDATE_RMS, Muon, orthogonalize
from modeling_gpt2repro.training.optimization import build_optimizer, set_learning_rate

SHAPES = [(24, 24), (64, 16), (16, 64)]


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def take_steps(optimizer, parameters, gradients):
    """Each of `gradients` is one step's, a tensor for each parameter."""
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


# What is computed


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalizing_keeps_the_directions_and_sets_their_strengths_to_about_one(shape):
    matrices = torch.stack([random_matrix(*shape, seed=seed) for seed in range(4)])
    result = orthogonalize(matrices)
    u, strengths, vt = torch.linalg.svd(matrices, full_matrices=False)
    in_those_directions = u.mT @ result @ vt.mT
    found = in_those_directions.diagonal(dim1=1, dim2=2)
    assert (in_those_directions - torch.diag_embed(found)).abs().max() < 1e-4
    shares = strengths / strengths.square().sum(dim=1, keepdim=True).sqrt()
    assert found[shares > 0.002].min() > 0.681  # the extremes of the five steps' polynomial on [0.002, 1]
    assert found.max() < 1.203
    assert result.shape == matrices.shape


def test_zeros_are_orthogonalized_to_zeros():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_matrices_that_are_not_split_are_updated_as_by_torch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's in 32 bits, too: 8 would hide a mistake
    options = {"lr": 3e-2, "weight_decay": 0.1}
    gradients = [[random_matrix(*shape, seed=10 * step + i) for i, shape in enumerate(SHAPES)] for step in range(5)]
    results = []
    for build in (
        lambda params: torch.optim.Muon(params, **options, adjust_lr_fn="match_rms_adamw"),
        lambda params: Muon([{"params": [p], "split": 1} for p in params], **options, fused=True),
    ):
        parameters = [torch.nn.Parameter(random_matrix(*shape, seed=99)) for shape in SHAPES]
        take_steps(build(parameters), parameters, gradients)
        results.append(parameters)
    for expected, parameter in zip(*results, strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=0)


def test_matrices_updated_together_are_updated_as_alone():
    gradients = [[random_matrix(16, 8, seed=10 * step + i) for i in range(3)] for step in range(3)]
    results = []
    for together in (True, False):
        parameters = [torch.nn.Parameter(torch.zeros(16, 8)) for _ in range(3)]
        groups = [parameters] if together else [[parameter] for parameter in parameters]
        take_steps(Muon([{"params": group, "split": 1} for group in groups], lr=1e-2), parameters, gradients)
        results.append(torch.stack([parameter.detach() for parameter in parameters]))
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


def test_query_key_and_value_move_alike_however_their_gradients_differ(tiny_model):
    optimizer = build_optimizer(tiny_model, 1e-2, weight_decay=0.0, optimizer="muon")
    c_attn = tiny_model.transformer.h[0].attn.c_attn.weight
    before = c_attn.detach().clone()
    c_attn.grad = torch.cat([rms * random_matrix(64, 64, seed=seed) for seed, rms in enumerate((0.2, 1.0, 3.0))])
    optimizer.step()
    moved = [part.square().mean().sqrt().item() for part in (c_attn.detach() - before).split(64)]
    # 64 singular values of about 0.9 in 64 x 64 entries, at a scale of 0.2 sqrt(64).
    assert moved == pytest.approx([1e-2 * UPDATE_RMS * 0.9] * 3, rel=0.1)


def test_matrices_in_the_blocks_are_muons_and_all_else_is_adamws(tiny_model):
    optimizer = build_optimizer(tiny_model, 1e-3, weight_decay=0.1, optimizer="muon")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in tiny_model.named_parameters():
        group = groups[id(parameter)]
        is_matrix = ".h." in name and name.endswith("weight") and ".ln_" not in name
        assert group.get("split") == ((3 if "c_attn" in name else 1) if is_matrix else None), name
        assert group["weight_decay"] == (0.1 if is_matrix or "wte" in name or "wpe" in name else 0.0), name
    assert len(groups) == len(list(tiny_model.parameters()))


def test_what_is_not_muons_is_updated_as_by_adamw(tiny_model, tiny_config):
    from modeling_gpt2repro import GPT2ReproForCausalLM

    twin = GPT2ReproForCausalLM(tiny_config)
    twin.load_state_dict(tiny_model.state_dict())
    for model, kind in ((tiny_model, "muon"), (twin, "adamw")):
        parameters = list(model.parameters())
        gradients = [[random_matrix(*p.shape, seed=seed) for p in parameters] for seed in range(3)]
        take_steps(build_optimizer(model, 1e-2, optimizer=kind), parameters, gradients)
    for (name, parameter), other in zip(tiny_model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other) == (".h." not in name or parameter.ndim < 2), name


def test_a_model_without_such_matrices_is_refused(stock, one_sentence):
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn\.weight") as error:
        build_optimizer(stock, 1e-3, optimizer="muon")
    one_sentence(error)
    with pytest.raises(ValueError, match="none to train") as error:
        build_optimizer(torch.nn.Linear(4, 4), 1e-3, optimizer="muon")
    one_sentence(error)


def test_an_unknown_optimizer_is_refused(tiny_model, one_sentence):
    with pytest.raises(ValueError, match=r"optimizer \(sgd\) must be one of adamw, muon") as error:
        build_optimizer(tiny_model, 1e-3, optimizer="sgd")
    one_sentence(error)


# What it is used in


def test_under_a_loss_scale_that_changes_it_takes_the_same_steps_and_skips_overflows(tiny_config):
    from modeling_gpt2repro import GPT2ReproForCausalLM

    results = []
    for is_scaled in (True, False):
        torch.manual_seed(0)
        model = GPT2ReproForCausalLM(tiny_config)
        optimizer = build_optimizer(model, 1e-2, optimizer="muon")
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1, enabled=is_scaled)
        for step in range(5):
            for i, p in enumerate(model.parameters()):
                p.grad = random_matrix(*p.shape, seed=100 * step + i) * scaler.scale(torch.tensor(1.0))
                if step == 3:
                    p.grad[0] = math.inf
            if is_scaled or step != 3:
                scaler.step(optimizer)
                scaler.update()
        results.append([p.detach() for p in model.parameters()])
    for scaled, plain in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=0)


def test_the_learning_rate_is_that_of_all_groups(tiny_model):
    optimizer = build_optimizer(tiny_model, 1e-3, optimizer="muon")
    set_learning_rate(optimizer, 0.0)
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    take_steps(optimizer, list(tiny_model.parameters()), [[torch.ones_like(old) for old in before]])
    assert all(map(torch.equal, before, tiny_model.parameters()))


def test_its_state_is_saved_and_loaded_as_that_of_any_optimizer(tiny_config, tmp_path):
    from modeling_gpt2repro import GPT2ReproForCausalLM

    results = []
    for is_saved in (False, True):
        torch.manual_seed(0)
        model = GPT2ReproForCausalLM(tiny_config)
        parameters = list(model.parameters())
        gradients = [[random_matrix(*p.shape, seed=seed) for p in parameters] for seed in range(4)]
        optimizer = build_optimizer(model, 1e-2, optimizer="muon")
        take_steps(optimizer, parameters, gradients[:2])
        if is_saved:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            optimizer = build_optimizer(model, 1e-2, optimizer="muon")
            optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        take_steps(optimizer, parameters, gradients[2:])
        results.append(parameters)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_with_nan_gradients_leaves_everything(tiny_model, first):
    optimizer = build_optimizer(tiny_model, 1e-2, optimizer="muon")
    parameters = list(tiny_model.parameters())
    optimizer.found_inf = torch.tensor(0.0)
    if not first:
        take_steps(optimizer, parameters, [[random_matrix(*p.shape) for p in parameters]])
    before = [parameter.detach().clone() for parameter in parameters]
    state = {p: {kind: tensor.clone() for kind, tensor in optimizer.state[p].items()} for p in parameters}
    optimizer.found_inf = torch.tensor(1.0)
    take_steps(optimizer, parameters, [[torch.full_like(p, math.nan) for p in parameters]])
    assert all(map(torch.equal, before, parameters))
    for p in parameters:
        for kind, tensor in optimizer.state[p].items():
            assert torch.equal(tensor, state[p].get(kind, torch.zeros_like(tensor))), kind
    optimizer.found_inf = torch.tensor(0.0)
    take_steps(optimizer, parameters, [[random_matrix(*p.shape) for p in parameters]])
    assert not any(map(torch.equal, before, parameters))


def test_a_parameter_without_gradient_stays(tiny_model):
    optimizer = build_optimizer(tiny_model, 1e-2, optimizer="muon")
    tiny_model.transformer.h[1].mlp.c_fc.weight.grad = random_matrix(256, 64)
    before = {name: parameter.detach().clone() for name, parameter in tiny_model.named_parameters()}
    optimizer.step()
    moved = [name for name, parameter in tiny_model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == ["transformer.h.1.mlp.c_fc.weight"]


# On several processes

STEPS_ON_TWO = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.runtime.fsdp import full_tensor, shard_like
from modeling_gpt2repro.training.optimization import build_optimizer

dist.init_process_group("gloo")
# Rows that two processes cannot share evenly, too: 3 * 25 of c_attn.
config = GPT2ReproConfig(n_layer=2, n_head=5, n_embd=25, n_positions=16, vocab_size=97, bos_token_id=0, eos_token_id=0)

def trained(sharded):
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(config)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, 1e-2, optimizer="muon")
    draw = torch.Generator().manual_seed(1)
    for step in range(5):
        optimizer.found_inf = torch.tensor(float(step == 3))
        for parameter in model.parameters():
            parameter.grad = shard_like(torch.randn(parameter.shape, generator=draw), parameter)
        optimizer.step()
    moments = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    assert len(moments) == 8 and all(type(m) is type(model.lm_head.weight.data) for m in moments)
    return [full_tensor(tensor.detach()) for tensor in [*model.parameters(), *moments]]

differences = [(a - b).abs().max().item() for a, b in zip(trained(True), trained(False), strict=True)]
print(max(differences), flush=True)
dist.destroy_process_group()
"""


def test_a_step_on_shards_is_the_step_on_the_whole(warm_python):
    for process in warm_python.run_together(2, "-c", STEPS_ON_TWO):
        assert float(process.stdout) < 1e-5


DDP = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.training.optimization import build_optimizer

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)  # DDP sends the first process's weights to the others
shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 97}
model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0))
optimizer = build_optimizer(model, 1e-2, optimizer="muon")
wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
before = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
for step in range(5):
    ids = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(2 * step + rank))
    wrapped(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert not torch.equal(before, model.transformer.h[1].mlp.c_fc.weight)
for tensor in [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]:
    of_each = [torch.empty_like(tensor.detach()) for _ in range(2)]
    dist.all_gather(of_each, tensor.detach())
    assert torch.equal(*of_each)
print("equal", flush=True)
dist.destroy_process_group()
"""


def test_under_ddp_all_processes_have_the_same_bits(warm_python):
    for process in warm_python.run_together(2, "-c", DDP):
        assert process.stdout == "equal\n"
