"""The picture of `python -m benchmarks.speed_ladder`, and its table for docs/performance.md."""

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.harness import machine_name
from modeling_gpt2repro.runs.plots import COLORS, GREY, STYLE

MARKERS = ("<!-- written by python -m benchmarks.speed_ladder -->\n", "<!-- until here -->")


def draw(result: dict) -> Figure:
    """Milliseconds of each rung as bars from top to bottom; on the right the lecture's on an A100."""
    names = [rung["name"] for rung in result["rungs"]]
    with rc_context(STYLE):
        figure = Figure((10, 0.9 + 0.42 * len(names)), layout="constrained")
        here, lecture = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        shape = result["settings"]["shape"]
        title = f"{machine_name(result['machine'])}: {shape}, {result['tokens_per_step']:,} tokens a step"
        for axes, heading in ((here, title), (lecture, "lecture: A100, 124M, 16,384 tokens")):
            axes.set_title(heading)
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("ms a step")
        longest = max(rung["ms"] for rung in result["rungs"] if "ms" in rung and not rung["note"])
        for place, rung in enumerate(result["rungs"]):
            if "ms" not in rung:
                here.text(0, place, f" {rung['note']}", va="center", fontsize=8.5, color=GREY)
                continue
            color = GREY if rung["note"] else COLORS[2 if rung["name"] == "ours" else 0]
            shown = min(rung["ms"], 1.15 * longest)  # a rung that is ten times slower would hide the others
            here.barh(place, shown, height=0.65, color=color, alpha=0.4 if rung["note"] else 1)
            inside = shown > 0.5 * longest
            text = f"{rung['ms']:,.0f}{' (bar cut off)' if shown < rung['ms'] else ''}"
            text += f"  x {rung['gain']['median']:.2f}" if rung["gain"] else ""
            text += f"  {rung['note']}" if rung["note"] else ""
            here.text(
                shown * (0.01 if inside else 1),
                place,
                f" {text}",
                va="center",
                fontsize=8.5,
                color=("black" if rung["note"] else "white") if inside else "black",
            )
        before = None
        for place, name in enumerate(names):
            if ms := result["lecture"]["ms"].get(name):
                lecture.barh(place, ms, height=0.65, color=COLORS[1])
                gain = f"  x {before / ms:.2f}" if before else ""
                lecture.text(
                    ms * (0.01 if ms > 500 else 1),
                    place,
                    f" {ms:,}{gain}",
                    va="center",
                    fontsize=8.5,
                    color="white" if ms > 500 else "black",
                )
                before = ms
        here.set_yticks(range(len(names)), names)
        here.invert_yaxis()
    return figure


def table(result: dict) -> str:
    """The ladder in Markdown, and how it was measured."""
    lines = [
        "| rung | ms a step | tokens/s | times as fast as below | lecture's A100, ms | times |",
        "|---|---|---|---|---|---|",
    ]
    before = None
    for rung in result["rungs"]:
        lecture = result["lecture"]["ms"].get(rung["name"])
        theirs = f"{lecture or ''} | {f'{before / lecture:.2f}' if before and lecture else ''}"
        if "ms" in rung:
            gain = f"{rung['gain']['median']:.2f}" if rung["gain"] else ""
            cells = f"{rung['ms']:,.0f} | {rung['tokens_per_second']:,.0f} | {gain}"
        else:
            cells = " | | "
        note = f" ({rung['note']})" if rung["note"] else ""
        lines.append(f"| {rung['name']}{note} | {cells} | {theirs} |".replace("  ", " "))
        before = lecture
    settings = result["settings"]
    total = result["total_gain"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    low, median, high = (total[name] for name in ("lower_quartile", "median", "upper_quartile"))
    gain = f"{median:.2f} times as fast (quartiles {low:.2f} to {high:.2f})"
    size = f"{settings['shape']}, {result['tokens_per_step']:,} tokens a step"
    lines.append(f"\nFrom the first rung to the last {gain}.")
    lines.append(f"{machine_name(result['machine'])}; {size}; {settings['clock']} clock; {versions}.")
    return "\n".join(lines) + "\n"
