"""Compare prepare_data.py with the lecture's fineweb.py: one parquet file to shards of GPT-2's ids.

    python -m benchmarks.prepare                                  # the language reference's text, 100 MB of it
    python -m benchmarks.prepare --text_file a.txt --megabytes 50

The file is synthetic: FineWeb-Edu's columns and row groups, documents of 3 to 5 kB cut out of a text at random places.
The lecture's side is peers/lecture_fineweb.py: rows as dicts from `datasets`, `imap` over single documents,
`encode_ordinary`, a buffer for a shard. The Arrow table that `datasets` makes of a file once is made before the clock
starts. Each side runs as a command, so that its start-up counts; a file of 0.2 MB shows how much that is. The sides
take turns, and which runs first alternates; the figures are medians over rounds. Memory is sampled ten times a second
in all runs, and on a file of more than one shard in a run of its own. Both must make the same number of tokens.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import add_to_file, quartiles, result_header, sides_in_turn
from benchmarks.peers.lecture_fineweb import load_rows
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line

REPOSITORY = Path(__file__).parents[1]
SIDES = ("ours", "lecture")
START_UP_MEGABYTES = 0.2
VALIDATION_SHARE = 0.1  # large enough that a small file has a document of each split
ROW_GROUP_ROWS = 1_000  # FineWeb-Edu's
SEED = 1337


@dataclass
class BenchmarkArguments:
    text_file: str | None = arg(default=None, help="Cut documents out of this text; else Python's language reference.")
    megabytes: float = arg(
        default=100, above=START_UP_MEGABYTES, help="Text in the file that speed is measured on; more than start-up's."
    )
    large_megabytes: float = arg(
        default=600, help="Text in the file that only memory is measured on, with most workers; 0: none."
    )
    workers: list[int] = arg(default_factory=lambda: [1, 2], help="Worker counts to compare at.")
    rounds: int = arg(default=5, minimum=1, help="How often each side runs.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        problems = list(check_limits(self))
        problems += [f"workers ({count}) must be at least 1." for count in self.workers if count < 1]
        if self.text_file and not Path(self.text_file).is_file():
            problems.append(f"there is no file {self.text_file} for --text_file.")
        if find_spec("datasets") is None:
            problems.append("the lecture's side needs the package datasets: pip install datasets.")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def text(self) -> str:
        if self.text_file:
            return Path(self.text_file).read_text(encoding="utf-8")
        return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Run:
    """Time, tokens and peak memory of one run of a side."""

    seconds: float
    cpu_seconds: float
    tokens: int
    parent_bytes: int
    all_bytes: int


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    packages = ("datasets", "numpy", "pyarrow", "tiktoken", "transformers")
    header = result_header("prepare", argv, args, packages)
    with TemporaryDirectory() as folder:
        runs, large = measure(args, Path(folder))
    result = header | {
        "workers": {str(workers): summary(runs, workers) for workers in args.workers},
        "peak_memory_bytes": peaks(args, runs, large),
    }
    report(args, result)
    if args.output:
        add_to_file(Path(args.output), result)


# The two sides


def make_parquet(file: Path, megabytes: float, text: str) -> Path:
    """Write documents of 3,000 to 5,000 characters with FineWeb-Edu's columns, in eight row groups or more."""
    random = Random(SEED)
    text *= math.ceil(10_000 / len(text))
    documents = math.ceil(megabytes * 1e6 / 4_000 / (len(text.encode()) / len(text)))
    group_rows = min(ROW_GROUP_ROWS, math.ceil(documents / 8))
    writer = None
    for first in range(0, documents, group_rows):
        count = min(group_rows, documents - first)
        starts = [random.randrange(len(text) - 5_000) for _ in range(count)]
        table = pa.table(
            {
                "text": [text[start : start + random.randint(3_000, 5_000)] for start in starts],
                "id": [f"<urn:uuid:{random.getrandbits(128):032x}>" for _ in range(count)],
                "dump": ["CC-MAIN-2024-10"] * count,
                "url": [f"https://example.org/{number}" for number in range(first, first + count)],
                "file_path": ["s3://crawl-data/segments/0.warc.gz"] * count,
                "language": ["en"] * count,
                "language_score": [random.random() for _ in range(count)],
                "token_count": [random.randint(600, 1_400) for _ in range(count)],
                "score": [random.uniform(2.5, 5) for _ in range(count)],
                "int_score": [random.randint(3, 5) for _ in range(count)],
            }
        )
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    writer.close()
    return file


