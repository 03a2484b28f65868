"""Panels of a figure: one number of one or more runs over the tokens they were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from .curves import axis_limits, downsample, mean_width, running_mean
from .read import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import EngFormatter

# Okabe and Ito's colours, which those who see few colours tell apart; then again with broken lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.")
VALIDATION_COLOR = "#D55E00"
GREY = "#555555"
# OpenAI's GPT-2 124M on the validation shard of build-nanogpt's FineWeb-Edu, in nats per token (its play.ipynb).
GPT2_LOSS = 3.2924
# What the numbers of a step are called in metrics.jsonl, and over their panel.
STEP_NUMBERS = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens a second",
}
HELLASWAG = {protocol: f"hellaswag_{protocol.replace('-', '_')}_acc_norm" for protocol in ("completion", "lm-eval")}


def in_tokens() -> EngFormatter:
    """Writes 2000000000 as 2 B: a token is no unit of physics, so it is not 2 G."""
    from matplotlib.ticker import EngFormatter

    formatter = EngFormatter(sep=" ")
    formatter.ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "B", 12: "T"}
    return formatter


def line_style(index: int) -> dict[str, str]:
    """Colour and line style of the run that comes `index`-th."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": STYLES[index // len(COLORS) % len(STYLES)]}


def loss_panel(axes: Axes, runs: Sequence[Run]):
    """Training loss, each step's faint and their mean, and validation loss; what they are to be measured by."""
    axes.set_title("Loss, nats per token")
    shown, yardsticks = [], {}
    for index, run in enumerate(runs):
        yardsticks |= run.loss_yardsticks | ({"GPT-2 124M": GPT2_LOSS} if run.reads_fineweb_edu() else {})
        look = line_style(index)
        shown.append(_noisy_curve(axes, *run.series("loss"), look))
        tokens, losses = run.series("validation_loss")
        shown.append(losses)
        alone = len(runs) == 1
        look = {"color": VALIDATION_COLOR, "linewidth": 1.2} if alone else {"color": look["color"], "linestyle": ""}
        axes.plot(tokens, losses, marker="o", markersize=4, markevery=max(1, len(tokens) // 25), **look)
        if alone and len(losses):
            side = "right" if tokens[-1] else "left"
            _write(axes, f"{losses[-1]:.3f}", (tokens[-1], losses[-1]), "data", side, True, look["color"])
        _marks_at_the_foot(axes, run, line_style(index)["color"])
    _limit(axes, shown, yardsticks, below=1.0, above=0.1, side="right")


def hellaswag_panel(axes: Axes, runs: Sequence[Run], protocol: str):
    """acc_norm of one protocol with its 95 % interval, and the published numbers of that protocol near it."""
    axes.set_title(f"HellaSwag acc_norm, {protocol}")
    name, shown, yardsticks = HELLASWAG[protocol], [], {}
    for index, run in enumerate(runs):
        yardsticks |= run.hellaswag_yardsticks.get(protocol, {})
        tokens, accuracies = run.series(name)
        look = line_style(index)
        axes.plot(tokens, accuracies, marker="o", markersize=3, markevery=max(1, len(tokens) // 25), **look)
        low, high = run.series(f"{name}_low")[1], run.series(f"{name}_high")[1]
        if len(low) == len(high) == len(tokens):
            axes.fill_between(tokens, low, high, color=look["color"], alpha=0.12, linewidth=0)
        shown += [accuracies, low, high]
    _limit(axes, shown, yardsticks, below=0.02, above=0.06, side="left")


def step_panel(axes: Axes, runs: Sequence[Run], name: str):
    """A number that each training step has."""
    axes.set_title(STEP_NUMBERS[name])
    shown = [np.zeros(1)]  # from 0, or a small change looks large
    for index, run in enumerate(runs):
        if name == "learning_rate":
            tokens, values = run.series(name)
            axes.plot(*downsample(tokens, values), **line_style(index))
            shown.append(values)
        else:
            shown.append(_noisy_curve(axes, *run.series(name), line_style(index)))
    _limit(axes, shown)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(in_tokens() if name == "tokens_per_second" else "{x:g}")


def _noisy_curve(axes: Axes, tokens: np.ndarray, values: np.ndarray, look: dict[str, str]) -> np.ndarray:
    axes.plot(*downsample(tokens, values), color=look["color"], linewidth=0.5, alpha=0.25)
    axes.plot(*downsample(tokens, running_mean(values, mean_width(len(values)))), linewidth=1.3, **look)
    return values


def _marks_at_the_foot(axes: Axes, run: Run, color: str):
    foot = axes.get_xaxis_transform()  # x in tokens, y from the panel's foot to its head
    for tokens, marker in ((run.resumed_tokens(), "|"), (run.skipped_tokens(), "x")):
        axes.plot(tokens, np.full(len(tokens), 0.03), marker, color=color, markersize=6, transform=foot)


def _limit(
    axes: Axes,
    shown: Sequence[np.ndarray],
    yardsticks: Mapping[str, float] = MappingProxyType({}),
    below: float = 0.0,
    above: float = 0.0,
    side: str = "left",
):
    """Show the range of what was drawn, and the yardsticks within, named at the side where the curve is not."""
    if not sum(map(len, shown)):
        return
    values = np.concatenate(shown)
    low, high = axis_limits(values, list(yardsticks.values()), below, above)
    axes.set_ylim(low, high)
    reached = min(series[-1] for series in shown if len(series))
    for label, value in yardsticks.items():
        if low < value < high:
            axes.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1)
            over = side == "left" or reached < value
            place = (0.01 if side == "left" else 0.99, value)
            _write(axes, f"{label}: {value:.4g}", place, ("axes fraction", "data"), side, over, GREY)


def _write(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    coordinates: str | tuple[str, str],
    side: str,
    above: bool,
    color: str,
):
    note = axes.annotate(
        text,
        place,
        xycoords=coordinates,
        xytext=(0, 3 if above else -3),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        fontsize=8.5,
        color=color,
    )
    note.set_in_layout(False)
