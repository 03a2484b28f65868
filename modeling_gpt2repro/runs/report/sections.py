"""The sections of a report, in Markdown, with the pictures that they name."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modeling_gpt2repro.runs.assessment import assess, find_gpt2_loss, reason_without
from modeling_gpt2repro.runs.config import is_complete
from modeling_gpt2repro.runs.curve import curve_figure
from modeling_gpt2repro.runs.folder import HELLASWAG_FILE, METRICS_FILE, MODEL_FOLDER, SAMPLES_FILE, STOPPED_FILE
from modeling_gpt2repro.runs.plots import (
    STEP_PANELS,
    Panel,
    figure_bytes,
    hellaswag_panel,
    loss_panel,
    plot_panels,
    step_panel,
)
from modeling_gpt2repro.runs.read import HELLASWAG_METRICS, Run, read_all_samples, read_run
from modeling_gpt2repro.runs.reference import GPT2_LABEL
from modeling_gpt2repro.runs.summary import (
    count_parameters,
    hellaswag_value,
    plain_text,
    result_lines,
    table,
    training_lines,
    used_public_hellaswag,
)
from modeling_gpt2repro.runtime.hardware import readable_duration
from modeling_gpt2repro.storage.json_files import is_count, is_text, parse_json, read_json_object, require
from modeling_gpt2repro.storage.lock import DEAD_SECONDS, LOCK_FILE

MAX_SAMPLES = 6  # of a prompt: the first, the last, and most of those between them early, where most is learned
MAX_PROMPTS = 4
SAMPLE_CHARACTERS = 600
LISTED_STEPS = 10
RECENT_STEPS = 100  # from which the time left is reckoned
SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")


@dataclass
class Report:
    """A page and its pictures."""

    title: str
    sections: list[str] = field(default_factory=list)  # Markdown, in which {name} is where a picture is
    pictures: dict[str, bytes] = field(default_factory=dict)  # name -> PNG
    remarks: list[str] = field(default_factory=list)  # sentences on what could not be read

    def add(self, heading: str, *parts: str):
        """Add a section, unless none of its parts has a text."""
        if found := [part.rstrip() for part in parts if part]:
            self.sections.append("\n\n".join([f"## {heading}", *found]))

    def picture(self, name: str, meaning: str, figure: Figure) -> str:
        """Add a picture; returns the Markdown that shows it."""
        self.pictures[name] = figure_bytes(figure, "png", dpi=120)
        return f"![{meaning}](picture:{name})"

    def markdown(self, addresses: Mapping[str, str]) -> str:
        """The page; each picture is at the address of its name."""
        text = "\n\n".join([f"# {self.title}", *self.sections])
        for name, address in addresses.items():
            text = text.replace(f"](picture:{name})", f"]({address})")
        return f"{text}\n"


def find_run(folder: Path) -> Path:
    """The run's folder: `folder`, or the one around it if it is one of the run's models.

    Raises:
        ValueError: If there is none. A model's folder elsewhere is one if it has metrics.jsonl.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the --output_dir of a training, or one of its models.")
    folder_of_run = folder.absolute().parent
    is_model = folder.name == MODEL_FOLDER or folder.name.startswith("step-")
    return folder_of_run if is_model and (folder_of_run / METRICS_FILE).is_file() else folder


def write_report(folder: Path) -> Report:
    """Everything that the files in a run's folder say.

    Raises:
        OSError: If the disk refuses a file.
        ValueError: If there is nothing to report, or run.json is damaged.
    """
    run = read_run(folder)
    if not run.records:
        raise ValueError(f"{folder / METRICS_FILE} has no numbers yet: report on the run after its first step.")
    report = Report(title="")
    model = read_model(run, report)
    parameters = f" with {readable_count(count_parameters(model))} parameters" if model else ""
    report.title = f"{plain_text(folder.resolve().name)}: a GPT-2{parameters}"
    stopped = stopped_message(run, report)
    report.sections += [status(run, stopped), key_figures(run)]
    evaluations = run.evaluations()
    report.add("Results", table(result_lines(run, evaluations[-1])) if evaluations else "")
    report.add("Loss", *loss_parts(run, report))
    report.add("Is the curve normal?", *curve_parts(run, report))
    report.add("What it wrote", *sample_parts(run, report))
    report.add("HellaSwag", *hellaswag_parts(run, report))
    report.add("What was trained", trained_part(run, model, report))
    report.add("Step by step", *step_parts(run, report))
    report.add("Where the time went", *time_parts(run))
    report.add("Faults", fault_part(run, stopped))
    return report