def command_of(side: str, file: Path, output: Path, workers: int) -> list[str]:
    """The command that prepares `file` in `output`."""
    if side == "ours":
        flags = ["--train_files", str(file), "--output_dir", str(output), "--validation_share", str(VALIDATION_SHARE)]
        return [sys.executable, "prepare_data.py", *flags, "--tokenizer", "gpt2", "--workers", str(workers)]
    words = [str(file), str(file.parent / "cache"), str(output), str(workers)]
    return [sys.executable, "-m", "benchmarks.peers.lecture_fineweb", *words]


def tokens_written(side: str, output: Path, printed: str) -> int:
    if side == "ours":
        splits = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["splits"]
        return sum(split["tokens"] for split in splits.values())
    return int(re.search(r"(\d+) tokens", printed).group(1))


# Measurement


def measure(args: BenchmarkArguments, folder: Path) -> tuple[dict, dict[str, Run]]:
    """Runs by (side, workers, size) with size "start-up" or "file", one per round; and of the large file, by side."""
    sizes = {"start-up": START_UP_MEGABYTES, "file": args.megabytes}
    sizes |= {"large": args.large_megabytes} if args.large_megabytes else {}
    files = {size: make_parquet(folder / f"{size}.parquet", sizes[size], args.text) for size in sizes}
    for file in files.values():
        load_rows(str(file), str(folder / "cache"))
    runs = {(side, workers, size): [] for side in SIDES for workers in args.workers for size in ("start-up", "file")}
    for number in range(args.rounds):
        for workers in args.workers:
            for size in ("start-up", "file"):
                for side in sides_in_turn(SIDES, number):
                    runs[side, workers, size].append(run(side, files[size], folder / "out", workers))
    large = {side: run(side, files["large"], folder / "out", max(args.workers)) for side in SIDES if "large" in files}
    for (_, workers, size), ours in runs.items():
        compare_tokens([*ours, *runs["lecture", workers, size]])
    compare_tokens(list(large.values()))
    return runs, large


def compare_tokens(runs: list[Run]):
    counts = {run.tokens for run in runs}
    if len(counts) > 1:
        raise ValueError(f"the two did not make the same number of tokens: {sorted(counts)}.")


def run(side: str, file: Path, output: Path, workers: int) -> Run:
    """Run one side's command into a temporary folder, and sample its memory meanwhile."""
    with TemporaryDirectory(dir=output.parent) as scratch:
        output = Path(scratch) / "out"
        command = command_of(side, file, output, workers)
        before = os.times()
        started = time.perf_counter()
        with open(Path(scratch) / "stdout", "w+") as stdout, open(Path(scratch) / "stderr", "w+") as stderr:
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=stdout, stderr=stderr)
            watched = psutil.Process(process.pid)
            parent_bytes = 0
            all_bytes = 0
            while True:
                try:
                    process.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    now_parent, now_all = resident(watched)
                    parent_bytes = max(parent_bytes, now_parent)
                    all_bytes = max(all_bytes, now_all)
            seconds = time.perf_counter() - started
            after = os.times()
            stdout.seek(0)
            stderr.seek(0)
            if process.returncode:
                raise RuntimeError(f"{shlex.join(command)} failed:\n{stderr.read()}")
            tokens = tokens_written(side, output, stdout.read())
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(seconds, spent, tokens, parent_bytes, all_bytes)


