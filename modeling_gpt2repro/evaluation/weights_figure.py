"""A picture of a model's weights: what it has learned about positions, and the spread of its matrices by depth."""

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedModel

from modeling_gpt2repro.runs.plots import COLORS, LINE_STYLES, STYLE

from .weights import tensor_kinds

# The lecture draws channels 150, 200 and 250 of 768; of another width, those at the same share of it.
LECTURE_CHANNELS, LECTURE_WIDTH = (150, 200, 250), 768


def plot_weights(models: Mapping[str, PreTrainedModel]) -> Figure:
    """A column of panels for each model, by name; without those of positions where no model learns any."""
    positions = {name: position_embedding(model) for name, model in models.items()}
    rows = [image_panel, channels_panel, similarity_panel] if any(p is not None for p in positions.values()) else []
    heights = [2.6, 2.0, 2.9, 2.3][-len(rows) - 1 :]
    with rc_context(STYLE):
        figure = Figure((5.6 * len(models), sum(heights) + 0.6), layout="constrained")
        axes = figure.subplots(len(heights), len(models), squeeze=False, gridspec_kw={"height_ratios": heights})
        for column, (name, model) in zip(axes.T, models.items(), strict=True):
            for panel, panel_axes in zip(rows, column, strict=False):
                draw_or_say_none(panel, panel_axes, positions[name])
            spread_panel(column[-1], model)
            column[0].text(0, 1.17, name, transform=column[0].transAxes, fontsize=11, fontweight="bold")
        top = max(panel.get_ylim()[1] for panel in axes[-1])
        for panel in axes[-1]:
            panel.set_ylim(0, top)  # one scale, or the two could not be compared
    return figure


def position_embedding(model: PreTrainedModel) -> np.ndarray | None:
    """GPT-2's `wpe`, (n_positions, C); None for a model without it."""
    found = [parameter for name, parameter in model.named_parameters() if name.endswith("wpe.weight")]
    return found[0].detach().float().numpy() if found else None


def draw_or_say_none(panel: Callable[[Axes, np.ndarray], None], axes: Axes, wpe: np.ndarray | None):
    if wpe is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no position embedding", ha="center", transform=axes.transAxes)
    else:
        panel(axes, wpe)


def image_panel(axes: Axes, wpe: np.ndarray):
    """Every number of the embedding as a color: blue negative, red positive."""
    axes.set_title("Position embeddings: a row for each position")
    limit = np.percentile(np.abs(wpe), 99)
    image = axes.imshow(wpe, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    axes.set(xlabel="channel", ylabel="position")
    axes.grid(False)


def channels_panel(axes: Axes, wpe: np.ndarray):
    """Three columns of the embedding over the positions: smooth where something was learned, noise at the start."""
    axes.set_title("Three of its columns: a channel over the positions")
    width = wpe.shape[1]
    for channel, color in zip((width * c // LECTURE_WIDTH for c in LECTURE_CHANNELS), COLORS, strict=False):
        axes.plot(wpe[:, channel], color=color, linewidth=0.9, label=f"channel {channel}")
    axes.set(xlabel="position", xlim=(0, len(wpe) - 1))
    axes.legend(loc="upper right", ncols=3, fontsize=8)
    axes.margins(y=0.25)  # room for the legend


def similarity_panel(axes: Axes, wpe: np.ndarray):
    """Cosine of the angle between the vectors of each two positions, (n_positions, n_positions)."""
    axes.set_title("Cosine similarity of each two positions")
    unit = wpe / np.maximum(np.linalg.norm(wpe, axis=1, keepdims=True), 1e-12)
    image = axes.imshow(unit @ unit.T, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    axes.set(xlabel="position", ylabel="position")
    axes.grid(False)


def spread_panel(axes: Axes, model: PreTrainedModel):
    """Standard deviation of each kind of matrix, block by block."""
    axes.set_title("Standard deviation of the matrices of each block")
    kinds = [kind for kind in tensor_kinds(model) if len(kind.shape) == 2 and len(kind.stds) > 1]
    for index, kind in enumerate(kinds):
        label = ".".join(kind.name.removesuffix(".weight").split(".")[-2:])
        style = {"color": COLORS[index % len(COLORS)], "linestyle": LINE_STYLES[index // len(COLORS) % 4]}
        axes.plot(range(1, len(kind.stds) + 1), kind.stds, marker="o", markersize=3, label=label, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block", ylim=(0, 1.35 * max([std for kind in kinds for std in kind.stds], default=1)))
    if kinds:
        axes.legend(loc="upper center", ncols=4, fontsize=8, columnspacing=1, handlelength=1.5)
