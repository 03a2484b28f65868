"""The statistics of `python -m benchmarks.recipes`, its table and its picture, all of the runs in its results."""

import math
from collections.abc import Iterable

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.harness import machine_name
from modeling_gpt2repro.runs.plots import COLORS, GREY, STYLE, TokenFormatter
from modeling_gpt2repro.training.recipes import RECIPES

TUNING_SEED = 0  # the others begin at 1
FIRST_RATES = {"lecture": (1e-3, 2e-3, 4e-3), "fast-adamw": (1e-3, 2e-3, 4e-3), "muon": (4e-3, 8e-3, 16e-3)}
# In standard errors: p = 0.001, one-sided, as track 3 of modded-nanogpt asks for.
REQUIRED_STATISTIC = 3.09
BOOTSTRAP_SAMPLES = 10_000
MARKERS = ("<!-- written by python -m benchmarks.recipes -->\n", "<!-- until here -->")


# Learning rates


def tried_rates(recipe: str, records: list[dict]) -> dict[float, float]:
    """Learning rate -> loss in tuning, by rate; infinite if it is not a number."""
    tried = {r["learning_rate"]: r["loss"] for r in records if (r["recipe"], r["seed"]) == (recipe, TUNING_SEED)}
    return {rate: tried[rate] if math.isfinite(tried[rate]) else math.inf for rate in sorted(tried)}


def rates_to_try(recipe: str, records: list[dict]) -> list[float]:
    """The first ones, then one beyond the edge, as long as the best one is there; none left once it is not."""
    tried = tried_rates(recipe, records)
    if missing := [rate for rate in FIRST_RATES[recipe] if rate not in tried]:
        return missing
    lowest, *_, highest = tried
    best = min(tried, key=tried.get)
    return {lowest: [lowest / 2], highest: [highest * 2]}.get(best, [])


def tuned_rate(recipe: str, records: list[dict]) -> float | None:
    """The learning rate with the lowest loss in tuning; None while that is not over."""
    tried = tried_rates(recipe, records)
    return None if rates_to_try(recipe, records) else min(tried, key=tried.get)


# Statistics


def pooled_deviation(groups: Iterable[np.ndarray]) -> tuple[float, int]:
    """Standard deviation within groups (n,) that differ in their means, and its degrees of freedom.

    >>> pooled_deviation([np.array([1.0, 3.0]), np.array([10.0, 10.0, 13.0])])  # squares 2 and 6 over 1 + 2
    (1.632993161855452, 3)
    """
    groups = list(groups)
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    degrees = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / degrees), degrees


def statistic(target: float, losses: np.ndarray, deviation: float) -> float:
    """How many standard errors the mean of the losses (n,) is below the target."""
    return (target - losses.mean()) * math.sqrt(len(losses)) / deviation


def share_to_loss(shares: np.ndarray, losses: np.ndarray, target: float) -> float:
    """The share of the tokens at which the loss first falls to the target, between two lengths by a straight line.

    The curve sags below that line, so the share is rather too large. It is the smallest of the shares, (n,) ascending,
    if the loss (n,) is at the target there, and infinite if it never is.
    """
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return math.inf
    i = reached[0]
    if i == 0:
        return float(shares[0])
    part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(shares[i - 1] + part * (shares[i] - shares[i - 1]))


def share_interval(shares: np.ndarray, losses: np.ndarray, target_losses: np.ndarray) -> tuple[float, float]:
    """95 % interval of `share_to_loss` over draws of the seeds: losses (lengths, seeds), target's (seeds,).

    A seed decides weights and order for all runs alike, so they are drawn together.
    """
    seeds = len(target_losses)
    draws = np.random.default_rng(0).integers(seeds, size=(BOOTSTRAP_SAMPLES, seeds))
    found = [share_to_loss(shares, losses[:, draw].mean(axis=1), target_losses[draw].mean()) for draw in draws]
    low, high = np.quantile(found, (0.025, 0.975), method="inverted_cdf")  # no mean of a number and infinity
    return float(low), float(high)


# Table and picture


def final_losses(results: dict) -> dict[str, dict[int, np.ndarray]]:
    """Recipe -> steps -> final losses (n,) with the recipe's rate, of the seeds that all lengths have.

    Raises:
        ValueError: If the lecture's are missing, or there are less than two seeds.
    """
    found: dict[str, dict[int, dict[int, float]]] = {}
    for recipe in RECIPES:
        rate = tuned_rate(recipe, results["runs"])
        runs = [r for r in results["runs"] if r["recipe"] == recipe and r["seed"] != TUNING_SEED]
        for run in sorted(runs, key=lambda run: run["steps"]):
            if run["learning_rate"] == rate:
                found.setdefault(recipe, {}).setdefault(run["steps"], {})[run["seed"]] = run["loss"]
    lengths = [set(by_seed) for by_steps in found.values() for by_seed in by_steps.values()]
    seeds = sorted(set.intersection(*lengths)) if lengths else []
    if "lecture" not in found or len(seeds) < 2:
        raise ValueError("There is nothing to compare with: train lecture, too, with at least two of the same seeds.")
    return {
        recipe: {steps: np.array([by_seed[seed] for seed in seeds]) for steps, by_seed in by_steps.items()}
        for recipe, by_steps in found.items()
    }


