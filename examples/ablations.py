"""Famous mistakes, each beside the correct run: what do you see if one line of the training loop is wrong?

    python examples/ablations.py                    # minutes on two CPU cores; nothing is downloaded
    python examples/ablations.py --only warm-up     # one of them; MISTAKES below has all names

Read `build_model` and `train` first: there, and nowhere else, the mistakes are made, each in a line with `wrong` in it.
Everything else is the product's: its model, optimizer, schedule, order of the data and validation loss, on the
quickstart's stories, with a model half as wide. A run and its twin begin with equal weights and see equal data, and
there are --seeds such pairs, to see whether a difference is more than luck. docs/ablations.md discusses the results.
"""

import hashlib
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.batches.build import load_built_in_text
from modeling_gpt2repro.data.batches.sequences import TokenSequences, validation_batches
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.evaluation.validation import validation_loss
from modeling_gpt2repro.runs.config import make_writable
from modeling_gpt2repro.runs.plots import COLORS, STYLE, save_figure
from modeling_gpt2repro.runtime.command_line import arg, check_limits, exit_on_input_error, parse_command_line
from modeling_gpt2repro.runtime.hardware import readable_duration
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.runtime.network import choose_gloo_interface
from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.json_files import read_json_object
from modeling_gpt2repro.training.optimization import build_optimizer, learning_rate_at, set_learning_rate

# Settings

B, T = 1, 224  # micro-batch: sequences, and tokens of each, a whole story
SEQUENCES_PER_STEP = 4  # so four micro-batches a step, or two on each of two processes
SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 64}
STD = 0.05  # of the weights at the start
MAX_LR, WARMUP_SHARE = 1e-2, 0.15
BAD_BATCH = 0.6  # when it comes, as a share of the steps
DEEP = 24  # blocks of the model whose activations are measured before the training: with four, depth hardly shows
VALIDATION_TOKENS = 32 * T


@dataclass(frozen=True)
class Run:
    """One training: with a mistake or, if `wrong` is None, without."""

    wrong: str | None
    seed: int
    processes: int = 1
    bad_batch: bool = False


# The mistakes


def build_model(wrong: str | None, seed: int, vocab_size: int, **shape: int) -> GPT2ReproForCausalLM:
    """The quickstart's model, half as wide; `shape` changes it."""
    torch.manual_seed(seed)
    config = GPT2ReproConfig(vocab_size=vocab_size, n_positions=T, bos_token_id=0, eos_token_id=0,
                             initializer_range=STD, **{**SHAPE, **shape})  # fmt: skip
    model = GPT2ReproForCausalLM(config)
    if wrong == "residual-scaling":  # every c_proj is initialized like the other matrices: no 1 / sqrt(2 n_layer)
        for block in model.transformer.h:
            for c_proj in (block.attn.c_proj, block.mlp.c_proj):
                c_proj.weight.data *= math.sqrt(2 * config.n_layer)
    if wrong == "tying":  # the head is a matrix of its own, not the token embedding
        model.lm_head.weight = nn.Parameter(STD * torch.randn_like(model.lm_head.weight))
    return model


