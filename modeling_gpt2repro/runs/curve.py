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
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .assessment import Assessment, assess, default_reference, evaluation_points, reason_without
from .read import FINEWEB_EDU, Run, read_run
from .reference import FAULTS, GPT2_LOSS, GPT2_SCORE_FILE, RECIPE, SETTING, read_gpt2_score

if TYPE_CHECKING:  # matplotlib, which only the picture needs
    from matplotlib.figure import Figure

# "250 val 6.1696" of build-nanogpt's log.txt, "s:250 tel:6.1710" of llm.c's main.log.
LOG_LINES = (re.compile(r"(\d+) val (\S+)\s*"), re.compile(r"s:(\d+) tel:(\S+)\s*"))
MAX_LOG_BYTES = 2**26
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

    from .plots import COLORS, GREY, STYLE, TokenFormatter

    reference = default_reference()
    tokens, mean, half_width = reference.tokens, reference.losses, reference.half_width(reference.tokens)
    with rc_context(STYLE):
        figure = Figure((11, 5), layout="constrained")
        loss_axes, deviation_axes = figure.subplots(1, 2)
        loss_axes.set_title("Validation loss, nats per token")
        deviation_axes.set_title("The same, less the mean of the normal runs: each fault has its shape")
        for axes, center in ((loss_axes, mean), (deviation_axes, 0 * mean)):
            label = f"normal: {reference.count} published runs, 95 %"
            axes.fill_between(tokens, center - half_width, center + half_width, color=GREY, alpha=0.3, linewidth=0)
            axes.plot(tokens, center, color=GREY, linewidth=1.5, label=label)
        for index, fault in enumerate(FAULTS):
            curve = reference.curves[fault.curves[0]]
            shown = curve.tokens >= tokens[0]
            at = curve.tokens[shown]
            losses = curve.losses[shown]
            style = {"color": COLORS[index % len(COLORS)], "linewidth": 1.2, "label": fault.name}
            style["linestyle"] = "-" if index < len(COLORS) else "--"
            within = at <= tokens[-1]
            loss_axes.plot(at[within], losses[within], **style)
            deviation_axes.plot(at[within], (losses - reference.mean(at))[within], **style)
        if assessment is not None:
            offset = assessment.mean - float(reference.mean(assessment.tokens))
            points = evaluation_points(run, reference)
            at, losses = np.array([(t, loss - offset) for _, t, loss in points if t >= tokens[0] and loss], float).T
            style = {"color": "black", "linewidth": 2, "marker": "o", "markersize": 3, "label": run.folder.name}
            loss_axes.plot(at, losses, **style)
            deviation_axes.plot(at, losses - reference.mean(at), **style)
        for axes in (loss_axes, deviation_axes):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(TokenFormatter(sep=" "))
            axes.set_xlabel("training tokens")
        loss_axes.set_ylim(2.8, 6.8)
        deviation_axes.set_ylim(-0.5, 0.8)
        handles, labels = loss_axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


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
        help="The --output_dir of a training, or a log with lines such as '250 val 6.1696' (build-nanogpt's log.txt).",
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
            run = read_log(args.run, args.tokens_per_step) if args.run.is_file() else read_run(args.run)
            gpt2_loss = None if args.gpt2 is None else parse_gpt2_loss(args.gpt2, run)
            assessment = assess(run, gpt2_loss)
            if assessment is None:
                print(f"{args.run}: no reference for this setting: {reason_without(run, gpt2_loss)}.")
            else:
                print(f"{args.run}\n" + "".join(f"{n:<15}{line}\n" for n, line in assessment.lines().items()), end="")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if args.output:
        from .plots import save_figure

        try:
            print(save_figure(curve_figure(run, assessment), args.output))
        except OSError as error:
            parser.exit(2, f"--output {args.output} cannot be written ({error.strerror}): give another.\n")


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
