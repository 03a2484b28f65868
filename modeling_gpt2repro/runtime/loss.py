"""The loss without the logits, which would be the largest tensor of the whole step.

Shapes: B batch, T sequence, N tokens, C channels, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

IGNORE_INDEX = -100
# Tokens whose logits exist at a time. Each chunk reads and writes the gradient of the weight once, which costs a GPU
# more than the memory of a larger chunk is worth.
CHUNK_TOKENS = {"cuda": 4096}
CHUNK_TOKENS_ELSEWHERE = 1024
FP16_ROOM = 64  # 4,096 times a hidden state of 1,000; fp16 ends at 65,504
VOCABULARY_MULTIPLE = 64  # tensor cores take rows that are aligned; 50257 is odd


class ModelWithLoss(nn.Module):
    """GPT-2 as it is trained: token ids in, loss out. The model's own forward has the same loss, and logits.

    Accelerate prepares this module in place of the model: autocast, DDP, FSDP2 and torch.compile wrap it, and the model
    inside, `.model`, stays as it was made, for evaluations and checkpoints.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP2 shards one by one

    def forward(
        self, shift_labels: Tensor, num_items_in_batch: float | Tensor | None = None, **inputs
    ) -> CausalLMOutputWithPast:
        """Return `loss`: the sum over the labels that are not -100, divided by `num_items_in_batch` or their number.

        Args:
            shift_labels: (B, T), the token after each position.
            inputs: Those of `GPT2ReproModel.forward`: `input_ids` (B, T), `position_ids`, `use_cache`.
        """
        hidden_states = self.model.transformer(**inputs).last_hidden_state  # (B, T, C)
        total = linear_cross_entropy(hidden_states, self.model.lm_head.weight, shift_labels)
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != IGNORE_INDEX).sum()
        return CausalLMOutputWithPast(total / num_items_in_batch)


def linear_cross_entropy(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden_states @ weight^T)[label], in fp32.

    GPT-2's logits are 50,257 numbers a token, 65 times as many as its hidden state has: for 32 sequences of 1,024
    tokens 6.6 GB in fp32, and twice that with their gradient. Here they are made for a chunk of tokens at a time, and
    because the gradient of the loss is known as soon as the loss is, softmax(logits) - onehot(label), its products with
    weight and hidden states are formed on the spot, and the logits are forgotten.

    Args:
        hidden_states: (..., C), N tokens in all.
        weight: (V, C), which may be tied to an embedding. The products are in the dtype of autocast, or else its own.
        labels: (...): ids, or -100 where there is nothing to predict.

    Returns:
        A scalar, to be divided by the number of labels; differentiable once.
    """
    device = weight.device.type
    has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if has_autocast else weight.dtype
    chunk_tokens = CHUNK_TOKENS.get(device, CHUNK_TOKENS_ELSEWHERE)
    return LinearCrossEntropy.apply(
        hidden_states.flatten(0, -2).to(dtype), weight, labels.flatten(), dtype, chunk_tokens
    )


class LinearCrossEntropy(torch.autograd.Function):
    """The gradients of a sum over tokens, computed with the sum and kept for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk_tokens: int):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix, bias = aligned_weight(weight, dtype)  # (V', C), (V',) or None
        loss = torch.zeros((), device=weight.device)
        hidden_grad = torch.empty_like(hidden_states) if needs_hidden else None
        weight_grad = torch.zeros(matrix.shape, device=weight.device) if needs_weight else None  # added up in fp32
        for start in range(0, labels.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            x = hidden_states[chunk]  # (n, C)
            chunk_loss, grad = loss_and_gradient(x, matrix, bias, labels[chunk])
            loss += chunk_loss
            if needs_hidden:
                hidden_grad[chunk] = grad @ matrix
            if needs_weight and dtype == torch.float32:
                weight_grad.addmm_(grad.t(), x)
            elif needs_weight:  # by a power of two smaller, or the sum over tokens may overflow in fp16
                weight_grad.add_(grad.t() @ (x / FP16_ROOM), alpha=FP16_ROOM)
            del grad  # or it would be there beside the next one
        ctx.save_for_backward(hidden_grad, weight_grad[: weight.shape[0]] if needs_weight else None)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        hidden_grad = None if hidden_grad is None else (hidden_grad * loss_grad).to(hidden_grad.dtype)
        weight_grad = None if weight_grad is None else (weight_grad * loss_grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None


def loss_and_gradient(x: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of n tokens, and its gradient with respect to their logits, (n, V')."""
    logits = x @ matrix.t() if bias is None else torch.addmm(bias, x, matrix.t())  # (n, V')
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    is_ignored = (labels == IGNORE_INDEX)[:, None]  # (n, 1)
    index = labels[:, None].masked_fill(is_ignored, 0)  # (n, 1)
    loss = -log_probabilities.gather(1, index).masked_fill(is_ignored, 0.0).sum()
    if torch.compiler.is_compiling():  # all of it in one kernel, which writes nothing but the gradient in 16 bits
        is_label = torch.arange(logits.shape[1], device=x.device) == index  # (n, V')
        grad = log_probabilities.exp() - is_label.to(torch.float32)
    else:
        grad = log_probabilities.exp_()  # in place: nobody needs the logarithms any more
        grad.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=grad.dtype))
    grad = grad.masked_fill_(is_ignored, 0.0)
    # Without the 1/N of a mean, which fp16 could not hold: it comes in the backward pass.
    return loss, grad.to(x.dtype)


def aligned_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight in `dtype`; if that makes a copy, with rows added up to a multiple of 64, and a bias of -inf for them.

    The lecture enlarges the vocabulary to 50,304 for the same gain, which then shows in the model's weights and logits.
    """
    V, C = weight.shape
    missing = -V % VOCABULARY_MULTIPLE
    if dtype == weight.dtype or not missing:
        return weight.to(dtype), None
    matrix = torch.zeros(V + missing, C, dtype=dtype, device=weight.device)
    matrix[:V] = weight
    bias = torch.zeros(V + missing, dtype=dtype, device=weight.device)
    bias[V:] = -torch.inf  # so that their probability is 0
    return matrix, bias