def train(run: Run, rank: int | None, steps: int, shards: Path, meeting: Path) -> dict | None:
    """Train on prepared shards; returns losses (nats per token), gradient norms and more, but None from rank 1.

    Args:
        rank: Which of the run's processes this is; None if there is only one.
        meeting: A folder that the processes share, to find each other.
    """
    wrong = run.wrong
    torch.set_num_threads(1)  # because two runs, or two processes of a run, are side by side
    PartialState(cpu=True)  # for `validation_loss`: what it measures is one process's model
    if run.processes > 1:
        if not dist.is_initialized():  # once only: gloo may hang when a group is destroyed and another one made
            choose_gloo_interface()
            store = dist.FileStore(str(meeting / "ranks"), run.processes)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=run.processes)
        rank = dist.get_rank()  # of the first run, whichever of this run's two jobs this is
    dataset = open_shards(shards)
    config = BatchConfig(T, SEQUENCES_PER_STEP, B, run.seed, process_index=rank or 0, num_processes=run.processes)
    batches = ShuffledBatches(TokenSequences(dataset.shards("train"), T), config)
    grad_accum_steps, _ = batches.micro_batch_shape
    gpt2 = build_model(wrong, run.seed, len(dataset.tokenizer))
    parameters = list(gpt2.parameters())
    optimizer = build_optimizer(gpt2, MAX_LR)
    model = ModelWithLoss(gpt2)
    if run.processes > 1:
        model = DistributedDataParallel(model)

    losses, norms, distances = [], [], []
    for step in range(steps):
        # Warm-up: in the first steps Adam's averages are of few gradients, so they say little about where to go.
        warmup_steps = 0 if wrong == "warm-up" else round(WARMUP_SHARE * steps)
        set_learning_rate(optimizer, learning_rate_at(step, steps, warmup_steps, MAX_LR, 0.1))
        loss_accum = torch.zeros(())
        for micro_step, micro_batch in enumerate(batches.micro_batches(step)):
            x, y = micro_batch["input_ids"], micro_batch["shift_labels"]  # (B, T) each; y is the token after each of x
            if wrong == "shift":  # the target is the token itself, which the model need only copy
                y = x
            if run.bad_batch and step == round(BAD_BATCH * steps):  # in both runs: a broken document, one word only
                y = torch.full_like(y, 7)
            # With DDP each backward averages the gradients over the processes. Only the last one of a step has to.
            is_last = micro_step == grad_accum_steps - 1
            if run.processes > 1 and wrong != "sync":
                model.require_backward_grad_sync = is_last
            loss = model(input_ids=x, shift_labels=y, use_cache=False).loss  # the mean over the micro-batch
            if wrong == "sync":  # too late: DDP has read it in the forward, where it still had the value of before
                model.require_backward_grad_sync = is_last
            loss_accum += loss.detach() / grad_accum_steps
            # Gradients add up in .grad, and a sum of means is not the mean.
            loss = loss if wrong == "division" else loss / grad_accum_steps
            loss.backward()
        # A bad batch can have a huge gradient: its norm is scaled down to 1.
        norms.append(nn.utils.clip_grad_norm_(parameters, math.inf if wrong == "clipping" else 1.0).item())
        optimizer.step()
        if wrong != "zero-grad":  # without this, each step adds its gradient to those of all steps before
            optimizer.zero_grad()
        losses.append(mean_over_processes(loss_accum).item())
        distances.append(distance_of_processes(parameters_to_vector(parameters).detach()))
    if rank:
        return None
    held_out = validation_batches(TokenSequences(dataset.shards("validation"), T), VALIDATION_TOKENS, 8)
    return {
        "loss": losses,
        "grad_norm": norms,
        "distance": distances,
        "spread": spread_by_depth(build_model(wrong, run.seed, len(dataset.tokenizer), n_layer=DEEP), x),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "validation_loss": validation_loss(ModelWithLoss(gpt2), held_out, torch.device("cpu"))[0],
    }


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def distance_of_processes(weights: torch.Tensor) -> float:
    """How far apart the weights (n,) of two processes are, as a share of their length; 0 if they are equal."""
    if not dist.is_initialized():
        return 0.0
    of_each = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(of_each, weights)
    return ((of_each[0] - of_each[1]).norm() / of_each[0].norm()).item()


@torch.no_grad()
def spread_by_depth(model: GPT2ReproForCausalLM, input_ids: torch.Tensor) -> list[float]:
    """Standard deviation of the residual stream after each block, for ids (B, T)."""
    spread = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, inputs, output: spread.append(output.std().item()))
    model.transformer(input_ids=input_ids)
    return spread


# What to look at


def end_of(name: str, record: dict) -> float:
    return float(np.mean(record[name][-5:]))  # a single step is noisy


def after_bad_batch(record: dict) -> float:
    bad = round(BAD_BATCH * len(record["loss"]))
    return float(np.mean(record["loss"][bad + 1 : bad + 11]))


AT_THE_END = partial(end_of, "loss")


