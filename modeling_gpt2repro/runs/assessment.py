"""Compare a run with the published ones: normal, ahead, behind or diverging, and what it looks like if not normal."""

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .config import read_run_config
from .read import Run, read_run
from .reference import (
    DECIDED,
    FAULTS,
    FIRST,
    FIT_LIMIT,
    GPT2_LABEL,
    GPT2_LOSS,
    KEPT,
    LAST,
    LOSS_SD,
    RECIPE,
    SETTING,
    SHAPE_SD,
    T_QUANTILE,
    TOLERANCE,
    UNKNOWN_SPLIT,
    Fault,
    Reference,
    gpt2_loss_of_shards,
    gpt2_score_file,
)


@dataclass(frozen=True)
class Assessment:
    """What a run's last evaluation says, compared with the published runs; losses in nats per token."""

    verdict: str  # normal, ahead, behind or diverging
    step: int
    tokens: int
    loss: float | None  # None: not a number
    mean: float  # of the published runs, on this run's validation split
    half_width: float  # 95 % of runs lie within mean +- half_width
    runs: int  # published runs in the mean
    rise: float  # above the run's best evaluation before
    shift_tokens: float | None  # how many tokens ahead of the mean; negative: behind
    shift_is_bound: bool  # it is even further, beyond the reference's first or last loss
    final_loss: tuple[float, float] | None  # center and half-width at 10 B tokens, 95 %
    final_hellaswag: tuple[float, float] | None  # acc_norm in the protocol completion
    faults: tuple[Fault, ...]  # that fit, the best first; () for a normal run
    notes: tuple[str, ...]  # what makes the comparison less exact

    @property
    def sentence(self) -> str:
        """Verdict and distance on one line, for a log."""
        if self.loss is None:
            return "diverging: the loss is not a number"
        if self.verdict == "diverging":
            return f"diverging: the loss is {self.rise:.2f} above the best one before"
        difference = self.loss - self.mean
        side = "above" if difference >= 0 else "below"
        text = (
            f"{self.verdict}: {abs(difference):.3f} {side} the mean of {self.runs} published runs (95 % of runs lie "
            f"within {self.half_width:.3f})"
        )
        more = "more than " if self.shift_is_bound else ""
        text += f", {more}{readable_tokens(abs(self.shift_tokens))} tokens "
        text += "ahead" if self.shift_tokens > 0 else "behind"
        if self.faults:
            text += f"; it looks like {' or '.join(fault.name for fault in self.faults)}"
        return text

    def lines(self) -> dict[str, str]:
        """Name -> value, for a report: verdict, reference, what to expect at the end, diagnosis, notes."""
        loss = "not a number" if self.loss is None else f"{self.loss:.4f}"
        lines = {
            "evaluation": f"step {self.step:,}, {readable_tokens(self.tokens)} tokens: validation loss {loss}",
            "compared with": f"{self.mean:.4f}, the mean of {self.runs} published runs of the lecture's code (GPT-2 "
            "124M, FineWeb-Edu, 524,288 tokens a step)",
            "verdict": self.sentence,
        }
        if self.final_loss and self.final_hellaswag:
            loss, half = self.final_loss
            accuracy, spread = self.final_hellaswag
            lines["at the end"] = (
                f"validation loss {loss:.3f} ({loss - half:.3f} to {loss + half:.3f}), HellaSwag {accuracy:.3f} "
                f"({accuracy - spread:.3f} to {accuracy + spread:.3f}; acc_norm, completion)"
            )
        if self.verdict in ("ahead", "behind"):
            names = [f"{fault.name}: {fault.advice}" for fault in self.faults]
            lines["diagnosis"] = "; or ".join(names) or "it looks like no published run"
        if self.notes:
            lines["note"] = "; ".join(self.notes)
        return lines


@lru_cache
def default_reference() -> Reference:
    """All published runs."""
    return Reference()


