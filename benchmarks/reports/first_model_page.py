"""Picture and text of the results of benchmarks.first_model, for the lesson."""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

from benchmarks.harness import machine_name
from modeling_gpt2repro.runs.plots import GREY, STYLE, save_figure

UNIT = "nats a story"
COLORS = {"lecture": "#0072B2", "muon": "#D55E00"}  # Okabe and Ito's
OPTIMIZERS = {"lecture": "AdamW", "muon": "Muon"}
QUOTED_WORDS = 160  # a whole story
SECONDS = 150  # of the results that the lesson is about
PICTURE = (
    "![Above, the loss of the four models on whole stories over seconds of training, with the floor as a dotted line; "
    "below, the share of names, animals and things that each gets right](images/first_model.png)"
)
BEGIN, END = "<!-- {}: written by python -m benchmarks.first_model -->", "<!-- end of {} -->"


def name_of(result: dict) -> str:
    return f"{result['settings']['n_layer']} layers, {OPTIMIZERS[result['settings']['recipe']]}"


def draw(results: Sequence[dict], path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure_of(results), path, dpi=110)


def figure_of(results: Sequence[dict]) -> Figure:
    """Loss, and names right, over seconds of training: a line for each run, with its name at its end."""
    with rc_context(STYLE):
        figure = Figure((8, 7), layout="constrained")
        loss, right = figure.subplots(2, 1, sharex=True)
        loss.set_title(f"Loss on whole stories that no model was trained on, {UNIT}")
        loss.set_yscale("log", base=2)
        loss.yaxis.set_major_locator(LogLocator(base=2))
        loss.yaxis.set_minor_locator(NullLocator())
        loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        plot_lines(loss, results, "loss", f"floor {results[0]['floor']:.3f}", results[0]["floor"], "{:.3f}")
        right.set_title("Names, animals and things right, where the story fixes them")
        right.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        right.set_ylim(-0.03, 1.06)
        plot_lines(right, results, "right", "", None, "{:.0%}")
        right.set_xlabel("seconds of training steps")
    return figure


def plot_lines(axes: Axes, results: Sequence[dict], key: str, level_name: str, level: float | None, number: str):
    """The curves of one number, and a dashed level; names to the right of the panel, none on top of another."""
    last = max(point["seconds"] for result in results for point in result["curve"])
    axes.set_xlim(0, last * 1.01)
    ends = []
    for result in results:
        color = COLORS[result["settings"]["recipe"]]
        style = "-" if result["settings"]["n_layer"] == 4 else "--"
        axes.plot(*([p[name] for p in result["curve"]] for name in ("seconds", key)), style, color=color, linewidth=1.6)
        ends.append((result[key], f"{name_of(result)}: {number.format(result[key])}", color))
    if level is not None:
        axes.axhline(level, color=GREY, linestyle=":", linewidth=1.2)
        ends.append((level, level_name, GREY))
        axes.set_ylim(bottom=level * 0.85)
    low, high = axes.transData.inverted().transform(axes.bbox.get_points())[:, 1]
    to_share = axes.transData + axes.transAxes.inverted()  # of the panel's height
    ends.sort()
    heights = spread([to_share.transform((0, min(max(value, low), high)))[1] for value, _, _ in ends], gap=0.085)
    for (_, text, color), height in zip(ends, heights, strict=True):
        axes.annotate(text, (1.015, height), xycoords="axes fraction", color=color, va="center", fontsize=9)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights of labels, moved apart to `gap` from each other: those that are too near, up.

    At the top they are moved down instead: [0.5, 0.52, 1] -> [0.5, 0.6, 1], [0.98, 1] -> [0.9, 1] with a gap of 0.1.
    """
    moved = list(heights)
    for place in range(1, len(moved)):
        moved[place] = max(moved[place], moved[place - 1] + gap)
    ceiling = 1.0
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], ceiling)
        ceiling = moved[place] - gap
    return moved


def seconds_to_half(curve: Sequence[dict]) -> float | None:
    """Seconds at the first evaluation with half of the names right; None if there is none."""
    return next((point["seconds"] for point in curve if point["right"] >= 0.5), None)


def table(results: Sequence[dict]) -> str:
    lines = [
        f"| layers | optimizer | steps | seconds | {UNIT} | times the floor | right | half right after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        half = seconds_to_half(result["curve"])
        cells = [
            result["settings"]["n_layer"],
            OPTIMIZERS[result["settings"]["recipe"]],
            f"{result['step']:,}",
            f"{result['seconds']:.0f}",
            f"{result['loss']:.3f}",
            f"{result['times_floor']:.2f}",
            f"{result['right']:.0%}",
            "never" if half is None else f"{half:.0f} s",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def kinds_table(results: Sequence[dict]) -> str:
    kinds = list(results[0]["right_by_kind"])
    lines = [f"| right, of | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for result in results:
        shares = [f"{result['right_by_kind'][kind]:.0%}" for kind in kinds]
        lines.append(f"| {name_of(result)} | {' | '.join(shares)} |")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """A text as a quotation, shortened, without Markdown and what cannot be printed."""
    text = "".join(c if c.isprintable() or c.isspace() else "�" for c in text).strip()
    text = "".join(f"\\{c}" if c in "\\`*_<>[]|#" else c for c in text)
    shown = re.match(rf"(\S+\s*){{0,{QUOTED_WORDS}}}", text)[0]
    paragraphs = re.split(r"\s*\n\s*", shown.strip() + (" ..." if shown != text else ""))
    return "\n>\n".join(wrapped(paragraph, indent="> ") for paragraph in paragraphs)


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 120, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def sections(results: Sequence[dict]) -> dict[str, str]:
    """The parts of the lesson that come from the results, Markdown, by name."""
    first = results[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("python", "torch", "transformers"))
    source = f"Source: `{first['command']}`, {machine_name(first['machine'])}, {versions}."
    toy = first["settings"]["seconds"] != SECONDS or first["settings"]["train_flags"] or len(results) < 4
    warning = ["**Toy figures, not yet those of the lesson**: run `python -m benchmarks.first_model`."] if toy else []
    nats = first["story_bits"] * math.log(2)
    bits = wrapped(f"It was written from {first['story_bits']} random bits, which are {nats:.1f} nats.")
    return {
        "story": f"{quoted(first['story'])}\n\n{bits}",
        "table": "\n\n".join([*warning, PICTURE, table(results), wrapped(source)]),
        "samples": "\n\n".join(f"{name_of(result)}:\n\n{quoted(result['sample'])}" for result in results),
        "kinds": kinds_table(results),
    }


def rewrite_page(results: Sequence[dict], page: Path):
    """Replace the parts of the page that come from the results; each is between two marks.

    Raises:
        ValueError: If the page does not have both of them.
    """
    text = page.read_text(encoding="utf-8")
    for name, part in sections(results).items():
        before, begin, rest = text.partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        if not begin or not end:
            raise ValueError(f"{page} has no {BEGIN.format(name)} and {END.format(name)}: put them where it belongs.")
        text = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    page.write_text(text, encoding="utf-8")