@dataclass(frozen=True)
class Mistake:
    """Where a mistake shows: in a number, and in a series of numbers of each run, which is drawn."""

    title: str
    label: str = "training loss at the end"  # of the number
    number: Callable[[dict], float] = AT_THE_END
    series: str = "loss"
    axis: str = "training loss, nats per token"
    log: bool = False
    setting: dict = field(default_factory=dict)  # of both runs
    around_bad_batch: bool = False  # drawn from the middle on, without the bad batch, whose own loss is far above


MISTAKES = {
    "warm-up": Mistake("No warm-up: falls first, is left behind"),
    "residual-scaling": Mistake("No residual scaling: grows with depth", f"spread after block {DEEP}, at the start",
                                lambda record: record["spread"][-1], "spread", "std of the residual stream, at first"),
    "tying": Mistake("Head not tied: a third more parameters", "parameters", lambda record: record["parameters"]),
    "division": Mistake("Not divided: 4 times the gradient", "gradient norm of the first step",
                        lambda record: record["grad_norm"][0], "grad_norm", "gradient norm, unclipped", log=True),
    "sync": Mistake("Sync forgotten: two models, not one", "distance of the ranks at the end",
                    partial(end_of, "distance"), "distance", "distance of their weights", setting={"processes": 2}),
    "zero-grad": Mistake("zero_grad missing: slower"),
    "shift": Mistake("Targets not shifted: too good to be true"),
    "clipping": Mistake("One bad batch, not clipped: set back", "training loss of the 10 steps after it",
                        after_bad_batch, setting={"bad_batch": True}, around_bad_batch=True),
}  # fmt: skip


def pair(name: str, seed: int) -> tuple[Run, Run]:
    """The correct run and its twin with the mistake."""
    return tuple(Run(wrong, seed, **MISTAKES[name].setting) for wrong in (None, name))


def records_of(name: str, results: dict) -> tuple[list[dict], list[dict]]:
    """The records of all seeds whose pair is finished: of the correct runs, and of those with the mistake."""
    pairs = [pair(name, seed) for seed in range(1, results["settings"]["seeds"] + 1)]
    pairs = [runs for runs in pairs if all(repr(run) in results["runs"] for run in runs)]
    return tuple([results["runs"][repr(run)] for run in runs] for runs in zip(*pairs, strict=True))


