"""HellaSwag's numbers for people: a model's table with its place among published ones, and a comparison's."""

from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from .compare import PairedDifference
from .metrics import BASELINES, Baseline, BaselineRank, count_correct
from .official import OFFICIAL_ROWS
from .score import ExampleScores


def progress_on(bar: tqdm, protocols: Sequence[str]) -> Callable[[list[ExampleScores]], None]:
    """A callback that moves the bar by rows and shows each protocol's acc_norm so far (long rows come first)."""
    so_far = count_correct([], protocols)

    def on_progress(finished: list[ExampleScores]) -> None:
        for protocol, count in count_correct(finished, protocols).items():
            for name in count:
                so_far[protocol][name] += count[name]
        shown = {p: f"{count['correct_norm'] / max(count['rows'], 1):.4f}" for p, count in so_far.items()}
        bar.set_postfix(shown, refresh=False)
        bar.update(so_far[protocols[0]]["rows"] - bar.n)

    return on_progress


def results_table(title: str, results: Mapping[str, Mapping]) -> str:
    """Each protocol's accuracies with their 95 % intervals, then the published numbers that they compare with.

    Args:
        results: {protocol: `summary_of` its counts}.
    """
    lines = [
        f"{title}, with 95 % intervals (Wilson)",
        f"{'protocol':12}{'acc':>8}{'':17}{'acc_norm':>8}{'':17}{'rows':>8}",
    ]
    for protocol, result in results.items():
        cells = "".join(
            f"{result[name]:8.4f} [{result[f'{name}_interval'][0]:.4f}, {result[f'{name}_interval'][1]:.4f}]"
            for name in ("acc", "acc_norm")
        )
        lines.append(f"{protocol:12}{cells}{result['rows']:>8}")
    lines.append(f"\npublished, on all {OFFICIAL_ROWS:,} rows; compare within a protocol only")
    for model, protocol, acc, acc_norm, source in BASELINES:
        if protocol in results:
            lines.append(f"{protocol:12}{'' if acc is None else f'{acc:.4f}':>8}{acc_norm:25.4f}   {model}, {source}")
    return "\n".join(lines)


def rank_sentence(protocol: str, place: BaselineRank) -> str:
    """'completion: passed gpt2 (0.2955); next GPT-3 124M (0.3370)', by acc_norm."""

    def words(yardstick: Baseline) -> str:
        doubt = ", inside the 95 % interval" if yardstick.within_interval else ""
        return f"{yardstick.model} ({yardstick.acc_norm:.4f}{doubt})"

    passed = ", ".join(map(words, place.passed)) or "none"
    return f"{protocol}: passed {passed}; next {words(place.next) if place.next else 'none'}"


def comparison_table(first: str, second: str, compared: Mapping[str, Mapping[str, PairedDifference]]) -> str:
    """Both accuracies, their difference with its 95 % interval, and McNemar's test."""
    lines = [
        f"A: {first}",
        f"B: {second}",
        "B - A with its 95 % interval (Bonett and Price); p by McNemar's test, exact (binomial)",
        f"{'protocol':12}{'':10}{'A':>8}{'B':>8}{'B - A':>10}{'':20}{'only A':>8}{'only B':>8}{'rows':>8}{'p':>9}",
    ]
    for protocol, measures in compared.items():
        for name, pair in measures.items():
            (a, b), (low, high) = pair.accuracies, pair.interval
            difference = f"{pair.difference:+10.4f} [{low:+.4f}, {high:+.4f}]"
            counts = f"{pair.only_first:>8}{pair.only_second:>8}{pair.rows:>8}"
            lines.append(f"{protocol:12}{name:10}{a:8.4f}{b:8.4f}{difference}{counts}{pair.p_value:9.2g}")
    return "\n".join(lines)


def comparison_numbers(pair: PairedDifference) -> dict[str, float | int | str | list[float]]:
    """A paired difference as JSON."""
    return {
        "rows": pair.rows,
        "first": pair.accuracies[0],
        "second": pair.accuracies[1],
        "difference": pair.difference,
        "interval": list(pair.interval),
        "only_first": pair.only_first,
        "only_second": pair.only_second,
        "p_value": pair.p_value,
        "test": "McNemar, exact binomial, two-sided",
    }
