"""Time our optimizer step against a plain loop around transformers' own GPT-2.

    python -m benchmarks.training_step                                      # tiny, eager, fp32
    python -m benchmarks.training_step --shape 124m --dtype bf16 --compile  # 124M as it is trained

Ours is what `train_accelerate.py` runs: Accelerator, `prepare`, `build_optimizer`, `train_step`. The other is a loop
written by hand: `GPT2LMHeadModel` without dropout, `torch.autocast`, fused AdamW with the same two groups,
`clip_grad_norm_`. Both start with the same weights and see the same sequences, so their losses must agree. They take
turns in one process, and which goes first alternates; the figure is the median of the rounds' ratios, so that a machine
that is now fast and now slow does little harm. Memory is measured in one process for each side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.harness import (
    BySide,
    add_to_file,
    in_fresh_process,
    machine_name,
    quartiles,
    result_header,
    sides_in_turn,
    timed,
)
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line
from modeling_gpt2repro.runtime.hardware import peak_memory_gb
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.outliers import OutlierDetector
from train_accelerate import train_step

MicroBatches = list[dict[str, torch.Tensor]]
Step = Callable[[MicroBatches], float]  # one optimizer step -> its loss

SIDES = ("ours", "stock")
SHAPES = {
    "toy": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64, "vocab_size": 512},
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 4096},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257},
}
BATCH_ROWS = {"cpu": {"toy": 2, "tiny": 8, "124m": 1}, "cuda": {"toy": 2, "tiny": 64, "124m": 16}}
# GPT-3, table 2.1 and appendix B; constant here, because the schedule costs nothing.
LEARNING_RATE = 6e-4
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
EPSILON = 1e-8
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 2  # compile, first allocations
SEED = 1337
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}  # else a small vocabulary gets a warning for its 50256


@dataclass
class BenchmarkArguments:
    shape: Literal["toy", "tiny", "124m"] = arg(default="tiny", help="124m: GPT-2; tiny: four layers, 256 wide.")
    compile: bool = arg(default=False, help="Compile both.")
    dtype: Literal["fp32", "bf16"] = arg(default="fp32", help="bf16: autocast, weights stay fp32.")
    rounds: int = arg(default=10, minimum=1, help="How often the two take turns.")
    steps: int = arg(default=3, minimum=1, help="Optimizer steps a turn.")
    micro_batches: int = arg(default=1, minimum=1, help="Micro-batches that a step accumulates.")
    batch_rows: int | None = arg(
        default=None, minimum=1, help="Sequences of a micro-batch; by shape and device, if not given."
    )
    stock_activation: str = arg(
        default="gelu_new", help="GPT-2's default, or gelu_pytorch_tanh: the same function in one kernel."
    )
    device: Literal["auto", "cpu", "cuda"] = arg(default="auto", help="auto: CUDA if there is a GPU.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch_rows = BATCH_ROWS[self.device][self.shape] if self.batch_rows is None else self.batch_rows
        problems = list(check_limits(self))
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("--device cuda cannot be used here: torch sees no GPU; give cpu.")
        if problems:
            raise ValueError("\n".join(problems))

    def draw_step(self, step: int) -> MicroBatches:
        """The random sequences of a step, the same for both sides."""
        shape = (self.micro_batches, self.batch_rows, SHAPES[self.shape]["n_positions"] + 1)
        generator = torch.Generator().manual_seed(SEED + step)
        ids = torch.randint(SHAPES[self.shape]["vocab_size"], shape, generator=generator)  # (micro-batches, B, T + 1)
        return [{"input_ids": part[:, :-1].contiguous(), "shift_labels": part[:, 1:].contiguous()} for part in ids]


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    packages = ("torch", "transformers", "accelerate", "numpy")
    header = result_header("training_step", argv, args, packages, device=args.device)
    memory = {side: in_fresh_process(peak_memory, side, args) for side in SIDES}
    seconds, cpu_seconds, losses = take_turns(args)
    result = header | {
        "step_seconds": {side: float(np.median(seconds[side])) / args.steps for side in SIDES},
        "stock_over_ours": {"seconds": quartiles(seconds), "cpu_seconds": quartiles(cpu_seconds)},
        "peak_memory_bytes": memory,
        "losses": losses,
        "largest_loss_difference": float(np.abs(np.subtract(losses["ours"], losses["stock"])).max()),
    }
    report(args, result)
    if args.output:
        add_to_file(Path(args.output), result)


def build_step(
    side: str, args: BenchmarkArguments, weights: dict[str, torch.Tensor] | None = None
) -> tuple[nn.Module, Step]:
    """One side's model in training mode and its step, on the device; fresh weights if none are given."""
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32, on both sides
    set_seed(SEED)
    if side == "ours":
        return build_our_step(args)
    config = GPT2Config(
        **SHAPES[args.shape],
        **NO_SPECIAL_TOKENS,
        activation_function=args.stock_activation,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        loss_type="ForCausalLM",  # the loss it takes anyway, after a warning
    )
    model = GPT2LMHeadModel(config)
    if weights:
        model.load_state_dict(weights)
    return build_stock_step(args, model.to(args.device).train())


