"""Draw training runs against tokens: loss, HellaSwag, learning rate, gradient norm, speed.

    python -m modeling_gpt2repro.hub.figures runs/gpt2-124m
    python -m modeling_gpt2repro.hub.figures runs/a runs/b --output comparison.png

Several runs share a sheet. What a run is measured by (what guessing gives, GPT-2's HellaSwag) stands in its folder.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_gpt2repro.storage.atomic import atomic_write

from .panels import loss_panel
from .read import read_run
from .sheet import STYLE, draw_panels, draw_sheet, panels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="The --output_dir of a training.")
    parser.add_argument(
        "--output",
        type=Path,
        help="A .png or .svg, or a folder for both. By default the first RUN: figures.*, or comparison.* of several.",
    )
    args = parser.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        for run in runs:
            if not panels_of([run]):
                raise ValueError(f"{run.folder} has no numbers yet: draw it after its first evaluation.")
        paths = output_paths(args.output or args.runs[0], "figures" if len(args.runs) == 1 else "comparison")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_figure(draw_sheet(runs), path)
        except OSError as error:
            parser.exit(2, f"{path} cannot be written ({error.strerror}): give another --output.\n")
        print(path)


def output_paths(output: Path, stem: str) -> list[Path]:
    """The files that `output` stands for: itself, or in a folder one of each format.

    Raises:
        ValueError: If it is a file of another format.
    """
    if output.suffix in FORMATS and not output.is_dir():
        return [output]
    if output.is_file() or (output.suffix[1:].isalpha() and not output.is_dir()):
        raise ValueError(f"output ({output}) must be a .png, a .svg, or a folder for both.")
    return [output / f"{stem}{suffix}" for suffix in FORMATS]


def plot_loss(folder: Path) -> Path:
    """Draw a run's loss so far into `folder/loss.png`; returns its path.

    Raises:
        OSError: If it cannot be written; a picture that was there is whole then.
    """
    figure = draw_panels([read_run(folder)], [loss_panel], columns=1, size=(8, 5))
    return write_figure(figure, folder / "loss.png", dpi=120)


def write_figure(figure: Figure, path: Path, dpi: int = 150) -> Path:
    """Write a figure as its path's suffix says, whole or not at all; returns the path.

    Raises:
        OSError: If it cannot be written.
    """
    from matplotlib import rc_context

    content = io.BytesIO()
    with rc_context(STYLE):
        dates = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(content, format=path.suffix[1:], dpi=dpi, metadata=dates)
    with atomic_write(path) as file:
        file.write(content.getvalue())
    return path


if __name__ == "__main__":
    main()
