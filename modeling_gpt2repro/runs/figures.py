"""Plot runs over training tokens: loss, HellaSwag, learning rate, gradient norm, tokens per second.

    python -m modeling_gpt2repro.hub.figures runs/gpt2-124m
    python -m modeling_gpt2repro.hub.figures runs/a runs/b --output comparison.png

Several runs share one figure. The dashed lines are the baselines in a run's folder: the loss of guessing, and the
published HellaSwag accuracies of GPT-2 and GPT-3.
"""

import argparse
import sys
from pathlib import Path

from modeling_gpt2repro.runtime.command_line import end

from .folder import LOSS_PICTURE, METRICS_FILE
from .read import read_run

FORMATS = (".png", ".svg")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_gpt2repro.hub.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="The --output_dir of a training.")
    parser.add_argument(
        "--output",
        type=Path,
        help="A .png or .svg file, or a folder for one of each: figures.* of one run, comparison.* of several "
        "(default: the folder of the first RUN).",
    )
    args = parser.parse_args(argv)
    from .plots import available_panels, plot_runs, save_figure  # matplotlib, which the training imports only to plot

    try:
        runs = [read_run(folder) for folder in args.runs]
        for run in runs:
            if run.unreadable_lines:
                print(
                    f"{run.folder / METRICS_FILE}: {run.unreadable_lines:,} damaged line(s) left out.", file=sys.stderr
                )
            if not available_panels([run]):
                raise ValueError(f"{run.folder} has no numbers yet: plot it after its first evaluation.")
        paths = output_paths(args.output or args.runs[0], stem="figures" if len(runs) == 1 else "comparison")
    except (OSError, ValueError) as error:
        end(error)
    for path in paths:
        try:
            print(save_figure(plot_runs(runs), path))
        except OSError as error:
            end(f"{path} cannot be written ({error.strerror}): give another --output.")


def output_paths(output: Path, stem: str) -> list[Path]:
    """The files to write: `a.png` -> a.png; `folder` -> folder/stem.png and folder/stem.svg.

    Raises:
        ValueError: If `output` names a file of another format.
    """
    if output.suffix in FORMATS and not output.is_dir():
        return [output]
    looks_like_a_file = output.suffix[1:].isalpha() and not output.is_dir()  # a.pdf, but not folder.v2
    if output.is_file() or looks_like_a_file:
        raise ValueError(f"output ({output}) must be a .png file, a .svg file, or a folder for both.")
    return [output / f"{stem}{suffix}" for suffix in FORMATS]


def plot_loss(folder: Path) -> Path:
    """Plot a run's loss so far to `folder/loss.png`; returns its path.

    Raises:
        OSError: If it cannot be written, or a file that it draws on cannot be read or is damaged; an earlier plot is
            still there then.
    """
    from .plots import loss_panel, plot_panels, save_figure

    (folder / METRICS_FILE).stat()  # where it is missing, the disk refuses it for now: an OSError, not a wrong folder
    try:
        run = read_run(folder)
    except ValueError as error:  # somebody edited run.json, for one: no reason to end a training
        raise OSError(str(error)) from error
    figure = plot_panels([run], [loss_panel], columns=1, size=(8, 5))
    return save_figure(figure, folder / LOSS_PICTURE, dpi=120)


if __name__ == "__main__":
    main()