def build_our_step(args: BenchmarkArguments) -> tuple[nn.Module, Step]:
    """As in `train_accelerate.py`."""
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision="bf16" if args.dtype == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.micro_batches, sync_with_dataloader=False
        ),
        dynamo_backend="inductor" if args.compile else None,
    )
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPES[args.shape], **NO_SPECIAL_TOKENS))
    optimizer = build_optimizer(model, LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON)
    prepared, optimizer = accelerator.prepare(ModelWithLoss(model), optimizer)
    prepared.train()
    detector = OutlierDetector(accelerator.device)

    def step(micro_batches: MicroBatches) -> float:
        tokens = sum(micro_batch["input_ids"].numel() for micro_batch in micro_batches)
        metrics = train_step(
            accelerator,
            prepared,
            optimizer,
            micro_batches,
            tokens_per_step=tokens,
            max_grad_norm=MAX_GRAD_NORM,
            detector=detector,
        )
        return torch.stack([metrics.loss, metrics.grad_norm]).tolist()[0]

    return model, step


def build_stock_step(args: BenchmarkArguments, module: nn.Module) -> tuple[nn.Module, Step]:
    """A plain loop's step."""
    groups = [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    model = torch.compile(module) if args.compile else module

    def step(micro_batches: MicroBatches) -> float:
        losses = []
        for micro_batch in micro_batches:
            ids = micro_batch["input_ids"].to(args.device, non_blocking=True)
            targets = micro_batch["shift_labels"].to(args.device, non_blocking=True)
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
                # `labels` only switches the loss on; with `shift_labels` beside it nothing is shifted or copied.
                loss = model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        grad_norm = nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        grad_norm.item()
        return torch.stack(losses).mean().item()

    return module, step


def stock_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our weights under stock's names, which are ours, in its shapes: its `Conv1D` is a transposed `Linear`."""
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: w.t() if name.endswith(conv1d) else w for name, w in model.state_dict().items()}


def take_turns(args: BenchmarkArguments) -> tuple[BySide, BySide, BySide]:
    """Seconds of each turn, seconds of processor time in it, and the loss of each step; each by side."""
    model, our_step = build_step("ours", args)
    steps = {"ours": our_step, "stock": build_step("stock", args, stock_weights(model))[1]}
    seconds = {side: [] for side in SIDES}
    cpu_seconds = {side: [] for side in SIDES}
    losses = {side: [steps[side](args.draw_step(number)) for number in range(WARMUP_STEPS)] for side in SIDES}
    for number in range(args.rounds):
        first_step = WARMUP_STEPS + number * args.steps
        batches = [args.draw_step(step) for step in range(first_step, first_step + args.steps)]
        for side in sides_in_turn(SIDES, number):
            with timed(seconds[side], cpu_seconds[side]):
                losses[side] += [steps[side](micro_batches) for micro_batches in batches]
                if args.device == "cuda":
                    torch.cuda.synchronize()  # the last update
    return seconds, cpu_seconds, losses


def peak_memory(side: str, args: BenchmarkArguments) -> int:
    """Bytes of weights, gradients, optimizer and activations over a few steps; on a CPU, what the process grew by."""
    cpu = torch.device("cpu")
    before_gb = peak_memory_gb(cpu)
    _, step = build_step(side, args)
    for number in range(WARMUP_STEPS + 1):
        step(args.draw_step(number))
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return round(1e9 * (peak_memory_gb(cpu) - before_gb))


def report(args: BenchmarkArguments, result: dict):
    """Print a table, and the result in one sentence."""
    seconds = result["step_seconds"]
    memory = result["peak_memory_bytes"]
    losses = result["losses"]
    ratio = result["stock_over_ours"]["seconds"]
    cpu_ratio = result["stock_over_ours"]["cpu_seconds"]
    tokens = args.micro_batches * args.batch_rows * SHAPES[args.shape]["n_positions"]
    mode = f"{args.dtype}, {'compiled' if args.compile else 'eager'}"
    rounds = f"{args.rounds} rounds of {args.steps} steps"
    print(f"{args.shape}, {mode}, {tokens:,} tokens a step, {rounds}; {machine_name(result['machine'])}\n")
    print(f"{'':6} {'ms a step':>10} {'tokens/s':>10} {'peak MB':>9} {'first loss':>11} {'last loss':>11}")
    for side in SIDES:
        print(
            f"{side:6} {1000 * seconds[side]:10.1f} {tokens / seconds[side]:10,.0f} {memory[side] / 1e6:9,.0f} "
            f"{losses[side][0]:11.6f} {losses[side][-1]:11.6f}"
        )
    print(
        f"\nours is {ratio['median']:.3f} times as fast (quartiles {ratio['lower_quartile']:.3f} to "
        f"{ratio['upper_quartile']:.3f}; by processor time {cpu_ratio['median']:.3f}), takes "
        f"{memory['ours'] / memory['stock']:.3f} times the memory; {len(losses['ours'])} losses differ by at most "
        f"{result['largest_loss_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
