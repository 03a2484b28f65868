"""The lecture's GPT-2, written down again in its simplest form: what our model and our loops are measured against.

The structure and the names of parameters are those of build-nanogpt's train_gpt2.py, so that our weights fit as they
are; the code is ours. Attention is written out or PyTorch's, because the lecture goes from one to the other.

B batch, T sequence, C channels, H heads, D = C / H, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, fused: bool):
        super().__init__()
        self.n_head = n_head
        self.fused = fused
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, T)
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            y = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, n_embd: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, fused: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, fused)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LectureGPT(nn.Module):
    """Token ids (B, T) to logits (B, T, V); `fused_attention`: PyTorch's kernel, which the lecture calls flash."""

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        n_embd: int,
        n_positions: int,
        vocab_size: int,
        fused_attention: bool = True,
    ):
        super().__init__()
        blocks = nn.ModuleList(Block(n_embd, n_head, fused_attention) for _ in range(n_layer))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(n_positions, n_embd),
                "h": blocks,
                "ln_f": nn.LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.transformer.wte(input_ids) + self.transformer.wpe(positions)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

    def load_weights(self, weights: dict[str, Tensor]):
        """Take weights under OpenAI's names; further rows of a larger vocabulary become 0."""
        further_rows = len(self.lm_head.weight) - len(weights["lm_head.weight"])
        tied = {
            name: nn.functional.pad(weights[name], (0, 0, 0, further_rows))
            for name in ("transformer.wte.weight", "lm_head.weight")
        }
        self.load_state_dict({**weights, **tied})


def lecture_loss(model: nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token, of logits that are all in memory; ids and targets (B, T)."""
    logits = model(input_ids)  # (B, T, V)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def generate_without_cache(model: nn.Module, input_ids: Tensor, new_tokens: int) -> Tensor:
    """The lecture's loop: the whole text once more for each token. Greedy, so that others can be compared.

    Args:
        model: A transformers model; its logits are computed at all positions, as in the lecture.
        input_ids: (B, T).

    Returns:
        (B, T + new_tokens).
    """
    for _ in range(new_tokens):
        logits = model(input_ids, use_cache=False).logits[:, -1]  # (B, V)
        input_ids = torch.cat([input_ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return input_ids
