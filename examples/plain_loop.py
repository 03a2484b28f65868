"""The lecture's training loop around our model, in one file and without Accelerate: to read first, and to change.

    python examples/plain_loop.py                       # on the quickstart's stories, minutes on a CPU
    python examples/plain_loop.py --shards data/edu     # on a folder that prepare_data.py wrote

Model, data and hyperparameters are those of `train_accelerate.py --preset quickstart --recipe lecture`, and so are the
losses.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.batches.build import load_built_in_text
from modeling_gpt2repro.data.batches.sequences import TokenSequences
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches
from modeling_gpt2repro.data.shards.dataset import open_shards

B, T = 4, 224  # micro-batch: sequences, and tokens of each, a whole story
TOKENS_PER_STEP = 1792
GRAD_ACCUM_STEPS = TOKENS_PER_STEP // (B * T)
MAX_LR, MIN_LR, WARMUP_STEPS, MAX_STEPS = 2e-3, 2e-4, 85, 800
SEED = 1337


def get_lr(step: int, max_steps: int) -> float:
    if step < WARMUP_STEPS:  # 1) linear warm-up
        return MAX_LR * (step + 1) / WARMUP_STEPS
    decay_ratio = (step - WARMUP_STEPS) / (max_steps - WARMUP_STEPS)  # 2) from 0 to 1
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * decay_ratio)) * (MAX_LR - MIN_LR)  # cosine from MAX_LR to MIN_LR


def main(argv: list[str] | None = None) -> list[float]:
    """Train, print a line per step, and return the losses in nats per token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="a folder of tokens; by default generated stories")
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS, help="optimizer steps (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        folder = Path("runs/plain_loop/data")
        dataset = open_shards(args.shards) if args.shards else load_built_in_text("stories", folder, 1536, T, 0.05)
    except ValueError as error:
        parser.error(str(error))
    config = BatchConfig(block_size=T, sequences_per_step=TOKENS_PER_STEP // T, micro_batch_size=B, seed=SEED)
    batches = ShuffledBatches(TokenSequences(dataset.shards("train"), T), config)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    torch.manual_seed(SEED)
    V = len(dataset.tokenizer)
    gpt_config = GPT2ReproConfig(vocab_size=V, n_positions=T, n_layer=4, n_head=2, n_embd=128, bos_token_id=0,
                                 eos_token_id=0, initializer_range=0.05)  # fmt: skip
    model = GPT2ReproForCausalLM(gpt_config).to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]  # decayed: matrices and embeddings
    vectors = [p for p in model.parameters() if p.ndim < 2]  # not decayed: biases and norms
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=MAX_LR, betas=(0.9, 0.95), eps=1e-8, fused=True)

    losses = []
    for step in range(args.max_steps):
        started = time.time()
        loss_accum = torch.zeros((), device=device)
        for micro_batch in batches.micro_batches(step):
            x = micro_batch["input_ids"].to(device)  # (B, T)
            y = micro_batch["shift_labels"].to(device)  # (B, T), the token after each
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                logits = model(x, use_cache=False).logits  # (B, T, V)
            # Gradients add up over micro-batches, and a sum of means is not the mean: hence the division.
            loss = F.cross_entropy(logits.view(-1, V).float(), y.view(-1)) / GRAD_ACCUM_STEPS
            loss_accum += loss.detach()
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = get_lr(step, args.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_accum.item())  # waits for the device
        speed = TOKENS_PER_STEP / (time.time() - started)
        print(f"step {step:4d} | loss {losses[-1]:.6f} | lr {lr:.4e} | norm {norm:.4f} | {speed:,.0f} tokens/s")
    title = dataset.tokenizer(
        "A story of Mila and Tom, Mrs. Plum, a fox, a bell and some honey.", return_tensors="pt"
    ).to(device)
    room = T - title.input_ids.shape[1]
    text = model.eval().generate(**title, max_new_tokens=room, do_sample=True, top_k=50, pad_token_id=0)
    print(dataset.tokenizer.decode(text[0], skip_special_tokens=True))
    return losses


if __name__ == "__main__":
    main()
