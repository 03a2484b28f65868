"""How far a run has come, where its time went, and what went wrong."""

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median

from modeling_gpt2repro.runs.folder import METRICS_FILE, STOPPED_FILE
from modeling_gpt2repro.runs.read import Run
from modeling_gpt2repro.runs.summary import UNDONE, plain_text, without_paths
from modeling_gpt2repro.runtime.hardware import readable_duration
from modeling_gpt2repro.storage.json_files import is_text, read_json_object, require
from modeling_gpt2repro.storage.lock import DEAD_SECONDS, LOCK_FILE

from .markdown import Report, bar, duration, listed, plural, rows

MESSAGE_CHARACTERS = 600
RECENT_STEPS = 100  # from which the time left is reckoned


def status(run: Run, stopped: str) -> str:
    """A sentence or two: finished, running with the time left, stopped and why, or ended without a word."""
    done, total = last_step(run), total_steps(run)
    steps = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
    if total is not None and done >= total:
        return f"**Finished**: {steps}."
    if is_running(run.folder):
        left = f", about {readable_duration(seconds_left(run, total - done))} left" if total else ""
        return f"**Running**: {steps} so far{left}, on {time.strftime('%Y-%m-%d at %H:%M')}."
    if stopped:
        return f"**Stopped early**: {steps}. {stopped}"
    if total is None:
        return f"**As of step {done:,}**; how many there were to be, only run.json says, which is not here."
    return (
        f"**Not finished**: {steps}, and no program is writing here now. A run that was killed continues with "
        "`--resume_from_checkpoint latest`."
    )


def last_step(run: Run) -> int:
    return max(record["step"] for record in run.records)


def total_steps(run: Run) -> int | None:
    """The steps that the run is to make; None if run.json does not say."""
    arguments = run.config.get("arguments", {})
    if not arguments.get("train_tokens") or not arguments.get("tokens_per_step"):
        return None
    return int(arguments["train_tokens"] // arguments["tokens_per_step"]) or None


def is_running(folder: Path) -> bool:
    """Whether the lock file of a program that writes here has changed lately, as it does every few seconds."""
    with suppress(OSError):
        return time.time() - (folder / LOCK_FILE).stat().st_mtime < DEAD_SECONDS
    return False


def seconds_left(run: Run, steps: int) -> float:
    recent = [record["step_seconds"] for record in run.records if record.get("step_seconds")][-RECENT_STEPS:]
    return steps * median(recent) if recent else 0.0


def stopped_message(run: Run, report: Report) -> str:
    """Why the run stopped early, without the command that resumes it, which names folders of that machine."""
    path = run.folder / STOPPED_FILE
    try:
        message = read_json_object(path).get("message")
        require(is_text(message) and bool(message), "it has no message")
        reason = re.sub(r"(When it can be read again, r|R)esume with:$", "", message.strip().partition("\n\n")[0])
        return plain_text(without_paths(reason, run), limit=MESSAGE_CHARACTERS)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        report.remarks.append(f"{path} was left out: {error}.")
        return ""


def time_parts(run: Run) -> Iterable[str]:
    """Seconds by what they went into, with their share."""
    waits = seconds_of(run.records, "data_seconds")
    hellaswag = seconds_of(run.records, "hellaswag_seconds")
    undone = sum(
        seconds_of(run.undone_records, name) for name in ("step_seconds", "evaluation_seconds", "save_seconds")
    )
    seconds = {
        "training steps": max(0.0, seconds_of(run.records, "step_seconds") - waits),
        "waiting for data": waits,
        "evaluation: loss": max(0.0, seconds_of(run.records, "evaluation_seconds") - hellaswag),
        "evaluation: HellaSwag": hellaswag,
        "saving checkpoints": seconds_of(run.records, "save_seconds"),
        "undone by resuming": undone,
    }
    total = sum(seconds.values())
    if not total:
        return
    shares = {name: spent / total for name, spent in seconds.items() if spent}
    yield rows(
        ["", "time", "share", ""],
        [[name, duration(seconds[name]), f"{share:.1%}", bar(share)] for name, share in shares.items()],
    )
    more = [f"In all {readable_duration(total)}, without start-ups, samples and pauses between two starts."]
    if memory := max((record.get("peak_memory_gb") or 0.0 for record in run.records), default=0.0):
        more.append(f"Peak memory of the first process: {memory:.1f} GB.")
    if mfu := median_of(run, "mfu"):
        more.append(f"Model FLOPs utilization, median: {mfu:.0%}.")
    yield " ".join(more)


def fault_part(run: Run, stopped: str) -> str:
    """A list of what went wrong, or that nothing did."""
    faults = []
    skipped = sorted({record["step"] for record in run.records if record.get("event") == "skipped"})
    if skipped:
        faults.append(f"{plural(len(skipped), 'update')} skipped for an unusable loss or gradient: {listed(skipped)}.")
    if overflowed := sum(record.get("overflowed") is True for record in run.records):
        faults.append(f"{plural(overflowed, 'update')} left out for an overflow in fp16, as is normal now and then.")
    if diverged := [record["step"] for record in run.records if "loss" in record and record["loss"] is None]:
        faults.append(f"The loss was not a number in {plural(len(diverged), 'step')}: {listed(diverged)}.")
    arguments = {first - 1: now for first, _, now in run.stretches}
    before = run.stretches[0][2] if run.stretches else {}
    for step in run.resumed_steps:
        now = arguments.get(step, before)
        changes = [
            f"{plain_text(f'--{name}')} {shown(now[name], run)} instead of {shown(before.get(name), run)}"
            for name in now
            if now[name] != before.get(name)
        ]
        faults.append(f"Resumed at step {step:,}{', with ' + ', '.join(changes) if changes else ''}.")
        before = now
    if undone := [record for record in run.undone_records if "loss" in record]:
        faults.append(f"{plural(len(undone), 'step')} {UNDONE}.")
    if stopped:
        faults.append(stopped)
    if run.unreadable_lines:
        faults.append(f"{plural(run.unreadable_lines, 'damaged line')} of {METRICS_FILE} left out.")
    if not faults:
        return "None: no update was skipped, and the run was never interrupted."
    return "\n".join(f"- {fault}" for fault in faults)


def shown(value: object, run: Run) -> str:
    """The value of an argument, without the folders in it."""
    return plain_text(without_paths(str(value), run))


def seconds_of(records: Iterable[Mapping], name: str) -> float:
    return sum(record.get(name) or 0.0 for record in records)


def median_of(run: Run, name: str) -> float:
    values = [record[name] for record in run.records if record.get(name)]
    return median(values) if values else 0.0