def resident(parent: psutil.Process) -> tuple[int, int]:
    """Resident bytes of a process, and of it with all its descendants (shared memory counts for each)."""
    found = []
    try:
        for process in (parent, *parent.children(recursive=True)):
            found.append(process.memory_info().rss)
    except psutil.NoSuchProcess:  # one of them ended; the next sample sees the others
        pass
    return (found[0], sum(found)) if found else (0, 0)


# Results


def summary(runs: dict, workers: int) -> dict:
    """Medians and ratios for one number of workers; the median start-up is subtracted, unless nothing would remain."""
    seconds = {size: {s: [r.seconds for r in runs[s, workers, size]] for s in SIDES} for size in ("start-up", "file")}
    start_up = {side: float(np.median(seconds["start-up"][side])) for side in SIDES}
    spent = {
        "seconds": seconds["file"],
        "seconds_after_start_up": {side: [s - start_up[side] for s in seconds["file"][side]] for side in SIDES},
        "cpu_seconds": {side: [r.cpu_seconds for r in runs[side, workers, "file"]] for side in SIDES},
    }
    if min(map(min, spent["seconds_after_start_up"].values())) <= 0:
        del spent["seconds_after_start_up"]
    tokens = runs["ours", workers, "file"][0].tokens
    return {
        "tokens": tokens,
        "seconds": seconds["file"],
        "start_up_seconds": start_up,
        "tokens_per": {kind: {s: tokens / float(np.median(of[s])) for s in SIDES} for kind, of in spent.items()},
        "lecture_over_ours": {kind: quartiles(of) for kind, of in spent.items()},
    }


def peaks(args: BenchmarkArguments, runs: dict, large: dict[str, Run]) -> list[dict]:
    """Peak memory of each side by size of input, with the most workers."""
    workers = max(args.workers)
    sizes = [(START_UP_MEGABYTES, {side: runs[side, workers, "start-up"] for side in SIDES})]
    sizes += [(args.megabytes, {side: runs[side, workers, "file"] for side in SIDES})]
    sizes += [(args.large_megabytes, {side: [run] for side, run in large.items()})] if large else []
    return [
        {
            "megabytes": megabytes,
            "workers": workers,
            "tokens": found["ours"][0].tokens,
            "parent": {side: max(run.parent_bytes for run in found[side]) for side in SIDES},
            "all_processes": {side: max(run.all_bytes for run in found[side]) for side in SIDES},
        }
        for megabytes, found in sizes
    ]


def report(args: BenchmarkArguments, result: dict):
    """Print rates, memory, and one line per number of workers."""
    print(f"{args.megabytes:g} MB of text, {args.rounds} rounds; {result['machine']['cpu']}\n")
    print(f"{'workers':>7} {'side':8} {'tokens/s':>11} {'start-up s':>11} {'after start-up':>15} {'tokens/cpu-s':>13}")
    for workers, found in result["workers"].items():
        for side in SIDES:
            rates = {kind: rate[side] for kind, rate in found["tokens_per"].items()}
            print(
                f"{workers:>7} {side:8} {rates['seconds']:11,.0f} {found['start_up_seconds'][side]:11.2f} "
                f"{rates.get('seconds_after_start_up', math.nan):15,.0f} {rates['cpu_seconds']:13,.0f}"
            )
    print(f"\n{'input MB':>8} {'side':8} {'parent, peak MB':>16} {'all processes, peak MB':>23}")
    for peak in result["peak_memory_bytes"]:
        for side in SIDES:
            parent = peak["parent"][side] / 1e6
            all_processes = peak["all_processes"][side] / 1e6
            print(f"{peak['megabytes']:8g} {side:8} {parent:16,.0f} {all_processes:23,.0f}")
    print()
    for workers, found in result["workers"].items():
        ratios = found["lecture_over_ours"]
        ratio = ratios["seconds"]
        after = ratios.get("seconds_after_start_up", {"median": math.nan})
        print(
            f"with {workers} worker(s) ours is {ratio['median']:.3f} times as fast (quartiles "
            f"{ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f}; without start-up {after['median']:.3f})"
        )


if __name__ == "__main__":
    main()
