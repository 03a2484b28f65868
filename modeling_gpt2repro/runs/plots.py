"""Plots of one or more runs over training tokens: loss, HellaSwag, learning rate, gradient norm, tokens per second."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import patheffects, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path as CurvePath
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox, TransformedBbox

from modeling_gpt2repro.storage.atomic import atomic_write

from .assessment import reference_band
from .read import HELLASWAG_METRICS, Run
from .reference import GPT2_LABEL, GPT2_LOSS

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "gpt2repro",  # fixed, so that the same numbers give the same bytes
}
# The colorblind-safe palette of Okabe and Ito (https://jfly.uni-koeln.de/color/).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":", "-.")  # the palette again for runs 7 to 12, and so on
VALIDATION_COLOR = "#D55E00"
GREY = "#555555"
BAND_COLOR = COLORS[2]
STEP_PANELS = {  # metric of each training step -> title
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second",
}
MAX_POINTS = 1000  # a panel is about as many pixels wide
MAX_MARKERS = 25
INSET = (0.44, 0.42, 0.54, 0.38)  # left, bottom, width, height, as shares of the panel: where a loss curve never is
LABEL_PLACES = [  # x as a share of the panel's width, the side of the label at x, whether above its line
    (x, side, above) for above in (True, False) for x, side in ((0.99, "right"), (0.01, "left"), (0.5, "center"))
]
Panel = Callable[[Axes, Sequence[Run]], None]


def plot_runs(runs: Sequence[Run]) -> Figure:
    """Plot every metric that any of the runs has, two panels side by side."""
    panels = available_panels(runs)
    if len(panels) == 1:
        return plot_panels(runs, panels, columns=1, size=(10, 5))
    return plot_panels(runs, panels, columns=2, size=(11, 1 + 2.9 * math.ceil(len(panels) / 2)))


def available_panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels for which any of the runs has numbers."""
    names = {name for run in runs for record in run.records for name in record}
    panels = [loss_panel] if names & {"loss", "validation_loss"} else []
    panels += [partial(hellaswag_panel, protocol=p) for p, name in HELLASWAG_METRICS.items() if name in names]
    return panels + [partial(step_panel, name=name) for name in STEP_PANELS if name in names]


