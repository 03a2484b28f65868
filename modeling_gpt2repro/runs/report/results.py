"""What came of a run: its loss, the texts that it wrote, HellaSwag, and the course of each step."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modeling_gpt2repro.runs.assessment import assess, find_gpt2_loss, reason_without
from modeling_gpt2repro.runs.curve import curve_figure
from modeling_gpt2repro.runs.folder import HELLASWAG_FILE, SAMPLES_FILE
from modeling_gpt2repro.runs.plots import STEP_PANELS, Panel, hellaswag_panel, loss_panel, plot_panels, step_panel
from modeling_gpt2repro.runs.read import HELLASWAG_METRICS, MAX_LINES_BYTES, Run, read_all_samples
from modeling_gpt2repro.runs.reference import GPT2_LABEL
from modeling_gpt2repro.runs.summary import (
    hellaswag_value,
    plain_text,
    table,
    used_public_hellaswag,
    without_paths,
)
from modeling_gpt2repro.storage.json_files import is_count, parse_json, read_bounded, require

from .markdown import Report, rows

MAX_SAMPLES = 6  # of a prompt: the first, the last, and most of those between them early, where most is learned
MAX_PROMPTS = 4
SAMPLE_CHARACTERS = 600


def loss_parts(run: Run, report: Report) -> Iterable[str]:
    """The loss curve, and what to compare it with."""
    _, losses = run.series("loss")
    _, validation = run.series("validation_loss")
    if not len(losses) and not len(validation):
        return
    figure = plot_panels([run], [loss_panel], columns=1, size=(10, 5))
    yield report.picture("loss", "Training and validation loss over training tokens", figure)
    gpt2_loss = find_gpt2_loss(run)
    if baselines := ({GPT2_LABEL: gpt2_loss} if gpt2_loss else {}) | run.loss_baselines:
        first = [f"Before the first step the validation loss was {validation[0]:.3f}."] if len(validation) else []
        yield " ".join(["A cross-entropy loss in nats per token is judged by what it is compared with.", *first])
        best = [["**lowest validation loss of this run**", f"**{validation.min():.4f}**"]] if len(validation) else []
        lines = [*best, *([plain_text(label), f"{loss:.4f}"] for label, loss in baselines.items())]
        lines.sort(key=lambda line: float(line[1].strip("*")), reverse=True)
        yield rows(["compared with", "nats per token"], lines)


def curve_parts(run: Run, report: Report) -> Iterable[str]:
    """The loss among those of published runs, where there are any of this setting."""
    assessment = assess(run)
    if assessment is None:
        reason = plain_text(without_paths(reason_without(run), run), SAMPLE_CHARACTERS)
        yield f"There is no published run to compare with: {reason}."
        return
    yield report.picture("curve", "The loss among those of published runs", curve_figure(run, assessment))
    lines = {name: without_paths(line, run) for name, line in assessment.lines().items()}
    yield table({name: plain_text(line, SAMPLE_CHARACTERS) for name, line in lines.items()})


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
            is_continued = rest != text and prompt.strip()
            beginning = f"**{plain_text(prompt, SAMPLE_CHARACTERS)}** " if is_continued else ""
            yield f"> step {step:,}{loss}\n>\n> {beginning}{plain_text(rest, SAMPLE_CHARACTERS)}"
    if len(samples) > MAX_PROMPTS:
        yield f"{SAMPLES_FILE} has {len(samples) - MAX_PROMPTS} more prompts."


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
    remark = f"Each question has four endings. The intervals are 95 %, those of a sample{of}."
    if used_public_hellaswag(run):
        yield f"{remark} The protocols score differently: compare within one."
    else:
        yield f"{remark} These questions are not the public ones, so no published number compares."


def count_examples(path: Path, report: Report) -> int:
    """The examples of the last evaluation; 0 if the file is not there or damaged."""
    found = set()
    try:
        for line in read_bounded(path, MAX_LINES_BYTES).splitlines():
            record = parse_json(line)
            require(type(record) is dict and is_count(record.get("row")), "a line has no row")
            found.add(record["row"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        report.remarks.append(f"{path} was left out: {error}.")
        return 0
    return len(found)


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


def side_by_side(run: Run, panels: Sequence[Panel], height: float) -> Figure:
    """Panels in a row, whose titles say what each curve is."""
    figure = plot_panels([run], panels, columns=len(panels), size=(9, height))
    for legend in list(figure.legends):
        legend.remove()
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure
