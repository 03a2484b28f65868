"""The loss curve as a picture, drawn from metrics.jsonl."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from .metrics import read_metrics


def plot_loss(output_dir: Path, yardsticks: dict[str, float]) -> Path:
    """Draw training and validation loss over tokens into `output_dir/loss.png`.

    Args:
        yardsticks: Label -> loss in nats per token, drawn as dashed lines: what guessing gives.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = read_metrics(output_dir)
    train = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["tokens"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color="tab:blue", linewidth=0.6, alpha=0.3)
        axes.plot(tokens, running_mean(losses), color="tab:blue", linewidth=1.2, label="training, running mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
        axes.annotate(f"{validation[-1][1]:.3f}", validation[-1], textcoords="offset points", xytext=(0, 8), ha="right")
    for label, loss in yardsticks.items():
        axes.axhline(loss, color="gray", linestyle="--", linewidth=0.8)
        axes.annotate(f"{label}: {loss:.2f}", (1.0, loss), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend(loc="center right")
    path = output_dir / "loss.png"
    figure.savefig(path.with_suffix(".partial"), format="png")
    os.replace(path.with_suffix(".partial"), path)
    return path


def running_mean(values: Sequence[float], share: float = 0.02) -> list[float]:
    """The mean of each value and those shortly before it: as many as `share` of all there are."""
    width = max(1, round(share * len(values)))
    sums = list(accumulate(values, initial=0.0))
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]
