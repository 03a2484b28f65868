"""How many tokens does each recipe need for the loss of the lecture's? Measured at toy size, on real text.

    python -m benchmarks.recipes --workers 2     # half an hour of processor time; two runs side by side
    python -m benchmarks.recipes --tune          # only the learning rates

First each recipe gets a learning rate of its own: powers of two, tried with one seed, further until the best has a
worse neighbor on both sides. Then every recipe is trained with other seeds, which decide weights and order of the data,
on the same text. A schedule that falls to zero cannot be read off in the middle, so each length is a run of its own
from its warm-up to its end. Every finished run is in the results file at once: stopped by Ctrl-C, the same command
continues, and with more seeds or shares only what is missing is trained.

From the results it draws a picture and writes the table of docs/recipes.md.
"""

import multiprocessing
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator

from benchmarks.harness import result_header
from benchmarks.reports.page import split_page, write_into_page
from benchmarks.reports.recipes_report import MARKERS, TUNING_SEED, draw, rates_to_try, table, tuned_rate
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.batches.build import build_shuffled_data, load_built_in_text
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.evaluation.validation import validation_loss
from modeling_gpt2repro.runs.plots import save_figure
from modeling_gpt2repro.runtime.command_line import arg, check_limits, exit_on_input_error, parse_command_line
from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.json_files import read_json_object
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.optimization import build_optimizer, scheduled_learning_rate, set_learning_rate
from modeling_gpt2repro.training.outliers import OutlierDetector
from modeling_gpt2repro.training.presets import PRESETS
from modeling_gpt2repro.training.recipes import RECIPES
from train_accelerate import train_step

TEXT = "python-prose"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 128}
VOCAB_SIZE = 2048
BLOCK_SIZE = 128
TOKENS_PER_STEP = 1024
VALIDATION_SHARE = 0.05
WARMUP_SHARE = 0.0375  # of the lecture's recipe: 375 M of 10 B tokens
EVALUATIONS = 6  # in the longest runs, for the curves of the picture


@dataclass
class BenchmarkArguments:
    recipes: list[str] = arg(default_factory=lambda: list(RECIPES), help="Which to train; the others keep their runs.")
    seeds: int = arg(default=5, minimum=2, help="Runs of each recipe and length, with the seeds 1, 2, ...")
    steps: int = arg(default=480, minimum=1, help="Optimizer steps of 1,024 tokens of the lecture's recipe.")
    fast_adamw_shares: list[float] = arg(
        default_factory=lambda: [0.65, 0.8], help="Shorter runs of fast-adamw, as shares of the steps."
    )
    muon_shares: list[float] = arg(
        default_factory=lambda: [0.2, 0.3, 0.5], help="Shorter runs of muon, as shares of the steps."
    )
    eval_tokens: int = arg(default=28_672, minimum=BLOCK_SIZE, help="Tokens of validation.")
    tune: bool = arg(default=False, help="Stop when each recipe has its learning rate.")
    threads: int = arg(default=1, minimum=1, help="Threads of each run.")
    workers: int = arg(default=1, minimum=1, help="Runs side by side.")
    output: str = arg(default="benchmarks/results/recipes_cpu.json", help="The results; continued if it exists.")
    picture: str = arg(default="docs/images/recipes.png", help="The picture, .png or .svg.")
    page: str = arg(default="docs/recipes.md", help="The page whose table is written.")

    def __post_init__(self):
        problems = list(check_limits(self))
        if unknown := sorted(set(self.recipes) - set(RECIPES)):
            problems.append(f"recipes ({', '.join(unknown)}) must be of {', '.join(RECIPES)}.")
        for name in ("fast_adamw_shares", "muon_shares"):
            if wrong := [share for share in getattr(self, name) if not 1 <= share * self.steps < self.steps]:
                given = ", ".join(f"{share:g}" for share in wrong)
                problems.append(
                    f"{name} ({given}) must be below 1, always trained anyway, and at least one of {self.steps} steps."
                )
        if Path(self.picture).suffix not in (".png", ".svg"):
            problems.append(f"picture ({self.picture}) must end in .png or .svg.")
        if problems:
            raise ValueError("\n".join(problems))

    def lengths(self, recipe: str) -> list[int]:
        """Steps of each of the recipe's lengths."""
        shares = {"fast-adamw": self.fast_adamw_shares, "muon": self.muon_shares}.get(recipe, [])
        return sorted({round(share * self.steps) for share in shares} | {self.steps})


