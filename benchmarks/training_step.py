"""Time our optimizer step against the loops that others would write: the same weights, sequences and losses.

    python -m benchmarks.training_step                                      # tiny, eager, fp32
    python -m benchmarks.training_step --against stock lecture trainer      # all of them
    python -m benchmarks.training_step --shape 124m --dtype bf16 --compile  # 124M as it is trained

| side    | model                                | loop                                                      |
|---------|--------------------------------------|-----------------------------------------------------------|
| ours    | ours                                 | what `train_accelerate.py` runs, `train_step`             |
| stock   | transformers' GPT2LMHeadModel        | written by hand, fused AdamW                              |
| trainer | the same                             | transformers' Trainer, fused AdamW                        |
| lecture | the lecture's, peers/lecture_gpt.py  | the lecture's, with AdamW fused on CUDA only, as it has it |

All clip the gradient, decay the same tensors and compute the whole loss. Each has a process of its own. They take
turns, and which goes first alternates; the figure is the median of the rounds' ratios, so that a machine that is now
fast and now slow does little harm. A step that computes something else than ours ends the benchmark: its losses differ.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
    choose_device,
    kept_process,
    machine_name,
    quartiles,
    result_header,
    sides_in_turn,
    timed,
)
from benchmarks.peers.lecture_gpt import LectureGPT, lecture_loss
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line
from modeling_gpt2repro.runtime.hardware import flops_per_token, peak_memory_gb
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.outliers import OutlierDetector
from train_accelerate import train_step

MicroBatches = list[dict[str, torch.Tensor]]
Step = Callable[[MicroBatches], float | torch.Tensor]  # an optimizer step -> its loss
Weights = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]  # of model, ids and targets (B, T)

PEERS = ("stock", "lecture", "trainer")
SHAPES = {
    "toy": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64, "vocab_size": 512},
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 4096},
    # For the speed ladder on a CPU: an odd vocabulary with 30 % of the weights, and attention over many positions, as
    # GPT-2 124M has them.
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 512, "vocab_size": 5027},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257},
}
BATCH_ROWS = {
    "cpu": {"toy": 2, "tiny": 8, "small": 2, "124m": 1},
    "cuda": {"toy": 2, "tiny": 64, "small": 32, "124m": 16},
}
# GPT-3, table 2.1 and appendix B; constant here, because the schedule costs nothing.
LEARNING_RATE = 6e-4
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
EPSILON = 1e-8
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 2  # compile, first allocations
SEED = 1337
FLOPS_CONVENTION = "6 N + 12 L C T a token (PaLM, appendix B), N without the position embedding"
# Absolute, in nats, for losses near ln(vocabulary): largest seen 2e-6 and 8e-4. Without an update they differ by 0.1.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None}  # else a small vocabulary gets a warning for its 50256


@dataclass
class BenchmarkArguments:
    shape: Literal["toy", "tiny", "small", "124m"] = arg(
        default="tiny", help="124m: GPT-2; tiny: four layers, 256 wide; small: tiny, with longer sequences."
    )
    compile: bool = arg(default=False, help="Compile both.")
    dtype: Literal["fp32", "bf16"] = arg(default="fp32", help="bf16: autocast, weights stay fp32.")
    against: list[str] = arg(default_factory=lambda: ["stock"], help="Whose step: stock, lecture, trainer.")
    rounds: int = arg(default=10, minimum=1, help="How often they take turns.")
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
        problems = [*check_limits(self), *choose_device(self)]
        if unknown := [peer for peer in self.against if peer not in PEERS]:
            problems.append(f"against ({', '.join(unknown)}) must be of {', '.join(PEERS)}.")
        if problems:
            raise ValueError("\n".join(problems))
        self.batch_rows = BATCH_ROWS[self.device][self.shape] if self.batch_rows is None else self.batch_rows

    @property
    def sides(self) -> tuple[str, ...]:
        return ("ours", *self.against)

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.batch_rows * SHAPES[self.shape]["n_positions"]

    def draw_step(self, step: int) -> MicroBatches:
        """The sequences of a step, the same for all sides."""
        return draw_step(SHAPES[self.shape], self.micro_batches, self.batch_rows, step)


def draw_step(shape: dict[str, int], micro_batches: int, batch_rows: int, step: int) -> MicroBatches:
    """Random sequences. Small ids are frequent, so that there is much to learn."""
    size = (micro_batches, batch_rows, shape["n_positions"] + 1)
    generator = torch.Generator().manual_seed(SEED + step)
    ids = (shape["vocab_size"] * torch.rand(size, generator=generator) ** 4).long()  # (micro-batches, B, T + 1)
    return [{"input_ids": part[:, :-1].contiguous(), "shift_labels": part[:, 1:].contiguous()} for part in ids]


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    packages = ("torch", "transformers", "accelerate", "numpy")
    header = result_header("training_step", argv, args, packages, device=args.device)
    seconds, cpu_seconds, losses, memory = take_turns(args)
    differences = {peer: compare_losses(losses["ours"], losses[peer], peer, args.dtype) for peer in args.against}
    result = header | {
        "step_seconds": {side: float(np.median(seconds[side])) / args.steps for side in args.sides},
        "flops": {"per_step": args.tokens_per_step * shape_flops(args.shape), "convention": FLOPS_CONVENTION},
        **{
            f"{peer}_over_ours": {"seconds": quartiles(seconds, peer), "cpu_seconds": quartiles(cpu_seconds, peer)}
            for peer in args.against
        },
        "peak_memory_bytes": memory,
        "losses": losses,
        "largest_loss_difference": max(differences.values(), default=0.0),
    }
    report(args, result)
    if args.output:
        add_to_file(Path(args.output), result)


def shape_flops(shape: str) -> int:
    """Operations per token, by FLOPS_CONVENTION."""
    with torch.device("meta"):
        model = LectureGPT(**SHAPES[shape])
    n_layer, n_embd, n_positions = (SHAPES[shape][name] for name in ("n_layer", "n_embd", "n_positions"))
    parameters = sum(parameter.numel() for parameter in model.parameters()) - n_positions * n_embd
    return flops_per_token(parameters, n_layer, n_embd, n_positions)


def compare_losses(ours: list[float], others: list[float], name: str, dtype: str) -> float:
    """The largest difference; a step that computes something else ends the program."""
    difference = float(np.abs(np.subtract(ours, others)).max())
    if not difference <= LOSS_TOLERANCE[dtype]:  # NaN, too
        raise SystemExit(
            f"{name} computes something else: its losses are up to {difference:.1e} nats from ours, more than "
            f"{LOSS_TOLERANCE[dtype]:g} in {dtype}; nothing was written."
        )
    return difference


def build_step(side: str, args: BenchmarkArguments) -> Step:
    """One side's step, its model on the device in training mode. All begin with the same weights."""
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32, on all sides
    shape = SHAPES[args.shape]
    setting = {"device": args.device, "dtype": args.dtype, "compiled": args.compile}
    if side == "ours":
        return build_our_step(shape, micro_batches=args.micro_batches, **setting)
    weights = initial_weights(shape)
    if side == "lecture":
        model = LectureGPT(**shape)
        model.load_weights(weights)
        return build_plain_step(model.to(args.device), lecture_loss, fused=args.device == "cuda", **setting)
    model = build_stock_model(shape, args.stock_activation, weights).to(args.device)
    if side == "stock":
        return build_plain_step(model, stock_loss, fused=True, **setting)
    return build_trainer_step(model, args)