def assess(run: Run, gpt2_loss: float | None = None, reference: Reference | None = None) -> Assessment | None:
    """Compare the last evaluation of a run, and for a diagnosis those before it, with the published runs.

    Args:
        gpt2_loss: Of OpenAI's GPT-2 124M on the run's validation split, in nats per token; if not given, what
            `find_gpt2_loss` finds.
        reference: If not given, all published runs.

    Returns:
        None if there is nothing to compare; `reason_without` says why.
    """
    reference = reference or default_reference()
    gpt2_loss = find_gpt2_loss(run) if gpt2_loss is None else gpt2_loss
    if reason_without(run, gpt2_loss, reference):
        return None
    points = evaluation_points(run, reference)
    step, tokens, loss = points[-1]
    offset = 0.0 if gpt2_loss is None else gpt2_loss - GPT2_LOSS
    mean = float(reference.mean(tokens))
    half_width = float(reference.half_width(tokens)) + (UNKNOWN_SPLIT if gpt2_loss is None else 0.0)
    finite = [(at, value - offset) for _, at, value in points if value is not None]
    rise = 0.0 if loss is None else loss - offset - min(value for _, value in finite)
    verdict = "normal"
    if loss is None or rise > T_QUANTILE[reference.count - 1] * LOSS_SD * math.sqrt(2) + TOLERANCE:
        verdict = "diverging"
    elif abs(loss - offset - mean) > half_width:
        verdict = "behind" if loss - offset > mean else "ahead"
    shift = None if loss is None else reference.tokens_at(loss - offset) - tokens
    is_bound = loss is not None and not reference.losses[-1] <= loss - offset <= reference.losses[0]

    faults, final_deviation = (), (0.0, 0.0)
    if verdict in ("behind", "ahead"):
        faults, final_deviation = diagnose(finite, reference)
    final_loss = final_hellaswag = None
    is_usual = {name for name, _, _ in unusual_arguments(run)} <= {"tokens_per_step"}
    if verdict != "diverging" and final_deviation and is_usual and tokens < 0.99 * reference.tokens[-1]:
        end = float(reference.losses[-1]) + final_deviation[0]
        half = float(reference.half_width(reference.tokens[-1])) + final_deviation[1]
        coefficients, accuracy_half = reference.hellaswag
        slope = abs(float(np.polyval(np.polyder(coefficients), end)))
        final_loss = (end + offset, half + (UNKNOWN_SPLIT if gpt2_loss is None else 0.0))
        final_hellaswag = (float(np.polyval(coefficients, end)), accuracy_half + slope * half)
    return Assessment(
        verdict=verdict,
        step=step,
        tokens=tokens,
        loss=loss,
        mean=mean + offset,
        half_width=half_width,
        runs=reference.count,
        rise=rise,
        shift_tokens=shift,
        shift_is_bound=is_bound,
        final_loss=final_loss,
        final_hellaswag=final_hellaswag,
        faults=faults,
        notes=tuple(notes(run, gpt2_loss, reference)),
    )


def diagnose(
    points: Sequence[tuple[int, float]], reference: Reference
) -> tuple[tuple[Fault, ...], tuple[float, float] | None]:
    """The faults that fit a run's evaluations (tokens, loss), and the deviation at the end with its uncertainty.

    The best fault comes first, then those at most 20 times less likely. The deviation is None if it is unknown.
    """
    window = [point for point in points if FIRST <= point[0] <= LAST]
    first_loss = next((loss for tokens, loss in points if tokens == 0), None)
    fits = []
    if len(window) > 1:  # one evaluation fits all faults, of some strength
        tokens, losses = np.array(window, dtype=float).T
        count = len(window) + (first_loss is not None)
        for fault in FAULTS:
            fit = reference.fit(fault, tokens, losses - reference.mean(tokens), first_loss)
            if fit is not None and fit[0] <= FIT_LIMIT:
                fits.append((fit[0] * count, fit[1], fault))
    fits.sort(key=lambda fit: fit[0])
    fits = [fit for fit in fits if fit[0] - fits[0][0] < 2 * math.log(20)]
    faults = tuple(fault for _, _, fault in fits)
    tokens, loss = points[-1]
    if tokens >= DECIDED * reference.tokens[-1]:
        deviation = loss - float(reference.mean(tokens))
        return faults, (deviation, KEPT * abs(deviation))
    if len(faults) != 1 or not faults[0].same_end:
        return faults, None
    end = fits[0][1]
    return faults, (end, 2 * SHAPE_SD * abs(end))


def evaluation_points(run: Run, reference: Reference) -> list[tuple[int, int, float | None]]:
    """(step, tokens, loss) of a run's evaluations up to the reference's end; the last one of a step counts."""
    points = {
        record["step"]: (record["step"], record["tokens"], record["validation_loss"])
        for record in run.records
        if "validation_loss" in record and "tokens" in record
    }
    return [points[step] for step in sorted(points) if points[step][1] <= 1.01 * reference.tokens[-1]]