@dataclass(frozen=True)
class Run:
    """One training, from its first step to the end of its schedule."""

    recipe: str
    learning_rate: float
    steps: int
    seed: int


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    torch.set_num_threads(args.threads)
    header = result_header("recipes", argv, args, ("torch", "transformers", "accelerate", "numpy"))
    file = Path(args.output)
    with exit_on_input_error():
        split_page(Path(args.page), MARKERS)  # an error comes now, not after half an hour
        results = read_results(file)
        try:
            if missing_runs(args, results["runs"]):
                train_missing(args, results, header)
        except KeyboardInterrupt:
            raise SystemExit(f"stopped; {file} has what is finished, and the same command continues.") from None
        if args.tune:
            return print("\n".join(f"{recipe}: {tuned_rate(recipe, results['runs'])}" for recipe in args.recipes))
        text = table(results)
    print(text)
    save_figure(draw(results), Path(args.picture))
    write_into_page(Path(args.page), MARKERS, text)


# What to train


def read_results(file: Path) -> dict:
    """What earlier commands have written; `runs` is empty if there is no such file."""
    try:
        return read_json_object(file, any_numbers=True) if file.exists() else {"runs": []}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, or give another --output.") from None


def train_missing(args: BenchmarkArguments, results: dict, header: dict):
    """Train what is planned and not in the results yet, and write them after every run.

    Raises:
        ValueError: If they are of other settings, another machine, version or text.
    """
    records = results["runs"]
    file = Path(args.output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        dataset = load_built_in_text(TEXT, Path(folder) / "data", VOCAB_SIZE, BLOCK_SIZE, VALIDATION_SHARE)
        describe(results, args, header, dataset.fingerprint)
        started = time.monotonic()
        finished_steps = 0
        while missing := missing_runs(args, records):
            for record in train_all(missing, args, dataset.folder):
                records.append(record)
                write_json(file, results)
                finished_steps += record["steps"]
                left = steps_left(args, records) * (time.monotonic() - started) / finished_steps
                print(
                    f"{record['recipe']:10}  rate {record['learning_rate']:<7g} {record['steps']:4} steps, seed "
                    f"{record['seed']}: loss {record['loss']:.4f} ({record['cpu_seconds']:.0f} s of processor time); "
                    f"{left / 60:.0f} min left",
                    flush=True,
                )


def describe(results: dict, args: BenchmarkArguments, header: dict, fingerprint: str):
    """Write into the results how they are measured, or see that they were measured so."""
    sizes = {"vocab_size": VOCAB_SIZE, "block_size": BLOCK_SIZE, "tokens_per_step": TOKENS_PER_STEP, **SHAPE}
    settings = {"steps": args.steps, "eval_tokens": args.eval_tokens, **sizes, "text": TEXT, "data": fingerprint}
    machine = {name: value for name, value in header["machine"].items() if name != "load_average_before"}
    for name, now in (("settings", settings), ("machine", machine), ("versions", header["versions"])):
        was = results.setdefault(name, now)
        if other := [f"{key} {was.get(key)}, not {now[key]}" for key in now if was.get(key) != now[key]]:
            raise ValueError(f"{args.output} has runs with other {name} ({'; '.join(other)}): give another --output.")
    results["commands"] = list(dict.fromkeys([*results.get("commands", []), header["command"]]))
    results["runs"] = results.pop("runs")  # last in the file


def missing_runs(args: BenchmarkArguments, records: list[dict]) -> list[Run]:
    """What can be trained next: the rates to try and, of recipes whose rate is known, all seeds and lengths."""
    planned = []
    for recipe in args.recipes:
        rate = tuned_rate(recipe, records)
        if rate is None:
            planned += [Run(recipe, r, args.steps, TUNING_SEED) for r in rates_to_try(recipe, records)]
        elif not args.tune:
            seeds = range(1, args.seeds + 1)
            planned += [Run(recipe, rate, steps, seed) for seed in seeds for steps in args.lengths(recipe)]
    done = {Run(**{name: record[name] for name in Run.__dataclass_fields__}) for record in records}
    return sorted((run for run in planned if run not in done), key=lambda run: run.seed)


def steps_left(args: BenchmarkArguments, records: list[dict]) -> int:
    """Of all missing runs, where a recipe without a rate needs no more tries than its next ones."""
    untuned = [recipe for recipe in args.recipes if tuned_rate(recipe, records) is None and not args.tune]
    later = sum(args.seeds * sum(args.lengths(recipe)) for recipe in untuned)
    return later + sum(run.steps for run in missing_runs(args, records))


# Training


def train_all(runs: list[Run], args: BenchmarkArguments, folder: Path) -> Iterator[dict]:
    """Yield the record of each run as soon as it is finished."""
    train = partial(train_run, args=args, folder=folder)
    if args.workers == 1:
        yield from map(train, runs)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, or the workers would be left behind
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # the parent stops them
    with multiprocessing.get_context("spawn").Pool(args.workers, signal.signal, ignore_interrupts) as pool:
        yield from pool.imap_unordered(train, runs)


def train_run(run: Run, args: BenchmarkArguments, folder: Path) -> dict:
    """Train on the shards in `folder`; returns the run with its validation losses, in nats per token."""
    started = time.process_time()
    torch.set_num_threads(args.threads)
    flags = train_arguments(run, args.steps)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    sequences = flags.sequences_per_step
    config = BatchConfig(BLOCK_SIZE, sequences_per_step=sequences, micro_batch_size=sequences, seed=run.seed)
    data = build_shuffled_data(open_shards(folder), config, args.eval_tokens)
    torch.manual_seed(run.seed)
    ids = {"bos_token_id": data.tokenizer.bos_token_id, "eos_token_id": data.tokenizer.eos_token_id}
    shape = GPT2ReproConfig(vocab_size=len(data.tokenizer), n_positions=BLOCK_SIZE, **SHAPE, **ids)
    model = GPT2ReproForCausalLM(shape)
    optimizer = build_optimizer(
        model,
        flags.learning_rate,
        weight_decay=flags.weight_decay,
        betas=(flags.adam_beta1, flags.adam_beta2),
        epsilon=flags.adam_epsilon,
        optimizer=flags.optimizer,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    detector = OutlierDetector(accelerator.device)
    curve = []  # tokens and loss
    for step in range(run.steps + 1):
        if step % max(1, args.steps // EVALUATIONS) == 0 or step == run.steps:
            batches = data.validation_batches(args.eval_tokens, sequences)
            curve.append([step * TOKENS_PER_STEP, validation_loss(model, batches, accelerator.device)[0]])
        if step < run.steps:
            set_learning_rate(optimizer, scheduled_learning_rate(flags.schedule, step))
            train_step(
                accelerator,
                model,
                optimizer,
                data.batches.micro_batches(step),
                tokens_per_step=TOKENS_PER_STEP,
                max_grad_norm=flags.max_grad_norm,
                detector=detector,
            )
    return {**asdict(run), "loss": curve[-1][1], "curve": curve, "cpu_seconds": time.process_time() - started}


def train_arguments(run: Run, longest_steps: int) -> TrainArguments:
    """The arguments of `train_accelerate.py --recipe ...` at this size."""
    # In tokens a recipe's warm-up is the same for every length, as it is with --train_tokens.
    warmup_tokens = WARMUP_SHARE * RECIPES[run.recipe].warmup_factor * longest_steps * TOKENS_PER_STEP
    flags = {
        **SHAPE,
        "recipe": run.recipe,
        "learning_rate": run.learning_rate,
        "warmup_tokens": round(warmup_tokens),
        "train_tokens": run.steps * TOKENS_PER_STEP,
        "tokens_per_step": TOKENS_PER_STEP,
        "block_size": BLOCK_SIZE,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return parse_command_line(TrainArguments, words, PRESETS)


if __name__ == "__main__":
    main()