def table(results: dict) -> str:
    """Markdown: of each recipe and length the losses and the test, then the share of the tokens that it needs."""
    losses = final_losses(results)
    longest = results["settings"]["steps"]
    target_losses = losses["lecture"][longest]
    target = target_losses.mean()
    deviation, degrees = pooled_deviation(group for by_steps in losses.values() for group in by_steps.values())
    versions = results["versions"]
    measured_on = f"{machine_name(results['machine'])}, Python {versions['python']}, torch {versions['torch']}"
    rows = []
    sentences = []
    for recipe, by_steps in losses.items():
        tried = ", ".join(f"{rate:g}" for rate in tried_rates(recipe, results["runs"]))
        cells = f"`{recipe}` | {tuned_rate(recipe, results['runs']):g} (of {tried})"
        for steps, group in by_steps.items():
            value = statistic(target, group, deviation)
            test = "" if recipe == "lecture" else f"{value:.1f}: {'yes' if value >= REQUIRED_STATISTIC else 'no'}"
            rows.append(f"| {cells} | {steps / longest:g} | {group.mean():.3f} ± {group.std(ddof=1):.3f} | {test} |")
        if recipe != "lecture":
            shares = np.array(list(by_steps)) / longest
            group = np.array(list(by_steps.values()))  # (lengths, seeds)
            needed = share_text(share_to_loss(shares, group.mean(axis=1), target), shares)
            low, high = (share_text(share, shares) for share in share_interval(shares, group, target_losses))
            sentences.append(f"- `{recipe}`: {needed} x the tokens of `lecture` (95 % interval: {low} to {high}).")
    return "\n".join(
        [
            "",
            f"| `--recipe` | learning rate | tokens, x {longest * results['settings']['tokens_per_step']:,} "
            f"| final loss, nats: mean ± deviation of {len(target_losses)} seeds | at least as good as `lecture`? |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"To the final loss of `lecture`, {target:.3f}:",
            "",
            *sentences,
            "",
            f"From run to run the final loss deviates by {deviation:.4f} nats, pooled over all rows ({degrees} degrees",
            f"of freedom). {measured_on}.",
            "",
            "",
        ]
    )


def share_text(share: float, shares: np.ndarray) -> str:
    """'0.31', 'more than 1' if it is never reached, 'at most 0.2' if it is at the shortest length already."""
    if math.isinf(share):
        return f"more than {shares[-1]:g}"
    return f"at most {share:g}" if share == shares[0] else f"{share:.2f}"


def draw(results: dict) -> Figure:
    """Final loss of every run over its tokens, and the mean validation curve of the longest runs."""
    losses = final_losses(results)
    settings = results["settings"]
    target = losses["lecture"][settings["steps"]].mean()
    with rc_context(STYLE):
        figure = Figure((8, 5), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Validation loss at the end of a whole run, nats per token")
        for color, (recipe, by_steps) in zip(COLORS, losses.items(), strict=False):
            rate = tuned_rate(recipe, results["runs"])
            curves = [
                run["curve"]
                for run in results["runs"]
                if (run["recipe"], run["learning_rate"], run["steps"]) == (recipe, rate, settings["steps"])
                and run["seed"] != TUNING_SEED
            ]
            tokens, curve = np.mean(curves, axis=0).T
            axes.plot(tokens, curve, color=color, linewidth=1, alpha=0.6, linestyle=":")
            tokens = np.array(list(by_steps)) * settings["tokens_per_step"]
            group = np.array(list(by_steps.values()))  # (lengths, seeds)
            axes.fill_between(tokens, group.min(axis=1), group.max(axis=1), color=color, alpha=0.2, linewidth=0)
            label = f"{recipe}, rate {rate:g}: mean and {group.shape[1]} seeds"
            axes.plot(tokens, group.mean(axis=1), color=color, marker="o", markersize=4, label=label)
            for place, finals in zip(tokens, group, strict=True):
                axes.plot([place] * len(finals), finals, ".", color=color, markersize=3)
        axes.axhline(target, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8)
        label = f"final loss of lecture: {target:.3f}"
        label_style = {"xytext": (0, -3), "textcoords": "offset points", "va": "top", "fontsize": 8.5, "color": GREY}
        axes.annotate(label, (0.01, target), xycoords=("axes fraction", "data"), **label_style)
        axes.plot([], [], color=GREY, linewidth=1, linestyle=":", label="on the way through the longest runs")
        finals = np.concatenate([group for by_steps in losses.values() for group in by_steps.values()])
        axes.set_ylim(finals.min() - 0.1, max(finals.max() + 0.1, target + 0.8))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(TokenFormatter(sep=" "))
        axes.set_xlabel("training tokens of the run")
        axes.legend()
    return figure
