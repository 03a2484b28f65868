"""The sections of a report, from the files in a run's folder."""

from collections.abc import Mapping
from pathlib import Path

from modeling_gpt2repro.runs.config import is_complete
from modeling_gpt2repro.runs.folder import METRICS_FILE, MODEL_FOLDER
from modeling_gpt2repro.runs.read import HELLASWAG_METRICS, Run, read_run
from modeling_gpt2repro.runs.summary import (
    count_parameters,
    plain_text,
    result_lines,
    table,
    training_lines,
    without_paths,
)
from modeling_gpt2repro.runtime.hardware import readable_duration
from modeling_gpt2repro.storage.json_files import is_count, is_text, read_json_object, require

from .markdown import Report, readable_count, rows
from .progress import fault_part, median_of, seconds_of, status, stopped_message, time_parts
from .results import curve_parts, hellaswag_parts, loss_parts, sample_parts, step_parts

SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")


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
            has_sizes = all(is_count(config.get(name), minimum=1) for name in SIZES)
            require(has_sizes, f"it has not all of {', '.join(SIZES)}")
            return {name: config[name] for name in SIZES}
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            report.remarks.append(f"{path} was left out: {error}.")
    return None


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
        lines["began with"] = plain_text(without_paths(start, run))
    if is_complete(run.config):
        lines |= training_lines(run)
    elif run.config:
        report.remarks.append(
            f"{run.folder}: run.json lacks some of what a run writes there, so that data are not shown."
        )
    return table(lines) if lines else ""
