"""Is my loss curve normal? Compare a run of GPT-2 124M on FineWeb-Edu with published ones.

    python -m modeling_gpt2repro.runs.curve runs/gpt2-124m
    python -m modeling_gpt2repro.runs.curve log/log.txt --output curve.png   # the log of the lecture's code
    python -m modeling_gpt2repro.runs.curve --output references.png          # the published curves alone

The answer is normal, ahead or behind, by how many tokens, what to expect at the end, and, of a run that is not normal,
which published fault its curve looks like. reference.py has the curves and the statistics.
"""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modeling_gpt2repro.runtime.command_line import end
from modeling_gpt2repro.runtime.progress import escape_controls

from .assessment import Assessment, assess, default_reference, evaluation_points, reason_without
from .folder import find_run
from .read import FINEWEB_EDU, Run, read_run
from .reference import FAULTS, GPT2_LOSS, GPT2_SCORE_FILE, RECIPE, SETTING, read_gpt2_score

if TYPE_CHECKING:  # matplotlib, which only the picture needs
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# "250 val 6.1696" of build-nanogpt's log.txt, "s:250 tel:6.1710" of llm.c's main.log.
LOG_LINES = (re.compile(r"(\d+) val (\S+)\s*"), re.compile(r"s:(\d+) tel:(\S+)\s*"))
MAX_LOG_BYTES = 2**26
SHOWN_STEPS = (250, 500, 1000, 2500, 5000, 10_000, 19_072)  # on the axis of the picture
LECTURE = {**SETTING, **RECIPE, "dataset_name": FINEWEB_EDU, "tokenizer": "gpt2"}


def read_log(path: Path, tokens_per_step: int) -> Run:
    """The evaluations in a log of build-nanogpt or llm.c, as a run of the lecture's setting.

    Raises:
        OSError: If the disk refuses it.
        ValueError: If it has none.
    """
    with open(path, "rb") as file:
        text = file.read(MAX_LOG_BYTES).decode(errors="replace")
    records = []
    for line in text.splitlines():
        for match in filter(None, (pattern.fullmatch(line.strip()) for pattern in LOG_LINES)):
            with suppress(ValueError):
                step, loss = int(match[1]), float(match[2])
                loss = loss if math.isfinite(loss) else None
                records.append({"step": step, "tokens": step * tokens_per_step, "validation_loss": loss})
    if not records:
        raise ValueError(
            f"{path} has no line such as '250 val 6.1696': give a run's folder, or the log.txt of build-nanogpt."
        )
    arguments = LECTURE | {"tokens_per_step": tokens_per_step}
    return Run(path, records, [], {"arguments": arguments, "is_assumed": True})