def table(results: dict, names: list[str]) -> str:
    """A Markdown table, mean ± standard deviation over the seeds."""
    lines = ["| mistake | look at | correct | wrong | validation loss, correct | wrong |", "|---|---|---|---|---|---|"]
    for name in names:
        cells = [
            mean_and_deviation([number(record) for record in records])
            for number in (MISTAKES[name].number, lambda record: record["validation_loss"])
            for records in records_of(name, results)
        ]
        lines.append(f"| `{name}` | {MISTAKES[name].label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: list[float]) -> str:
    """[1.0, 1.2] -> '1.100 ± 0.141'; '231,616' if all are the same whole number."""
    if len(set(values)) == 1 and float(values[0]).is_integer():
        return f"{values[0]:,.0f}"
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def draw(results: dict, names: list[str]) -> Figure:
    """A panel for each mistake: every seed is a thin line, their mean a thick one."""
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with rc_context({**STYLE, "font.size": 9, "axes.titlesize": 9.5}):
        figure = Figure((max(5, 3.3 * columns), 0.4 + 2.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels[len(names) :]:
            axes.remove()
        for axes, name in zip(panels, names, strict=False):
            mistake = MISTAKES[name]
            for records, color, label in zip(records_of(name, results), COLORS, ("correct", "wrong"), strict=False):
                values = np.array([record[mistake.series] for record in records])  # (seeds, steps or blocks)
                if mistake.around_bad_batch:
                    steps = values.shape[1]
                    values[:, [*range(steps // 2), round(BAD_BATCH * steps)]] = np.nan
                axes.plot(1 + np.arange(values.shape[1]), values.T, color=color, linewidth=0.6, alpha=0.4)
                axes.plot(1 + np.arange(values.shape[1]), values.mean(0), color=color, linewidth=1.6, label=label)
            axes.set(title=mistake.title, ylabel=mistake.axis, xlabel="block" if mistake.series == "spread" else "step")
            axes.set_yscale("log" if mistake.log else "linear")
            axes.legend()
    return figure


# The command


@dataclass
class Arguments:
    only: list[str] = arg(default_factory=lambda: list(MISTAKES), help="The mistakes to make.")
    steps: int = arg(default=100, minimum=10, help="Optimizer steps of each run, of 896 tokens.")
    seeds: int = arg(default=3, minimum=1, help="Pairs of runs for each mistake.")
    shards: str | None = arg(default=None, help="A folder of tokens that prepare_data.py wrote; by default stories.")
    output_dir: str = arg(default="runs/ablations", help="Where results, table and picture go.")

    def __post_init__(self):
        problems = list(check_limits(self))
        if unknown := [name for name in self.only if name not in MISTAKES]:
            problems.append(f"only ({', '.join(unknown)}) must be of {', '.join(MISTAKES)}.")
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: list[str] | None = None):
    args = parse_command_line(Arguments, argv, description=__doc__)
    folder = Path(args.output_dir)
    with exit_on_input_error():
        make_writable(folder)
        data = Path(args.shards) if args.shards else folder / "data"
        dataset = open_shards(data) if args.shards else load_built_in_text("stories", data, 1536, T, 0.05)
        for split in ("train", "validation"):
            TokenSequences(dataset.shards(split), T, split)  # raises if there is too little
        results = read_results(folder / "results.json", args, dataset.fingerprint)
    planned = [run for seed in range(1, args.seeds + 1) for name in args.only for run in pair(name, seed)]
    missing = [run for run in dict.fromkeys(planned) if repr(run) not in results["runs"]]
    started = time.monotonic()
    try:
        for number, (run, record) in enumerate(train_all(missing, args.steps, data), 1):
            results["runs"][repr(run)] = record
            write_json(folder / "results.json", results)
            left = (len(missing) - number) * (time.monotonic() - started) / number
            print(
                f"{run.wrong or 'correct':16} seed {run.seed}: training loss {end_of('loss', record):.3f}, "
                f"validation {record['validation_loss']:.3f} | {number} of {len(missing)} runs, "
                f"{readable_duration(left)} left",
                flush=True,
            )
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {folder} has what is finished, and the same command continues.") from None
    print(table(results, args.only))
    print(f"The picture: {save_figure(draw(results, args.only), folder / 'ablations.png', dpi=100)}")


def read_results(file: Path, args: Arguments, fingerprint: str) -> dict:
    """What an earlier command has finished, if code, data and steps are still the same.

    Raises:
        ValueError: If they are not.
    """
    code = Path(__file__).read_text(encoding="utf-8").split("# What to look at")[0].split("# Settings")[1]
    settings = {"steps": args.steps, "data": fingerprint, "code": hashlib.sha256(code.encode()).hexdigest()[:12]}
    try:
        results = read_json_object(file, any_numbers=True) if file.exists() else {"settings": settings, "runs": {}}
        was = {name: results["settings"][name] for name in settings}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, or give another --output_dir.") from None
    if other := [f"{name} {was[name]}, not {settings[name]}" for name in settings if was[name] != settings[name]]:
        raise ValueError(f"{file} holds runs with {'; '.join(other)}: give another --output_dir.")
    results["settings"]["seeds"] = args.seeds
    return results


def train_all(runs: list[Run], steps: int, shards: Path) -> Iterator[tuple[Run, dict]]:
    """Yield each run with its record as soon as it is finished: two at a time, or one of two processes."""
    # Runs of two processes last, so that both of one are in the queue next to each other, and both workers free.
    jobs = [(run, None) for run in runs if run.processes == 1]
    jobs += [(run, rank) for run in runs for rank in range(run.processes) if run.processes > 1]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, or the workers would be left behind
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # the parent stops them
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as meeting, context.Pool(2, signal.signal, ignore_interrupts) as pool:
        call = partial(train_job, steps=steps, shards=shards, meeting=Path(meeting))
        yield from ((run, record) for run, record in pool.imap_unordered(call, jobs) if record is not None)


def train_job(job: tuple[Run, int | None], **settings) -> tuple[Run, dict | None]:
    record = train(*job, **settings)
    return job[0], record and {name: np.round(values, 5).tolist() for name, values in record.items()}


if __name__ == "__main__":
    main()