def read_model(run: Run, report: Report) -> dict[str, int] | None:
    """The sizes of the model, by the config.json of the final model or a checkpoint; None if there is none yet."""
    for folder in (run.folder / MODEL_FOLDER, *sorted(run.folder.glob("step-*"), reverse=True), run.folder):
        path = folder / "config.json"
        try:
            config = read_json_object(path)
            require(
                all(is_count(config.get(name), minimum=1) for name in SIZES), f"it has not all of {', '.join(SIZES)}"
            )
            return {name: config[name] for name in SIZES}
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            report.remarks.append(f"{path} was left out: {error}.")
    return None


def last_step(run: Run) -> int:
    return max(record["step"] for record in run.records)


def total_steps(run: Run) -> int | None:
    """The steps that the run is to make; None if run.json does not say."""
    arguments = run.config.get("arguments", {})
    if not arguments.get("train_tokens") or not arguments.get("tokens_per_step"):
        return None
    return int(arguments["train_tokens"] // arguments["tokens_per_step"]) or None


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
        return plain_text(reason, limit=SAMPLE_CHARACTERS)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        report.remarks.append(f"{path} was left out: {error}.")
        return ""


def key_figures(run: Run) -> str:
    """A row of the numbers that people ask for first."""
    figures = {}
    evaluation = (run.evaluations() or [{}])[-1]
    if evaluation.get("validation_loss") is not None:
        figures["validation loss"] = f"{evaluation['validation_loss']:.4f}"
    for protocol, name in HELLASWAG_METRICS.items():
        if name in evaluation:
            figures[f"HellaSwag, {protocol}"] = f"{100 * evaluation[name]:.1f} %"
    figures["tokens"] = readable_count(max(record.get("tokens", 0) for record in run.records))
    if seconds := seconds_of(run.records, "step_seconds"):
        figures["in training steps"] = readable_duration(seconds)
        figures["tokens per second"] = f"{median_of(run, 'tokens_per_second'):,.0f}"
    return rows(figures, [figures.values()])


def loss_parts(run: Run, report: Report) -> Iterable[str]:
    """The loss curve, and what to compare it with."""
    _, losses = run.series("loss")
    _, validation = run.series("validation_loss")
    if not len(losses) and not len(validation):
        return
    figure = plot_panels([run], [loss_panel], columns=1, size=(9, 4.6))
    yield report.picture("loss", "Training and validation loss over training tokens", figure)
    gpt2_loss = find_gpt2_loss(run)
    if baselines := ({GPT2_LABEL: gpt2_loss} if gpt2_loss else {}) | run.loss_baselines:
        first = [f"Before the first step the validation loss was {validation[0]:.3f}."] if len(validation) else []
        yield " ".join(["A cross-entropy loss in nats per token is judged by what it is compared with.", *first])
        best = [["**lowest validation loss of this run**", f"**{validation.min():.4f}**"]] if len(validation) else []
        listed = [[plain_text(label), f"{loss:.4f}"] for label, loss in baselines.items()]
        yield rows(
            ["compared with", "nats per token"], sorted([*listed, *best], key=lambda row: -float(row[1].strip("*")))
        )


def curve_parts(run: Run, report: Report) -> Iterable[str]:
    """The loss among those of published runs, where there are any of this setting."""
    assessment = assess(run)
    if assessment is None:
        yield f"There is no published run to compare with: {plain_text(reason_without(run), SAMPLE_CHARACTERS)}."
        return
    yield report.picture("curve", "The loss among those of published runs", curve_figure(run, assessment))
    yield table({name: plain_text(line, SAMPLE_CHARACTERS) for name, line in assessment.lines().items()})


def sample_parts(run: Run, report: Report) -> Iterable[str]:
    """The first sample of each prompt at a few steps."""
    samples = read_all_samples(run.folder)
    losses = {record["step"]: record["validation_loss"] for record in run.evaluations()}
    if not samples and (run.folder / SAMPLES_FILE).exists():
        report.remarks.append(f"{run.folder / SAMPLES_FILE} was left out: it has no sample that can be read.")
    for prompt, written in list(samples.items())[:MAX_PROMPTS]:
        by_step = dict(sorted(written))  # of a step that was made twice, the later one
        yield "The same beginning, in bold, and how the model continued it at several steps:"
        for step in early_ones(list(by_step)):
            loss = f", validation loss {losses[step]:.3f}" if losses.get(step) is not None else ""
            text = by_step[step]
            rest = text.removeprefix(prompt)
            beginning = (
                f"**{plain_text(prompt, SAMPLE_CHARACTERS).strip()}** " if rest != text and prompt.strip() else ""
            )
            yield f"> step {step:,}{loss}\n>\n> {beginning}{plain_text(rest, SAMPLE_CHARACTERS)}"
    if len(samples) > MAX_PROMPTS:
        yield f"{SAMPLES_FILE} has {len(samples) - MAX_PROMPTS} more prompts."


def side_by_side(run: Run, panels: Sequence[Panel], height: float) -> Figure:
    """Panels in a row, whose titles say what each curve is."""
    figure = plot_panels([run], panels, columns=len(panels), size=(9, height))
    for legend in list(figure.legends):
        legend.remove()
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def early_ones(steps: Sequence[int]) -> list[int]:
    """Up to MAX_SAMPLES, each about twice as far as the one before: 0 ... 800 by 100 -> 0, 100, 300, 500, 800."""
    places = np.unique(np.geomspace(1, len(steps), MAX_SAMPLES).round().astype(int)) - 1
    return [steps[place] for place in places]


def hellaswag_parts(run: Run, report: Report) -> Iterable[str]:
    """Accuracies over time, and the last ones beside published ones."""
    evaluations = run.evaluations()
    protocols = [p for p, name in HELLASWAG_METRICS.items() if any(name in record for record in evaluations)]
    if not protocols:
        return
    panels = [partial(hellaswag_panel, protocol=protocol) for protocol in protocols]
    figure = side_by_side(run, panels, height=3.4)
    yield report.picture("hellaswag", "HellaSwag accuracy over training tokens", figure)
    last = next(record for record in reversed(evaluations) if any(HELLASWAG_METRICS[p] in record for p in protocols))
    lines = [[f"**this run, step {last['step']:,}**", *(hellaswag_value(last, protocol) for protocol in protocols)]]
    lines.append(["guessing", *("0.2500" for _ in protocols)])
    if used_public_hellaswag(run):
        published = [run.hellaswag_baselines.get(protocol, {}) for protocol in protocols]
        for model in dict.fromkeys(model for of_protocol in published for model in of_protocol):
            values = (f"{of_protocol[model]:.4f}" if model in of_protocol else "" for of_protocol in published)
            lines.append([plain_text(model), *values])
    yield rows(["acc\\_norm", *protocols], sorted(lines, key=lambda line: max(line[1:]), reverse=True))
    examples = count_examples(run.folder / HELLASWAG_FILE, report)
    of = f" of {examples:,} questions" if examples else ""
    own = (
        "" if used_public_hellaswag(run) else " These questions are not the public ones: no published number compares."
    )
    yield (
        f"Each question has four endings. The intervals are 95 %, those of a sample{of}. The protocols score "
        f"differently: compare within one.{own}"
    )


def count_examples(path: Path, report: Report) -> int:
    """The examples of the last evaluation; 0 if the file is not there or damaged."""
    found = set()
    with suppress(FileNotFoundError):
        try:
            for line in path.read_bytes().splitlines():
                record = parse_json(line)
                require(type(record) is dict and is_count(record.get("row")), "a line has no row")
                found.add(record["row"])
        except (IsADirectoryError, ValueError) as error:
            report.remarks.append(f"{path} was left out: {error}.")
            return 0
    return len(found)


def trained_part(run: Run, model: Mapping[str, int] | None, report: Report) -> str:
    """Model, data, hyperparameters, hardware and versions."""
    lines = {}
    if model:
        lines["model"] = (
            f"GPT-2 with {count_parameters(model):,} parameters: {model['n_layer']} layers, {model['n_head']} heads, "
            f"width {model['n_embd']}, context {model['n_positions']:,}, vocabulary {model['vocab_size']:,}"
        )
    start = run.config.get("arguments", {}).get("init_from")
    if is_text(start):
        lines["began with"] = plain_text(Path(start).name if Path(start).is_absolute() else start)
    if is_complete(run.config):
        lines |= training_lines(run)
    elif run.config:
        report.remarks.append(
            f"{run.folder}: run.json lacks some of what a run writes there, so that data are not shown."
        )
    return table(lines) if lines else ""


def step_parts(run: Run, report: Report) -> Iterable[str]:
    """Learning rate, gradient norm and speed of each step."""
    names = [name for name in STEP_PANELS if len(run.series(name)[1])]
    if names:
        panels = [partial(step_panel, name=name) for name in names]
        figure = side_by_side(run, panels, height=2.7)
        yield report.picture("steps", "Learning rate, gradient norm, tokens per second", figure)
        yield (
            "The gradient norm is that before clipping: it falls as training settles, and a jump that stays is a sign "
            "of trouble. Speed should be level; dips are waits for data or another program on the machine."
        )


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
        "made again after resuming": undone,
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
            f"{plain_text(f'--{name}')} {plain_text(now[name])} instead of {plain_text(before.get(name))}"
            for name in now
            if now[name] != before.get(name)
        ]
        faults.append(f"Resumed at step {step:,}{', with ' + ', '.join(changes) if changes else ''}.")
        before = now
    if run.undone_records:
        steps = {record["step"] for record in run.undone_records if "loss" in record}
        faults += (
            [f"{plural(len(steps), 'step')} made again after a resume from an earlier checkpoint."] if steps else []
        )
    if stopped:
        faults.append(stopped)
    if run.unreadable_lines:
        faults.append(f"{plural(run.unreadable_lines, 'damaged line')} of {METRICS_FILE} left out.")
    if not faults:
        return "None: no update was skipped, and the run was never interrupted."
    return "\n".join(f"- {fault}" for fault in faults)


def rows(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def bar(share: float, width: int = 20) -> str:
    """0.5 -> ten blocks; what is not nothing has at least a thin one."""
    eighths = max(1, round(8 * width * share))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def seconds_of(records: Iterable[Mapping], name: str) -> float:
    return sum(record.get(name) or 0.0 for record in records)


def median_of(run: Run, name: str) -> float:
    values = [record[name] for record in run.records if record.get(name)]
    return median(values) if values else 0.0


def duration(seconds: float) -> str:
    return readable_duration(seconds) if seconds >= 1 else f"{seconds:.2f} s"


def readable_count(count: int) -> str:
    """1_433_600 -> '1.43 M'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(steps: Sequence[int]) -> str:
    """'step 3', 'steps 3, 5', and no more than LISTED_STEPS of them."""
    shown = ", ".join(f"{step:,}" for step in steps[:LISTED_STEPS])
    more = f" and {len(steps) - LISTED_STEPS:,} more" if len(steps) > LISTED_STEPS else ""
    return f"step{'' if len(steps) == 1 else 's'} {shown}{more}"