def curve_figure(run: Run | None = None, assessment: Assessment | None = None) -> Figure:
    """The published runs, those with faults, and a run among them: loss, and deviation from the mean, over tokens.

    Args:
        assessment: Of the run; without one, the run is not drawn.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from .plots import COLORS, GREY, STYLE

    reference = default_reference()
    tokens, mean, half_width = reference.tokens, reference.losses, reference.half_width(reference.tokens)
    drawn = []  # tokens, losses, name, style
    for index, fault in enumerate(FAULTS):
        curve = reference.curves[fault.curves[0]]
        inside = (curve.tokens >= tokens[0]) & (curve.tokens <= tokens[-1])
        style = {"color": COLORS[index]} if index < len(COLORS) else {"color": "#6A3D9A", "linestyle": "--"}
        style |= {"marker": "o", "markersize": 3} if len(curve.tokens) < 10 else {}
        drawn.append((curve.tokens[inside], curve.losses[inside], fault.name, style | {"linewidth": 1.2}))
    if assessment is not None:
        offset = assessment.mean - float(reference.mean(assessment.tokens))
        points = [(at, loss - offset) for _, at, loss in evaluation_points(run, reference) if at >= tokens[0] and loss]
        if points:
            style = {"color": "black", "linewidth": 2, "marker": "o", "markersize": 3}
            drawn.append((*np.array(points, dtype=float).T, run.folder.resolve().name, style))
    with rc_context(STYLE):
        figure = Figure((10.5, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.set_title("Validation loss, nats per token")
        right.set_title("Less the mean of the normal runs: each fault has its shape")
        for axes, level in ((left, mean), (right, 0 * mean)):
            axes.fill_between(tokens, level - half_width, level + half_width, color=GREY, alpha=0.3, linewidth=0)
            axes.plot(tokens, level, color=GREY, linewidth=1.5)
            for at, losses, _, style in drawn:
                axes.plot(at, losses if axes is left else losses - reference.mean(at), **style)
            axes.set_xscale("log")
            axes.set_xticks([step * 2**19 for step in SHOWN_STEPS], [f"{step:,}" for step in SHOWN_STEPS])
            axes.minorticks_off()
            axes.set_xlabel("step of 524,288 tokens")
        left.set_ylim(2.8, 6.8)
        right.set_ylim(-0.5, 0.8)
        labels = [(0.0, "normal: 95 % of runs", GREY)]
        for at, losses, name, style in drawn:
            labels.append((float(losses[-1] - reference.mean(at[-1])), name, style["color"]))
        _label_ends(right, labels)
    return figure


def _label_ends(axes: Axes, labels: list[tuple[float, str, str]]):
    """Write (height, text, color) to the right of the panel, each at its height or as near as the others allow."""
    top = math.inf
    for height, text, color in sorted(labels, reverse=True):
        lines = textwrap.wrap(text, 26)
        low, high = axes.get_ylim()
        line = 0.045 * (high - low)
        height = min(max(height, low), top - line * len(lines) / 2)
        top = height - line * len(lines) / 2
        place = {"xy": (1.02, height), "xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axes.annotate("\n".join(lines), **place, color=color, fontsize=8.5)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_gpt2repro.runs.curve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="The --output_dir of a training, one of its models, or a log with lines such as '250 val 6.1696' "
        "(build-nanogpt's log.txt).",
    )
    parser.add_argument(
        "--gpt2",
        metavar="LOSS",
        help="Loss of openai-community/gpt2 on the run's validation split: a number, or the --output of "
        f"evaluation.validation (default: {GPT2_SCORE_FILE} beside the run's shards; for build-nanogpt's {GPT2_LOSS}).",
    )
    parser.add_argument(
        "--tokens_per_step", type=int, default=2**19, help="Of a log, which does not say it (default: %(default)s)."
    )
    parser.add_argument(
        "--output", type=Path, help="A .png or .svg file: the published runs, those with faults, and RUN among them."
    )
    args = parser.parse_args(argv)
    try:
        if args.run is None and args.output is None:
            raise ValueError("There is nothing to do: give a RUN, or --output for a picture of the published runs.")
        if args.output and args.output.suffix not in (".png", ".svg"):
            raise ValueError(f"--output {args.output} must be a .png or .svg file.")
        if args.tokens_per_step < 1:
            raise ValueError(f"--tokens_per_step ({args.tokens_per_step}) must be at least 1.")
        run = assessment = None
        if args.run is not None:
            folder = find_run(args.run) if args.run.is_dir() else args.run
            run = read_log(args.run, args.tokens_per_step) if args.run.is_file() else read_run(folder)
            gpt2_loss = None if args.gpt2 is None else parse_gpt2_loss(args.gpt2, run)
            assessment = assess(run, gpt2_loss)
            if assessment is None:
                answer = f"{args.run}: no reference for this setting: {reason_without(run, gpt2_loss)}."
            else:
                answer = "\n".join([str(args.run), *(f"{n:<15}{line}" for n, line in assessment.lines().items())])
            print(escape_controls(answer, kept="\n"))
    except (OSError, ValueError) as error:
        end(error)
    if args.output:
        from .plots import save_figure

        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            print(save_figure(curve_figure(run, assessment), args.output, dpi=100))
        except OSError as error:
            end(f"--output {args.output} cannot be written ({error.strerror}): give another.")


def parse_gpt2_loss(text: str, run: Run) -> float:
    """'3.31', or the name of a report, as a loss.

    Raises:
        ValueError: If it is neither.
    """
    with suppress(ValueError):
        loss = float(text)
        if 0 < loss < math.inf:
            return loss
    try:
        return read_gpt2_score(Path(text), run.config.get("data", {}).get("data"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--gpt2 {text} must be a loss, or a report of evaluation.validation ({reason}).") from error


if __name__ == "__main__":
    main()
