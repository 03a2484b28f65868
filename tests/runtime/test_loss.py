"""The loss without logits, against torch's cross-entropy of all logits: value, gradients, memory, precision."""

import weakref

import pytest
import torch
import torch._functorch.config
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_gpt2repro.runtime import loss as loss_module
from modeling_gpt2repro.runtime.compilation import cache_graphs_with_own_gradients
from modeling_gpt2repro.runtime.loss import ModelWithLoss, aligned_weight, linear_cross_entropy

V, C = 97, 16


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS_ELSEWHERE", 7)


def problem(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (1, N, C), weight (V, C) and labels (1, N), of which some are -100."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_states = torch.randn(1, tokens, C, generator=generator, requires_grad=True)
    weight = torch.randn(V, C, generator=generator, requires_grad=True)
    labels = torch.randint(V, (1, tokens), generator=generator)
    labels[0, 7:14] = labels[0, -1] = -100  # a whole chunk of seven, and the last
    return hidden_states, weight, labels


def reference(hidden_states, weight, labels):
    logits = hidden_states.flatten(0, 1) @ weight.t()
    return nn.functional.cross_entropy(logits.float(), labels.flatten(), reduction="sum")


def gradients(loss_function, hidden_states, weight, labels, scale: float = 1.0, **autocast):
    """The loss, and the gradients of `scale` times it."""
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        total = loss_function(hidden_states, weight, labels)
    return total, *torch.autograd.grad(total * scale, (hidden_states, weight))


@pytest.mark.parametrize("tokens", [6, 7, 21, 40])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_loss_and_gradients_are_those_of_cross_entropy(small_chunks, tokens, backend):
    ours = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend) if backend else linear_cross_entropy
    arguments = problem(tokens)
    for value, expected in zip(gradients(ours, *arguments), gradients(reference, *arguments), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1 / 40), (torch.float16, 2.0**16 / 40)])
def test_sixteen_bits_give_the_gradients_of_32_to_their_rounding(small_chunks, dtype, scale):
    arguments = problem(40)
    exact = gradients(reference, *arguments)
    total, *of_parameters = gradients(linear_cross_entropy, *arguments, scale=scale, dtype=dtype)
    epsilon = torch.finfo(dtype).eps
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact[0].item(), rel=epsilon)
    for gradient, expected in zip(of_parameters, exact[1:], strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient / scale - expected).norm() < 2 * epsilon * expected.norm()


def test_a_text_that_repeats_one_token_does_not_overflow_in_fp16():
    """The gradient of its row is a sum over a thousand tokens, which no loss scale makes smaller: it comes later."""
    hidden_states, weight, _ = problem(1000)
    hidden_states = (hidden_states.detach() - 100).requires_grad_()  # GPT-2 has such dimensions
    weight = (weight.detach() / 100).requires_grad_()
    labels = torch.full((1, 1000), 3)
    exact = gradients(reference, hidden_states, weight, labels)[2]
    gradient = gradients(linear_cross_entropy, hidden_states, weight, labels, dtype=torch.float16)[2]
    assert exact.abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(gradient, exact, atol=1e-3 * exact.abs().max().item(), rtol=0)


def test_sixteen_bits_align_the_vocabulary_and_nothing_of_it_shows(small_chunks):
    hidden_states, weight, labels = problem(40)
    matrix, bias = aligned_weight(weight.detach(), torch.bfloat16)
    assert matrix.shape == (128, C)
    assert torch.equal(matrix[:V], weight.detach().bfloat16())
    assert torch.equal(bias.isinf(), torch.arange(128) >= V)
    rounded = weight.detach().bfloat16().requires_grad_()
    unaligned = gradients(reference, hidden_states.bfloat16(), rounded, labels)[0]
    total, _, gradient = gradients(linear_cross_entropy, hidden_states, weight, labels, dtype=torch.bfloat16)
    assert total.item() == pytest.approx(unaligned.item(), rel=1e-3)  # an added column would be 31 more to choose from
    assert gradient.shape == weight.shape