def plot_panels(runs: Sequence[Run], panels: Sequence[Panel], columns: int, size: tuple[float, float]) -> Figure:
    """Plot panels row by row on a figure of `size` inches; the first one fills what is left of its row."""
    last_token = max([record.get("tokens", 0) for run in runs for record in run.records], default=0) or 1
    cells = [0] * (-len(panels) % columns) + list(range(len(panels)))  # 5 panels in 2 columns: 0 0, 1 2, 3 4
    with rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        mosaic = figure.subplot_mosaic(np.reshape(cells, (-1, columns)).tolist())
        for index, panel in enumerate(panels):
            mosaic[index].set_xlim(-0.01 * last_token, 1.01 * last_token)
            panel(mosaic[index], runs)
            mosaic[index].xaxis.set_major_formatter(TokenFormatter(sep=" "))
            if index >= len(panels) - columns:
                mosaic[index].set_xlabel("training tokens")
        if handles := legend_handles(runs):
            widths = [len(handle.get_label()) + 6 for handle in handles]  # in letters; the line takes about 6
            available = int(13 * size[0])  # about 13 letters an inch at this font size
            one_row = sum(widths) <= available
            ncols = len(handles) if one_row else max(1, available // max(widths))
            figure.legend(handles=handles, loc="outside upper left", ncols=ncols)
    return figure


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> Path:
    """Write a figure atomically, in the format of the path's suffix; returns the path."""
    content = figure_bytes(figure, path.suffix[1:], dpi)
    with atomic_write(path) as file:
        file.write(content)
    return path


def figure_bytes(figure: Figure, format: str, dpi: int = 150) -> bytes:
    """A figure as the content of a file of this format, 'png' or 'svg'."""
    content = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else {}
    with rc_context(STYLE):
        figure.savefig(content, format=format, dpi=dpi, metadata=metadata)
    return content.getvalue()


def loss_panel(axes: Axes, runs: Sequence[Run]):
    """Training loss (every step faint, the running mean strong) and validation loss, with their baselines."""
    axes.set_title("Loss, nats per token")
    shown = []
    first_losses = []
    baselines = {}
    foot = axes.get_xaxis_transform()  # x in tokens, y as a share of the panel's height
    for index, run in enumerate(runs):
        baselines |= ({GPT2_LABEL: GPT2_LOSS} if run.uses_fineweb_edu() else {}) | run.loss_baselines
        style = line_style(index)
        if len(runs) == 1 and (band := reference_band(run)) is not None:
            _plot_reference(axes, run, *band)
        shown.append(_plot_noisy(axes, *run.series("loss"), style))
        for tokens, marker in ((run.resumed_tokens(), "|"), (run.skipped_tokens(), "x")):
            axes.plot(tokens, np.full(len(tokens), 0.03), marker, color=style["color"], markersize=6, transform=foot)
        tokens, losses = run.series("validation_loss")
        shown.append(losses)
        first_losses += [*shown[-2][:1], *losses[:1]]
        if len(runs) > 1:  # points in the run's color
            _plot_points(axes, tokens, losses, color=style["color"], linestyle="", markersize=4)
        elif len(losses):
            _plot_points(axes, tokens, losses, color=VALIDATION_COLOR, linewidth=1.2, markersize=4)
            last = (tokens[-1], losses[-1])
            axes.annotate(f"{losses[-1]:.3f}", last, **_label("right" if tokens[-1] else "left", VALIDATION_COLOR))
    _limit_and_draw_baselines(axes, shown, baselines, below=1.0, above=0.1, included=first_losses)


def hellaswag_panel(axes: Axes, runs: Sequence[Run], protocol: str):
    """acc_norm of one protocol with its 95 % interval, and published numbers of the same protocol close to it."""
    axes.set_title(f"HellaSwag acc_norm, {protocol}")
    name = HELLASWAG_METRICS[protocol]
    shown = []
    baselines = {}
    for index, run in enumerate(runs):
        baselines |= run.hellaswag_baselines.get(protocol, {})
        tokens, accuracies = run.series(name)
        _plot_points(axes, tokens, accuracies, **line_style(index), markersize=3)
        _, low = run.series(f"{name}_low")
        _, high = run.series(f"{name}_high")
        if len(low) == len(high) == len(tokens):  # records of early versions have no interval
            axes.fill_between(tokens, low, high, color=line_style(index)["color"], alpha=0.12, linewidth=0)
        shown += [accuracies, low, high]
    _limit_and_draw_baselines(axes, shown, baselines, below=0.02, above=0.06)


def step_panel(axes: Axes, runs: Sequence[Run], name: str):
    """A metric of each training step, on an axis from 0, because any other makes small changes look large."""
    axes.set_title(STEP_PANELS[name])
    shown = [np.zeros(1)]
    for index, run in enumerate(runs):
        tokens, values = run.series(name)
        if name == "learning_rate":  # exact, without noise
            axes.plot(*downsample(tokens, values), **line_style(index))
            shown.append(values)
        else:
            shown.append(_plot_noisy(axes, tokens, values, line_style(index)))
    axes.set_ylim(0, axis_limits(np.concatenate(shown))[1])
    axes.yaxis.set_major_formatter(TokenFormatter(sep=" ") if name == "tokens_per_second" else "{x:g}")


def legend_handles(runs: Sequence[Run]) -> list[Artist]:
    """The runs, if there are several, and the meaning of each line and marker that occurs."""
    alone = len(runs) == 1
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    handles = [] if alone else [Line2D([], [], label=name, **line_style(i)) for i, name in enumerate(names)]
    width = mean_width(len(runs[0].series("loss")[1]))
    training = f"training (mean of {width:,} steps)" if alone and width > 1 else "training"
    points = {"marker": "o", "markersize": 4} | ({"color": VALIDATION_COLOR} if alone else {"linestyle": ""})
    if alone and reference_band(runs[0]) is not None:
        handles.append(Patch(color=BAND_COLOR, alpha=0.35, linewidth=0, label="95 % of published runs"))
    for label, found, style in (
        (training, any(len(run.series("loss")[1]) for run in runs), {}),
        ("validation", any(len(run.series("validation_loss")[1]) for run in runs), points),
        ("resumed", any(len(run.resumed_tokens()) for run in runs), {"marker": "|", "linestyle": ""}),
        ("update skipped", any(len(run.skipped_tokens()) for run in runs), {"marker": "x", "linestyle": ""}),
    ):
        if found:
            handles.append(Line2D([], [], label=label, **{"color": COLORS[0] if alone else GREY, **style}))
    return handles


def line_style(index: int) -> dict[str, str]:
    """Color and line style of the run at `index`."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]}


class TokenFormatter(EngFormatter):
    """Formats 2000000000 as 2 B: tokens are counted in billions, not in SI's giga."""

    ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "B", 12: "T"}


