"""Run everything that only a GPU shows, most important first, in calls of a few minutes each.

    bash benchmarks/on_gpu.sh --seconds 540 --results build/on_gpu/results.json
    python -m benchmarks.on_gpu --plan toy --results build/toy/results.json     # the same parts on a CPU, at toy size

Each call continues from the results file of the last one, until it says that nothing is left. A part is a shell command
in a process of its own. Its result is written when it ends, so that whatever interrupts a call loses no more than the
part that was running, and the next call goes to the part after it. A part that fails is recorded with the end of its
output, and the others run; one that was interrupted or out of time is tried once more, at the end. All output is in the
file beside the results that ends in .log.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from modeling_gpt2repro.runs.config import make_writable
from modeling_gpt2repro.runtime.command_line import arg, check_limits, exit_on_input_error, parse_command_line
from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.json_files import read_json_object

ROOT = Path(__file__).resolve().parents[1]
RESERVE_SECONDS = 15  # to end a part and write what it has
PATIENCE = 2  # a part gets at most so many times its estimate
ATTEMPTS = 2
KEPT_OUTPUT = 6_000  # characters of a part's output in the results; the .log has all
OVER = ("done", "failed")
TOY_SECONDS = 240  # of any part at toy size, on a CPU that other programs use, too
# Only their files are collected: others import packages that a GPU machine may lack.
GPU_TESTS = "python -m pytest -m gpu -v -p no:cacheprovider $(grep -rl mark.gpu tests --include='test_*.py')"
RUN = "python -m benchmarks.training_run --stop_after {seconds} --runs_dir {work} --output {result}"
MEMORY = "python -m benchmarks.memory --presets gpt2-124m --losses 'in chunks' --output {result}"
LECTURE = "python -m benchmarks.hellaswag --rounds 1 --output {result}"


@dataclass(frozen=True)
class Part:
    """One measurement.

    `command` is a shell command. In it {result} is a JSON file that goes into the results, {seconds} the time it has,
    and {work} a folder for what need not be kept.
    """

    name: str
    seconds: int  # estimated, on an H100
    command: str


def gpu_plan() -> list[Part]:
    """The parts on a GPU: GPT-2 124M as it is trained."""
    run = f"{RUN} --data {{work}}/124m"
    data = "python -m benchmarks.generated_data --output_dir {work}/124m"
    texts = "{work}/124m/hellaswag.jsonl"
    model = "{work}/124m/model"
    score = f"python eval_hellaswag.py --model {model} --data {texts} --dtype bfloat16"
    lecture = f"{LECTURE} --tokenizer {model} --data {texts} --rows 1000 --dtype bf16"
    step = "python -m benchmarks.training_step --shape 124m --dtype bf16 --compile"
    return [
        Part("environment", 20, "python -m torch.utils.collect_env"),
        Part("tests", 200, f"{GPU_TESTS} --durations=20"),
        Part("training", 260, f"{run} --steps 140"),
        Part("speed_ladder", 120, "python -m benchmarks.speed_ladder --output {result}"),
        Part("training_step", 120, f"{step} --rounds 5 --output {{result}}"),
        Part("attention", 150, "python -m benchmarks.attention --lengths 256 1024 --head_sizes 64 --output {result}"),
        Part("hellaswag", 90, f"{data} && {score} --output {{result}}"),
        Part("hellaswag_lecture", 60, f"{data} && {lecture}"),
        Part("fp16", 90, f"{run} --steps 30 --precision fp16"),
        Part("memory", 120, f"{MEMORY} --batches 16 32"),
        Part("deterministic", 90, f"{run} --steps 30 --deterministic true"),
        Part("eager", 90, f"{run} --steps 30 --compile false"),
        Part("flash_attention_2", 90, f"{run} --steps 30 --attn_implementation flash_attention_2"),
    ]


def toy_plan() -> list[Part]:
    """The same programs on a CPU, at toy size: whether they run at all where little is installed."""
    run = f"{RUN} --data {{work}}/toy --shape toy --steps 12 --device cpu --precision no"
    data = "python -m benchmarks.generated_data --output_dir {work}/tiny --shape tiny --tokens 2000 --examples 8"
    texts = "{work}/tiny/hellaswag.jsonl"
    model = "{work}/tiny/model"
    score = f"python eval_hellaswag.py --model {model} --data {texts} --device cpu"
    lecture = f"{LECTURE} --tokenizer {model} --data {texts} --rows 4 --shape tiny --device cpu"
    step = "python -m benchmarks.training_step --shape toy --device cpu"
    ladder = "python -m benchmarks.speed_ladder --shape toy --device cpu --rounds 1 --compile false"
    attention = "python -m benchmarks.attention --device cpu --lengths 32 --head_sizes 32 --tokens 64 --width 32"
    return [
        Part("environment", TOY_SECONDS, "python -m torch.utils.collect_env"),
        Part("tests", TOY_SECONDS, GPU_TESTS),
        Part("training", TOY_SECONDS, run),
        Part("speed_ladder", TOY_SECONDS, f"{ladder} --output {{result}}"),
        Part("training_step", TOY_SECONDS, f"{step} --rounds 1 --output {{result}}"),
        Part(
            "attention",
            TOY_SECONDS,
            f"{attention} --rounds 1 --table {{work}}/attention_table.json --output {{result}}",
        ),
        Part("hellaswag", TOY_SECONDS, f"{data} && {score} --output {{result}}"),
        Part("hellaswag_lecture", TOY_SECONDS, f"{data} && {lecture}"),
        Part("memory", TOY_SECONDS, f"{MEMORY} --modes eager --batches 1 2 --block_size 64"),
        Part("deterministic", TOY_SECONDS, f"{run} --deterministic true"),
    ]


PLANS = {"gpu": gpu_plan, "toy": toy_plan}


@dataclass
class OnGpuArguments:
    results: str = arg(default="build/on_gpu/results.json", help="File to continue from and to write results to.")
    seconds: float = arg(default=540.0, above=0, help="Time that this call may take.")
    plan: Literal["gpu", "toy"] = arg(default="gpu", help="toy: the same parts on a CPU, at toy size.")
    parts: list[str] | None = arg(default=None, help="Run these parts again, whatever their result was.")
    work_dir: str = arg(default="build/on_gpu", help="Folder for data and runs, which need not be kept.")

    def __post_init__(self):
        problems = list(check_limits(self))
        names = [part.name for part in PLANS[self.plan]()]
        for unknown in set(self.parts or ()) - set(names):
            problems.append(f"--parts: there is no part {unknown}; there are {', '.join(names)}.")
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: list[str] | None = None):
    args = parse_command_line(OnGpuArguments, argv, description=__doc__)
    work_dir = Path(args.work_dir).resolve()
    with exit_on_input_error():
        results = Results(Path(args.results).resolve())
        make_writable(results.path.parent, "results")
        make_writable(work_dir, "work_dir")
    parts = PLANS[args.plan]()
    if args.parts:
        parts = [part for part in parts if part.name in args.parts]
        results.forget(args.parts)
    left = run_parts(parts, results, args.seconds, work_dir)
    for part in PLANS[args.plan]():
        record = results.records.get(part.name, {})
        print(f"{part.name:20} {record.get('status', 'not started'):12} {record.get('seconds', 0):6.0f} s")
    print(f"\n{left} parts are left: run the same command again." if left else "\nNothing is left.")
    print(f"Results: {results.path}")


class Results:
    """The results file: for each part its command, status, seconds, the end of its output, and its own result."""

    def __init__(self, path: Path):
        """Raises ValueError if the file is there and cannot be read."""
        self.path = path
        try:
            self.records: dict[str, dict[str, Any]] = read_json_object(path, any_numbers=True) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): give another --results, or delete it.") from error
        for record in self.records.values():
            if record["status"] == "running":  # the call that started it was killed
                record["status"] = "interrupted"

    def forget(self, names: list[str]):
        """Let these parts be as if they had never been run."""
        for name in names:
            self.records.pop(name, None)

    def update(self, name: str, record: dict[str, Any]):
        """Write a part's record; a later attempt replaces the earlier one, and counts."""
        self.records[name] = record
        write_json(self.path, self.records)

    def pending(self, parts: list[Part]) -> list[Part]:
        """Parts without a result: first those that were never started, then those that can be tried once more."""
        left = [part for part in parts if self.records.get(part.name, {}).get("status") not in OVER]
        left = [part for part in left if self.attempts(part) < ATTEMPTS]
        return sorted(left, key=self.attempts)

    def attempts(self, part: Part) -> int:
        """How often it was started."""
        return self.records.get(part.name, {}).get("attempts", 0)