@pytest.mark.parametrize("trained", ["both", "weight", "hidden_states", "nothing"])
def test_only_what_is_trained_gets_a_gradient_and_no_tensor_holds_all_logits(small_chunks, trained):
    hidden_states, weight, labels = problem(40)
    hidden_states.requires_grad_(trained in ("both", "hidden_states"))
    weight.requires_grad_(trained in ("both", "weight"))
    largest = LargestTensor()
    with largest:
        total = linear_cross_entropy(hidden_states, weight, labels)
        if trained != "nothing":
            total.backward()
    assert largest.numel == V * C  # the weight: all logits would be 40 V
    assert torch.equal(total.detach(), linear_cross_entropy(*problem(40)).detach())
    assert (weight.grad is not None) == (trained in ("both", "weight"))
    assert (hidden_states.grad is not None) == (trained in ("both", "hidden_states"))


def test_the_logits_of_one_chunk_are_gone_when_the_next_ones_are_made(small_chunks):
    living = LivingLogits()
    with living:
        linear_cross_entropy(*problem(42))
    assert living.most == 2  # logits and their log-softmax, whose memory the gradient takes over


class LivingLogits(TorchDispatchMode):
    """Counts the tensors of one chunk's logits that there are at a time."""

    def __init__(self):
        super().__init__()
        self.references = {}  # address of the memory -> its storage
        self.most = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.shape == (7, V):
            self.references[result.data_ptr()] = weakref.ref(result.untyped_storage())
        self.most = max(self.most, sum(reference() is not None for reference in self.references.values()))
        return result


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("items", [None, 11.0])
def test_the_model_is_trained_as_by_its_own_forward(small_chunks, tiny_model, checkpointed, items):
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(3))
    labels = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
    positions = torch.tensor([[*range(20)], [*range(8), *range(12)]])  # the second row is two documents
    inputs = {"input_ids": ids, "position_ids": positions, "shift_labels": labels, "use_cache": False}
    tiny_model.train()
    results = []
    for model in (tiny_model, ModelWithLoss(tiny_model)):
        if checkpointed:
            tiny_model.transformer.gradient_checkpointing_enable()
        loss = model(**inputs, num_items_in_batch=items).loss
        results.append((loss, *torch.autograd.grad(loss, list(tiny_model.parameters()))))
        assert tiny_model.lm_head.weight is tiny_model.transformer.wte.weight
    for value, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_frozen_weights_with_trained_additions_get_no_gradient(small_chunks, tiny_model):
    """As with LoRA, which trains small matrices beside the weights."""
    tiny_model.requires_grad_(False)
    bias = tiny_model.transformer.ln_f.bias.requires_grad_(True)
    ids = torch.arange(20)[None]
    loss = ModelWithLoss(tiny_model)(input_ids=ids, shift_labels=ids, use_cache=False).loss
    [gradient] = torch.autograd.grad(loss, [bias])
    [expected] = torch.autograd.grad(tiny_model(ids, shift_labels=ids, use_cache=False).loss, [bias])
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_inductor_computes_the_same(small_chunks, dtype):
    autocast = {"dtype": dtype} if dtype else {}
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    expected = gradients(linear_cross_entropy, *problem(40), **autocast)
    for value, of_eager in zip(gradients(compiled, *problem(40), **autocast), expected, strict=True):
        assert (value - of_eager).norm() < (4 * 2**-8 if dtype else 1e-5) * of_eager.norm()


@pytest.mark.slow
def test_a_later_start_finds_the_compiled_loss_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions", False)
    cache_graphs_with_own_gradients()
    results = []
    for found in ("miss", "hit"):
        torch.compiler.reset()  # as a new process
        counters.clear()
        results.append(gradients(torch.compile(linear_cross_entropy, fullgraph=True), *problem(40)))
        assert counters["aot_autograd"][f"autograd_cache_{found}"] == 1, dict(counters["aot_autograd"])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