def build_our_model(shape: dict[str, int], **more: float) -> GPT2ReproForCausalLM:
    """Our model with fresh weights; `more` of its config."""
    set_seed(SEED)
    return GPT2ReproForCausalLM(GPT2ReproConfig(**shape, **NO_SPECIAL_TOKENS, **more))


def initial_weights(shape: dict[str, int]) -> Weights:
    """Those that our model begins with."""
    return build_our_model(shape).state_dict()


def build_our_step(shape: dict[str, int], *, micro_batches: int, device: str, dtype: str, compiled: bool) -> Step:
    """As in `train_accelerate.py`."""
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if dtype == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=micro_batches, sync_with_dataloader=False),
        dynamo_backend="inductor" if compiled else None,
    )
    model = build_our_model(shape)
    optimizer = build_optimizer(model, LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON)
    model, optimizer = accelerator.prepare(ModelWithLoss(model), optimizer)
    model.train()
    detector = OutlierDetector(accelerator.device)

    def step(micro_batches: MicroBatches) -> torch.Tensor:
        tokens = sum(micro_batch["input_ids"].numel() for micro_batch in micro_batches)
        metrics = train_step(
            accelerator,
            model,
            optimizer,
            micro_batches,
            tokens_per_step=tokens,
            max_grad_norm=MAX_GRAD_NORM,
            detector=detector,
        )
        return metrics.loss

    return step


