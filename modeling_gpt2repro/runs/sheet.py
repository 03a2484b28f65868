"""A sheet of panels over the tokens of one or more runs, with one legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from . import panels
from .curves import mean_width
from .read import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "gpt2repro",  # the same numbers give the same file
}
Panel = Callable[["Axes", Sequence[Run]], None]


def draw_sheet(runs: Sequence[Run]) -> Figure:
    """All panels that the runs have numbers for, two in a row; of an odd number the loss is as wide as two."""
    draw = panels_of(runs)
    columns = min(2, len(draw))
    return draw_panels(runs, draw, columns, (10, 5) if columns == 1 else (11, 1 + 2.9 * -(-len(draw) // 2)))


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """What there is to draw, in the sheet's order."""
    names = {name for run in runs for row in run.rows for name in row}
    found = [panels.loss_panel] if names & {"loss", "validation_loss"} else []
    for protocol, name in panels.HELLASWAG.items():
        found += [partial(panels.hellaswag_panel, protocol=protocol)] * (name in names)
    return found + [partial(panels.step_panel, name=name) for name in panels.STEP_NUMBERS if name in names]


def draw_panels(runs: Sequence[Run], draw: Sequence[Panel], columns: int, size: tuple[float, float]) -> Figure:
    """Draw panels for the runs, in rows of `columns`, on a sheet of `size` inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    end = max([row["tokens"] for run in runs for row in run.rows if "tokens" in row], default=0) or 1
    with rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        grid = figure.add_gridspec(-(-len(draw) // columns), columns)
        wide = len(draw) % columns  # 1: the loss takes the first row for itself
        for place, panel in enumerate(draw):
            row, column = divmod(place + wide * (place > 0), columns)
            axes = figure.add_subplot(grid[0, :] if wide and not place else grid[row, column])
            panel(axes, runs)
            axes.set_xlim(-0.01 * end, 1.01 * end)
            axes.xaxis.set_major_formatter(panels.in_tokens())
            if place >= len(draw) - columns:
                axes.set_xlabel("training tokens")
        if handles := legend_of(runs):
            longest = max(len(handle.get_label()) for handle in handles)
            fit = max(1, int(size[0] * 13 / (longest + 6)))  # about 13 letters an inch
            figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), fit))
    return figure


def legend_of(runs: Sequence[Run]) -> list[Line2D]:
    """Handles for the sheet's one legend: the runs, if several, and what each kind of mark means."""
    from matplotlib.lines import Line2D

    alone, marks = len(runs) == 1, []
    color = panels.line_style(0)["color"] if alone else panels.GREY
    widths = [mean_width(len(run.series("loss")[0])) for run in runs]
    if not alone:
        marks += [Line2D([], [], label=name, **panels.line_style(i)) for i, name in enumerate(names_of(runs))]
    if any(len(run.series("loss")[0]) for run in runs):
        label = f"training (mean of {widths[0]:,} steps)" if alone and widths[0] > 1 else "training"
        marks.append(Line2D([], [], color=color, label=label))
    if any(len(run.series("validation_loss")[0]) for run in runs):
        look = {"color": panels.VALIDATION_COLOR} if alone else {"color": panels.GREY, "linestyle": ""}
        marks.append(Line2D([], [], marker="o", markersize=4, label="validation", **look))
    for label, marker, found in (
        ("resumed", "|", any(len(run.resumed_tokens()) for run in runs)),
        ("update skipped", "x", any(len(run.skipped_tokens()) for run in runs)),
    ):
        if found:
            marks.append(Line2D([], [], color=color, marker=marker, linestyle="", label=label))
    return marks


def names_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names; with what is above them where two have the same."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
