"""A page in Markdown with its pictures, and the tables and figures of speech in it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from modeling_gpt2repro.runs.plots import figure_bytes
from modeling_gpt2repro.runtime.hardware import readable_duration

LISTED_STEPS = 10


@dataclass
class Report:
    """A page and its pictures."""

    title: str
    sections: list[str] = field(default_factory=list)  # Markdown, in which {name} is where a picture is
    pictures: dict[str, bytes] = field(default_factory=dict)  # name -> PNG
    remarks: list[str] = field(default_factory=list)  # sentences on what could not be read

    def add(self, heading: str, *parts: str):
        """Add a section, unless none of its parts has a text."""
        if found := [part.rstrip() for part in parts if part]:
            self.sections.append("\n\n".join([f"## {heading}", *found]))

    def picture(self, name: str, meaning: str, figure: Figure) -> str:
        """Add a picture; returns the Markdown that shows it."""
        self.pictures[name] = figure_bytes(figure, "png", dpi=120)
        return f"![{meaning}](picture:{name})"

    def markdown(self, addresses: Mapping[str, str]) -> str:
        """The page; each picture is at the address of its name."""
        text = "\n\n".join([f"# {self.title}", *self.sections])
        for name, address in addresses.items():
            text = text.replace(f"](picture:{name})", f"]({address})")
        return f"{text}\n"


def rows(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def bar(share: float, width: int = 20) -> str:
    """0.5 -> ten blocks; what is not nothing has at least a thin one."""
    eighths = max(1, round(8 * width * share))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def duration(seconds: float) -> str:
    return readable_duration(seconds) if seconds >= 1 else f"{seconds:.2f} s"


def readable_count(count: int) -> str:
    """1_433_600 -> '1.43 M'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:  # what would be rounded to it
            return f"{count / size:.3g} {unit}"
    return str(count)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(steps: Sequence[int]) -> str:
    """'step 3', 'steps 3, 5', and no more than LISTED_STEPS of them."""
    shown = ", ".join(f"{step:,}" for step in steps[:LISTED_STEPS])
    more = f" and {len(steps) - LISTED_STEPS:,} more" if len(steps) > LISTED_STEPS else ""
    return f"step{'' if len(steps) == 1 else 's'} {shown}{more}"