def build_stock_model(shape: dict[str, int], activation: str, weights: Weights) -> GPT2LMHeadModel:
    """Stock GPT-2 without dropout. Our weights have its names; its `Conv1D` is a transposed `Linear`."""
    config = GPT2Config(
        **shape,
        **NO_SPECIAL_TOKENS,
        activation_function=activation,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # the loss it takes anyway, after a warning
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    model.load_state_dict({name: w.t() if name.endswith(conv1d) else w for name, w in weights.items()})
    return model


def stock_loss(model: nn.Module, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # `labels` only switches the loss on; with `shift_labels` beside it nothing is shifted or copied.
    return model(input_ids=input_ids, labels=targets, shift_labels=targets, use_cache=False).loss


def build_plain_step(module: nn.Module, loss_of: Loss, *, fused: bool, device: str, dtype: str, compiled: bool) -> Step:
    """The step of a loop that is written by hand and prints loss and gradient norm after each one, as the lecture's."""
    groups = [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=fused)
    module.train()
    model = torch.compile(module) if compiled else module

    def step(micro_batches: MicroBatches) -> float:
        losses = []
        for micro_batch in micro_batches:
            ids = micro_batch["input_ids"].to(device, non_blocking=True)
            targets = micro_batch["shift_labels"].to(device, non_blocking=True)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16"):
                loss = loss_of(model, ids, targets)
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        grad_norm = nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        grad_norm.item()
        return torch.stack(losses).mean().item()

    return step


def build_trainer_step(model: GPT2LMHeadModel, args: BenchmarkArguments) -> Step:
    """Trainer draws the sequences by itself, in the same order, so its step ignores those that it is given."""
    from benchmarks.peers.hf_trainer import build_trainer  # importing Trainer takes seconds

    def rows_of(step: int) -> Iterator[dict[str, torch.Tensor]]:
        for micro_batch in args.draw_step(step):
            for ids, targets in zip(micro_batch["input_ids"], micro_batch["shift_labels"], strict=True):
                yield {"input_ids": ids, "labels": targets, "shift_labels": targets}

    trainer = build_trainer(
        model,
        rows_of,
        batch_rows=args.batch_rows,
        micro_batches=args.micro_batches,
        device=args.device,
        bf16=args.dtype == "bf16",
        compiled=args.compile,
        optimizer={
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "adam_epsilon": EPSILON,
            "max_grad_norm": MAX_GRAD_NORM,
        },
    )
    return lambda _: trainer.step()


def build_turn(side: str, args: BenchmarkArguments) -> Callable[[int, int], tuple[float, float, list[float], int]]:
    """In the side's own process: a function from first step and steps to seconds, CPU seconds, losses, peak bytes."""
    if side == "trainer":
        import benchmarks.peers.hf_trainer  # noqa: F401 (its libraries are not what its step takes)
    before_gb = peak_memory_gb(torch.device("cpu"))
    step = build_step(side, args)

    def turn(first_step: int, steps: int) -> tuple[float, float, list[float], int]:
        batches = [args.draw_step(number) for number in range(first_step, first_step + steps)]
        seconds, cpu_seconds = [], []
        with timed(seconds, cpu_seconds):
            losses = [step(micro_batches) for micro_batches in batches]
            if args.device == "cuda":
                torch.cuda.synchronize()  # the last update
        if args.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # the other sides need the memory
        else:
            peak = round(1e9 * (peak_memory_gb(torch.device("cpu")) - before_gb))
        return seconds[0], cpu_seconds[0], [float(loss) for loss in losses], peak

    return turn


def take_turns(args: BenchmarkArguments) -> tuple[BySide, BySide, BySide, dict[str, int]]:
    """Seconds and processor seconds of each turn, the loss of each step, and the peak memory in bytes; by side.

    Memory is that of weights, gradients, optimizer and activations; on a CPU, what the process grew by.
    """
    seconds = {side: [] for side in args.sides}
    cpu_seconds = {side: [] for side in args.sides}
    losses = {side: [] for side in args.sides}
    memory = {}
    # A GPU's memory has been given back since the last turn: a step that is not timed gets it again.
    untimed = 1 if args.device == "cuda" else 0
    with ExitStack() as stack:
        turns = {side: stack.enter_context(kept_process(build_turn, side, args)) for side in args.sides}
        for side in args.sides:
            losses[side] += turns[side](0, WARMUP_STEPS)[2]
        for number in range(args.rounds):
            first_step = WARMUP_STEPS + number * (untimed + args.steps)
            for side in sides_in_turn(args.sides, number):
                if untimed:
                    losses[side] += turns[side](first_step, untimed)[2]
                wall, cpu, found, memory[side] = turns[side](first_step + untimed, args.steps)
                seconds[side].append(wall)
                cpu_seconds[side].append(cpu)
                losses[side] += found
    return seconds, cpu_seconds, losses, memory


def report(args: BenchmarkArguments, result: dict):
    """Print a table, and the comparison with each peer in one sentence."""
    seconds = result["step_seconds"]
    memory = result["peak_memory_bytes"]
    losses = result["losses"]
    mode = f"{args.dtype}, {'compiled' if args.compile else 'eager'}"
    rounds = f"{args.rounds} rounds of {args.steps} steps"
    print(
        f"{args.shape}, {mode}, {args.tokens_per_step:,} tokens a step, {rounds}; {machine_name(result['machine'])}\n"
    )
    print(
        f"{'':7} {'ms a step':>10} {'tokens/s':>10} {'GFLOP/s':>8} {'peak MB':>9} {'first loss':>11} {'last loss':>11}"
    )
    for side in args.sides:
        print(
            f"{side:7} {1000 * seconds[side]:10.1f} {args.tokens_per_step / seconds[side]:10,.0f} "
            f"{result['flops']['per_step'] / seconds[side] / 1e9:8,.0f} {memory[side] / 1e6:9,.0f} "
            f"{losses[side][0]:11.6f} {losses[side][-1]:11.6f}"
        )
    print(f"\nFLOPs: {FLOPS_CONVENTION}")
    for peer in args.against:
        ratio = result[f"{peer}_over_ours"]["seconds"]
        print(
            f"ours is {ratio['median']:.3f} times as fast as {peer} (quartiles {ratio['lower_quartile']:.3f} to "
            f"{ratio['upper_quartile']:.3f}; by processor time "
            f"{result[f'{peer}_over_ours']['cpu_seconds']['median']:.3f}), takes {memory['ours'] / memory[peer]:.3f} "
            f"times the memory; {len(losses['ours'])} losses differ by at most "
            f"{np.abs(np.subtract(losses['ours'], losses[peer])).max():.1e}"
        )


if __name__ == "__main__":
    main()
