"""What `train_accelerate.py --certify` has found out about a run: certificate.json, and a section of the model card."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from modeling_gpt2repro.runs.folder import CERTIFICATE_FILE, MODEL_FOLDER
from modeling_gpt2repro.runs.summary import plain_text
from modeling_gpt2repro.storage.atomic import atomic_write, write_json

SECTION = "## Certificate"


@dataclass(eq=False)
class Certificate:
    """Which steps of a run were taken again, and whether all was as the run has recorded it."""

    total_steps: int
    checkpoints: list[int]  # the steps of those that are whole
    data_are_hashed: bool  # whether each shard was compared with its SHA-256
    environment: dict  # where it was made: device, processes, versions, ...
    problems: list[str]  # a sentence each
    steps: list[dict] = field(default_factory=list)  # those that were drawn and have no problem
    replayed_steps: int = 0  # all that were taken again, with those on the way
    validation: dict = field(default_factory=dict)  # of the evaluation that was repeated: step, loss logged and found
    changes: list[str] = field(default_factory=list)  # what is not as in the run, so that bits may differ
    tolerance: float = 0.0  # how far a loss was allowed to differ, relative to its size; 0: not by a bit
    differences: dict[str, float] = field(default_factory=dict)  # the largest that were found: loss, grad_norm, ...

    def write(self, run_folder: Path) -> Path:
        """Write it beside the final model, or into the run's folder while there is none; returns the file.

        Raises:
            ValueError: If the disk refuses.
        """
        folder = run_folder / MODEL_FOLDER if (run_folder / MODEL_FOLDER).is_dir() else run_folder
        card = folder / "README.md"
        try:
            write_json(folder / CERTIFICATE_FILE, {"certified": not self.problems, **asdict(self), "text": self.text()})
            if card.is_file():
                with atomic_write(card) as file:
                    file.write(replace_section(card.read_text(encoding="utf-8"), self.text(plain_text)).encode())
        except OSError as error:
            raise ValueError(f"{folder} cannot be written ({error.strerror}): make it writable.") from error
        return folder / CERTIFICATE_FILE

    def text(self, escape: Callable[[object], str] = str) -> str:
        """A paragraph for people.

        Args:
            escape: For Markdown, of what is not ours to word: names of devices and files.
        """
        if self.problems:
            return f"Not certified: {' '.join(map(escape, self.problems))}"
        origins = ", ".join(dict.fromkeys(step["from"] for step in self.steps))
        device = f"{self.environment['processes']} x {escape(self.environment['device'])}"
        found = [f"{name} {value:.1e}" for name, value in self.differences.items() if value]
        sentences = [
            f"Loss at {listed([step['step'] for step in self.steps])} of {self.total_steps:,} reproduced"
            + (f" up to rounding (relative differences: at most {', '.join(found)})" if found else " bit for bit")
            + ", with the same batch, gradient norm and update: `train_accelerate.py --certify` took "
            f"{self.replayed_steps} steps again, from {origins}, on {device}, torch {self.environment['torch']}."
        ]
        if self.validation:
            step, loss = self.validation["step"], self.validation["found"]
            sentences.append(f"The validation loss of the weights after step {step:,} is {loss:.4f} again.")
        checked = [f"checkpoint{'s' * (len(self.checkpoints) > 1)}"] if self.checkpoints else []
        checked += ["shards"] if self.data_are_hashed else []
        if checked:
            sentences.append(f"{' and '.join(checked).capitalize()} have the SHA-256 that was written with them.")
        if self.changes:
            changes = ", ".join(map(escape, self.changes))
            sentences.append(
                f"Not all is as it was in the run ({changes}), so the loss was allowed to differ by {self.tolerance:g} "
                "of its size."
            )
        return " ".join(sentences)


def listed(numbers: list[int]) -> str:
    """[3] -> 'step 3'; [3, 9, 402] -> 'steps 3, 9 and 402'."""
    *most, last = (f"{number:,}" for number in numbers)
    return f"steps {', '.join(most)} and {last}" if most else f"step {last}"


def find_section(card: str, heading: str) -> str | None:
    """The text of a card's section `heading`; None if it has none."""
    found = re.search(rf"\n{re.escape(heading)}\n(.*?)(?=\n## |\Z)", card, flags=re.DOTALL)
    return None if found is None else found[1].strip()


def replace_section(card: str, text: str, heading: str = SECTION) -> str:
    """The card with this text as its section `heading`, in place of an earlier one."""
    rest = re.sub(rf"\n{re.escape(heading)}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)
    return f"{rest.rstrip()}\n\n{heading}\n\n{text}\n"
