"""Run the benchmarks, at a size that fits this machine, and write what they measured into one file.

    python -m benchmarks                                # all that is not in benchmarks/results/<machine>.json yet
    python -m benchmarks --only generation training_step
    python -m benchmarks --quick                        # toy sizes, a minute: whether they run, not how fast

Each benchmark is a program of its own (`python -m benchmarks.generation --help`), which compares ours with other code
in one run: medians of rounds in which the sides take turns, and the same losses, tokens, samples or predictions, or no
result. It runs in a process of its own and adds its result to the file when it is done, so an interruption loses only
what was running: the same command continues with what is missing. A new version of torch or another machine is a
reason to measure again. Not among them are first_model and recipes, which are lessons and take half an hour each.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.harness import machine, machine_name, read_results, run_program, was_measured
from benchmarks.reports.page import split_page, write_into_page
from benchmarks.reports.results_table import MARKERS, table
from modeling_gpt2repro.runtime.command_line import arg, exit_on_input_error, parse_command_line

NAMES = ("training_step", "speed_ladder", "generation", "hellaswag", "rows", "prepare", "kill_resume")
SLOW_START = ("prepare", "kill_resume")  # they start whole programs, which alone takes a minute
QUICK_DATA = "build/benchmarks"
FOLDER = Path(__file__).parent / "results"
PEERS = ("--against", "stock", "lecture", "trainer")


@dataclass
class BenchmarksArguments:
    only: list[str] | None = arg(default=None, help=f"Only these of {', '.join(NAMES)}.")
    quick: bool = arg(default=False, help=f"Toy sizes, to see that they run; without {' and '.join(SLOW_START)}.")
    again: bool = arg(default=False, help="Measure again what is in the file.")
    output: str | None = arg(default=None, help="The results; if not given, a file named after the machine.")
    page: str | None = arg(default=None, help="Write the table into this page, between its markers.")

    def __post_init__(self):
        allowed = [name for name in NAMES if not self.quick or name not in SLOW_START]
        if unknown := [name for name in self.only or () if name not in allowed]:
            what = "only, with --quick," if self.quick else "only"
            raise ValueError(f"{what} ({', '.join(unknown)}) must be of {', '.join(allowed)}.")


@dataclass(frozen=True)
class Part:
    """A benchmark's module and its flags; `data`: flags of generated_data, which makes what it reads."""

    name: str
    flags: tuple[str, ...]
    data: tuple[str, ...] = ()


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarksArguments, argv, description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suffix = "-quick" if args.quick else ""
    file = Path(args.output) if args.output else FOLDER / f"{file_name(machine_name(machine(device)))}{suffix}.json"
    with exit_on_input_error():
        if args.page:
            split_page(Path(args.page), MARKERS)  # an error comes now, not after half an hour
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
        parts = quick_plan() if args.quick else full_plan(gpu_bytes)
        parts = [part for part in parts if not args.only or part.name in args.only]
        try:
            failed = [part for part in parts if not run_part(part, file, device, args.again)]
        except KeyboardInterrupt:
            raise SystemExit(f"stopped; {file} has what is finished, and the same command continues.") from None
        results = read_results(file)
    text = table(results)
    print(f"\n{file}:\n\n{text}")
    if args.page and results:
        write_into_page(Path(args.page), MARKERS, text)
    if failed:
        names = ", ".join(dict.fromkeys(part.name for part in failed))
        raise SystemExit(f"no result of {names}: see its error above; the same command tries it again.")


def file_name(machine: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3'."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def full_plan(gpu_bytes: int | None) -> Iterator[Part]:
    """On a GPU the model is GPT-2 124M in bf16; a CPU gets small ones, but where 124M is a matter of minutes."""
    if gpu_bytes:
        rows = rows_that_fit(gpu_bytes)
        setting = ("--shape", "124m", "--dtype", "bf16", "--batch_rows", str(rows))
        yield Part("training_step", (*setting, *PEERS))
        yield Part("training_step", (*setting, "--compile", *PEERS))
        yield Part("speed_ladder", ("--batch_rows", str(rows)))
        yield Part("generation", ("--new_tokens", "248"))
        yield Part("hellaswag", ("--rows", "2000", "--dtype", "bf16"))
    else:
        yield Part("training_step", PEERS)
        yield Part("training_step", ("--compile", *PEERS))
        yield Part("speed_ladder", ())
        yield Part("generation", ())
        yield Part("hellaswag", ("--rows", "24"))
    yield Part("rows", ())
    yield Part("prepare", ("--megabytes", "50", "--large_megabytes", "0", "--workers", "2", "--rounds", "3"))
    yield Part("kill_resume", ("--kills", "4", "--steps", "160"))


def rows_that_fit(total_bytes: int) -> int:
    """Sequences of 1,024 tokens, the lecture's 16 at most: about 2 GB each in eager fp32, besides eight models."""
    rows = (total_bytes / 1e9 - 14) / 2.2
    return max(count for count in (1, 2, 4, 8, 16) if count <= max(1, rows))


def quick_plan() -> Iterator[Part]:
    """The same programs at toy size, on a CPU, with data that mean nothing."""
    toy = ("--shape", "toy", "--rounds", "1", "--device", "cpu")
    data = ("--output_dir", QUICK_DATA, "--shape", "tiny", "--tokens", "2000", "--examples", "8")
    texts = ("--data", f"{QUICK_DATA}/hellaswag.jsonl", "--tokenizer", f"{QUICK_DATA}/model")
    yield Part("training_step", (*toy, "--steps", "1", *PEERS))
    yield Part("speed_ladder", (*toy, "--steps", "1", "--compile", "false"))
    yield Part("generation", (*toy, "--new_tokens", "40"))
    yield Part("hellaswag", (*toy, "--shape", "tiny", "--rows", "4", *texts), data)
    yield Part("rows", ("--tokens", "600_000", "--rounds", "1"))


def run_part(part: Part, file: Path, device: str, again: bool) -> bool:
    """Run it in a process of its own, unless it was measured; whether there is a result."""
    line = " ".join([f"python -m benchmarks.{part.name}", *part.flags])
    program = import_module(f"benchmarks.{part.name}")
    args = parse_command_line(program.BenchmarkArguments, list(part.flags))
    if not again and was_measured(read_results(file), part.name, args, device):
        print(f"{line}: measured before")
        return True
    print(f"\n{line}", flush=True)
    if part.data and run_program("benchmarks.generated_data", list(part.data)):
        return False
    return run_program(f"benchmarks.{part.name}", [*part.flags, "--output", str(file)]) == 0


if __name__ == "__main__":
    main()