def reason_without(run: Run, gpt2_loss: float | None = None, reference: Reference | None = None) -> str | None:
    """Why a run cannot be compared with the published ones, as the end of a sentence; None if it can."""
    arguments = run.config.get("arguments", {})
    if problem := setting_problem(arguments):
        return problem
    shards = arguments.get("shards")
    cannot_be_seen = shards and not arguments.get("mix") and not Path(shards).is_dir()
    if not run.uses_fineweb_edu() and not (cannot_be_seen and gpt2_loss is not None):
        if cannot_be_seen:
            return f"its shards ({shards}) are not here, so its data is not known; if it is FineWeb-Edu, give --gpt2"
        return "it was not trained on FineWeb-Edu with GPT-2's tokens, as the published runs were"
    points = evaluation_points(run, reference or default_reference())
    if not points or points[-1][1] < FIRST:
        return f"it has no evaluation from {readable_tokens(FIRST)} tokens (step 250) to 10 B, as the published ones"
    return None


def setting_problem(arguments: dict) -> str | None:
    """Which of the model's arguments is not that of the published runs, as the end of a sentence; None if all are."""
    if not arguments:
        return "it has no run.json, so what was trained is not known"
    for name, value in SETTING.items():
        if arguments.get(name) != value:
            return f"its {name} is {arguments.get(name)}, and that of the published runs {value}"
    return None


def notes(run: Run, gpt2_loss: float | None, reference: Reference) -> Iterator[str]:
    """What makes the comparison less exact than between equal runs."""
    arguments = run.config["arguments"]
    if run.config.get("is_assumed"):
        yield "the log does not say what was trained: taken to be GPT-2 124M on FineWeb-Edu, on the lecture's split"
    for name, value, usual in unusual_arguments(run):
        yield f"{name} is {shown(value)}, not {shown(usual)}" + (
            ", so it is compared by tokens" if name == "tokens_per_step" else ", so no end is predicted"
        )
    if gpt2_loss is None:
        shards = arguments.get("shards")
        command = "modeling_gpt2repro.evaluation.validation"
        if shards:
            command += f" --shards {shlex.quote(shards)} --output {shlex.quote(str(gpt2_score_file(shards)))}"
        else:  # the same stream has the same split
            command = "train_accelerate.py --init_from openai-community/gpt2 --train_tokens 8192 --output_dir runs/gpt2"
            command += ", whose first validation loss it is, and give it as --gpt2"
        yield f"GPT-2's loss on this validation split is not known, which adds {UNKNOWN_SPLIT} to the interval"
        yield f"to measure it, run {'python -m ' if shards else ''}{command}"
    elif gpt2_loss != GPT2_LOSS:
        yield f"the mean is shifted by {gpt2_loss - GPT2_LOSS:+.4f}, because GPT-2 has {gpt2_loss:.4f} on this split"
    last = max(record["tokens"] for record in run.records if "validation_loss" in record and "tokens" in record)
    if last > 1.01 * reference.tokens[-1]:
        yield "the published runs end at 10 B tokens, so later evaluations are left out"


def unusual_arguments(run: Run) -> list[tuple[str, object, object]]:
    """Name, value and usual value of the arguments in which a run differs from the lecture's recipe."""
    values = {name: run.config["arguments"].get(name, usual) for name, usual in RECIPE.items()}
    return [(name, values[name], usual) for name, usual in RECIPE.items() if values[name] != usual]


def find_gpt2_loss(run: Run) -> float | None:
    """GPT-2's loss on the validation split of a run: from its baselines.json, or from its shards; None if unknown."""
    if GPT2_LABEL in run.loss_baselines:
        return run.loss_baselines[GPT2_LABEL]
    if run.config.get("is_assumed"):
        return GPT2_LOSS
    shards = run.config.get("arguments", {}).get("shards")
    return gpt2_loss_of_shards(shards, run.config.get("data", {}).get("data")) if shards else None


def curve_sentence(folder: Path, step: int) -> str | None:
    """The verdict on a run's evaluation of this step; None without a reference, or if its files cannot be read now."""
    with suppress(OSError, ValueError):
        if setting_problem(read_run_config(folder).get("arguments", {})) is None:  # else its records need not be read
            assessment = assess(read_run(folder))
            return assessment.sentence if assessment is not None and assessment.step == step else None
    return None


def reference_band(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Tokens, mean and half-width (n,) of the published runs, on the run's split; None without a reference."""
    if (assessment := assess(run)) is None:
        return None
    reference = default_reference()
    offset = assessment.mean - float(reference.mean(assessment.tokens))
    extra = assessment.half_width - float(reference.half_width(assessment.tokens))
    return reference.tokens, reference.losses + offset, reference.half_width(reference.tokens) + extra


def readable_tokens(tokens: float) -> str:
    """131072000 -> '0.13 B', 2097152 -> '2.1 M'."""
    return f"{tokens / 1e9:.2f} B" if tokens >= 99.5e6 else f"{tokens / 1e6:.1f} M"


def shown(value: object) -> str:
    """524288 -> '524,288'; others as they are."""
    return f"{value:,}" if type(value) is int else str(value)