def run_parts(parts: list[Part], results: Results, seconds: float, work_dir: Path) -> int:
    """Run the parts that fit into this time, and return how many are left.

    If nothing fits, the first is run nevertheless, for as long as there is time: a call always does something.
    """
    deadline = time.monotonic() + seconds - RESERVE_SECONDS
    work_dir.mkdir(parents=True, exist_ok=True)
    started = False
    for part in results.pending(parts):
        left = deadline - time.monotonic()
        if part.seconds <= left or (not started and left > 0):
            started = True
            run_part(part, results, min(left, PATIENCE * part.seconds), work_dir)
    return len(results.pending(parts))


def run_part(part: Part, results: Results, seconds: float, work_dir: Path):
    """Run one part for at most `seconds`, and write its result."""
    result_file = work_dir / f"{part.name}.json"
    result_file.unlink(missing_ok=True)
    paths = {"result": shlex.quote(str(result_file)), "work": shlex.quote(str(work_dir))}
    command = part.command.format(seconds=int(seconds), **paths)
    record = {"status": "running", "attempts": results.attempts(part) + 1, "command": command}
    results.update(part.name, record)  # if this call is killed, the next one knows
    print(f"{part.name}: {command}", flush=True)
    started = time.monotonic()
    with results.path.with_suffix(".log").open("ab") as log:
        log.write(f"\n== {part.name}: {command}\n".encode())
        log.flush()
        begin = log.tell()
        same_python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n{command}'
        process = subprocess.Popen(
            same_python, shell=True, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            exit_code = process.wait(seconds)
            record["status"] = "failed" if exit_code else "done"
        except subprocess.TimeoutExpired:
            end_processes(process.pid)
            exit_code = process.wait()
            record["status"] = "out of time"
        except KeyboardInterrupt:
            end_processes(process.pid)
            results.update(part.name, record | {"status": "interrupted"})
            raise
    record |= {"exit_code": exit_code, "seconds": time.monotonic() - started}
    record["output"] = read_from(results.path.with_suffix(".log"), begin)[-KEPT_OUTPUT:]
    with suppress(FileNotFoundError, ValueError):  # a part that was ended while it wrote
        record["result"] = json.loads(result_file.read_text(encoding="utf-8"))
    results.update(part.name, record)
    print(f"    {record['status']} after {record['seconds']:.0f} s", flush=True)


def end_processes(pid: int):
    """Ask a process and all that it started to end, and kill those that do not."""
    parent = psutil.Process(pid)
    processes = [parent, *parent.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=RESERVE_SECONDS / 2)
    for process in alive:
        process.kill()


def environment() -> dict[str, str]:
    """Nothing is downloaded, and output is in the log at once."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def read_from(path: Path, begin: int) -> str:
    """The text of a file from a position on."""
    with path.open("rb") as file:
        file.seek(begin)
        return file.read().decode("utf-8", errors="replace")


if __name__ == "__main__":
    main()