def mean_width(count: int) -> int:
    """The width of the running mean over `count` values: an odd number, about 2 % of them."""
    return 2 * (count // 100) + 1


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value (n,) and its neighbors, `width` in all; fewer at both ends.

    The window is centered: a mean over past values only would lag behind while the loss falls.
    """
    index = np.arange(len(values))
    first = np.maximum(index - width // 2, 0)
    last = np.minimum(index + width // 2 + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[last] - sums[first]) / (last - first)


def downsample(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `max_points` of the points (n,): minimum and maximum of each chunk, so that no spike is lost."""
    if len(x) <= max_points:
        return x, y
    chunks = np.array_split(np.arange(len(x)), max_points // 2)
    kept = np.unique([i for chunk in chunks for i in (chunk[np.argmin(y[chunk])], chunk[np.argmax(y[chunk])])])
    return x[kept], y[kept]


def axis_limits(
    values: np.ndarray,
    baselines: Sequence[float] = (),
    below: float = 0.0,
    above: float = 0.0,
    included: Sequence[float] = (),
) -> tuple[float, float]:
    """Limits of an axis that shows the values (n,) but the highest 2 %, which may be spikes.

    Args:
        baselines: Included if they lie at most `below` or `above` that range.
        included: Values that are always shown, such as the first of a curve.
    """
    low = float(values.min())
    high = max(float(np.percentile(values, 98, method="higher")), *included, -math.inf)
    near = [baseline for baseline in baselines if low - below <= baseline <= high + above]
    low = min([low, *near])
    high = max([high, *near])
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    label_below = any(baseline - low < margin for baseline in near)
    label_above = any(high - baseline < margin for baseline in near)
    return low - (2 if label_below else 1) * margin, high + (2 if label_above else 1) * margin


def _plot_noisy(axes: Axes, tokens: np.ndarray, values: np.ndarray, style: Mapping[str, str]) -> np.ndarray:
    mean = running_mean(values, mean_width(len(values)))
    axes.plot(*downsample(tokens, values), color=style["color"], linewidth=0.5, alpha=0.25)
    axes.plot(*downsample(tokens, mean), linewidth=1.3, **style)
    return values


def _plot_reference(axes: Axes, run: Run, tokens: np.ndarray, mean: np.ndarray, half_width: np.ndarray):
    """The band of published runs; and, in a figure that is one large panel, the run's distance from their mean."""
    axes.fill_between(tokens, mean - half_width, mean + half_width, color=BAND_COLOR, alpha=0.35, linewidth=0)
    if len(axes.figure.axes) > 1:
        return
    at, losses = run.series("validation_loss")
    inside = (at >= tokens[0]) & (at <= 1.01 * tokens[-1])
    distances = (losses - np.interp(np.log(at.clip(min=1)), np.log(tokens), mean))[inside]
    inset = axes.inset_axes(INSET)
    inset.set_title("validation, less the published mean", fontsize=8.5)
    inset.fill_between(tokens, -half_width, half_width, color=BAND_COLOR, alpha=0.35, linewidth=0)
    _plot_points(inset, at[inside], distances, color=VALIDATION_COLOR, linewidth=1.2, markersize=3)
    limit = min(1.0, 1.15 * float(max(np.abs(distances).max(initial=0.0), half_width.max())))
    inset.set_ylim(-limit, limit)
    inset.set_xlim(axes.get_xlim())
    inset.xaxis.set_major_formatter(TokenFormatter(sep=" "))
    inset.tick_params(labelsize=8)


def _plot_points(axes: Axes, tokens: np.ndarray, values: np.ndarray, **style):
    axes.plot(tokens, values, marker="o", markevery=max(1, len(tokens) // MAX_MARKERS), **style)


def _limit_and_draw_baselines(
    axes: Axes,
    shown: Sequence[np.ndarray],
    baselines: Mapping[str, float],
    below: float,
    above: float,
    included: Sequence[float] = (),
):
    """Set the y limits and draw dashed baselines, each with a label away from the curves and the other labels."""
    if not any(map(len, shown)):
        return
    low, high = axis_limits(np.concatenate(shown), list(baselines.values()), below, above, included)
    axes.set_ylim(low, high)
    curves = [line.get_transform().transform_path(line.get_path()) for line in axes.lines if len(line.get_xdata())]
    for name, value in sorted(baselines.items(), key=lambda item: item[1]):
        if low < value < high:
            axes.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1)
            _label_baseline(axes, f"{name.split(',')[0]}: {value:.4g}", value, curves)


def _label_baseline(axes: Axes, text: str, value: float, curves: Sequence[CurvePath]):
    """Label the baseline where the text covers no other label and the fewest curves.

    Boxes are compared in pixels, before the figure's layout, which enlarges the panels but not the text.
    """
    others = [label.get_window_extent() for label in axes.texts]
    if axes.child_axes:
        others.append(TransformedBbox(Bbox.from_extents(INSET[0] - 0.12, INSET[1] - 0.08, 1, 0.9), axes.transAxes))

    def badness(label: Annotation) -> tuple[int, int]:
        box = label.get_window_extent()
        is_outside = not all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
        return box.count_overlaps(others) + is_outside, sum(
            curve.intersects_bbox(box, filled=False) for curve in curves
        )

    labels = [
        axes.annotate(text, (x, value), xycoords=("axes fraction", "data"), **_label(side, GREY, above))
        for x, side, above in LABEL_PLACES
    ]
    best = min(labels, key=badness)
    for label in labels:
        if label is not best:
            label.remove()


def _label(side: str, color: str, above: bool = True) -> dict:
    return {
        "ha": side,
        "va": "bottom" if above else "top",
        "xytext": (0, 3 if above else -3),
        "textcoords": "offset points",
        "fontsize": 8.5,
        "color": color,
        "path_effects": [patheffects.withStroke(linewidth=2, foreground="white")],  # legible on top of lines
        "in_layout": False,  # or a panel with a long label would get narrower than the others
    }
