"""HellaSwag's numbers as text: a model's table, its rank among published models, and a comparison of two models."""

from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from .compare import PairedDifference
from .metrics import BASELINES, Baseline, BaselineRank, Summary
from .official import OFFICIAL_EXAMPLES
from .score import ExampleScores


def progress_callback(bar: tqdm, protocols: Sequence[str]) -> Callable[[list[ExampleScores]], None]:
    """A callback for `score_task` that moves the bar by examples and shows each protocol's acc_norm so far."""
    completed = dict.fromkeys(protocols, 0)
    correct_norm = dict.fromkeys(protocols, 0)

    def on_progress(scores: list[ExampleScores]) -> None:
        for example_scores in scores:
            completed[example_scores.protocol] += 1
            correct_norm[example_scores.protocol] += example_scores.correct_norm
        so_far = {p: f"{correct_norm[p] / max(completed[p], 1):.4f}" for p in protocols}
        bar.set_postfix(so_far, refresh=False)
        bar.update(completed[protocols[0]] - bar.n)

    return on_progress


def results_table(title: str, results: Mapping[str, Summary]) -> str:
    """Each protocol's accuracies with their 95 % intervals, then the published numbers that they compare with.

    Args:
        results: Of `summarize_by_protocol`.
    """
    lines = [
        f"{title}, with 95 % intervals (Wilson)",
        f"{'protocol':12}{'acc':>8}{'':17}{'acc_norm':>8}{'':17}{'examples':>8}",
    ]
    for protocol, result in results.items():
        cells = "".join(
            f"{result[name]:8.4f} [{result[f'{name}_interval'][0]:.4f}, {result[f'{name}_interval'][1]:.4f}]"
            for name in ("acc", "acc_norm")
        )
        lines.append(f"{protocol:12}{cells}{result['rows']:>8}")
    lines.append(f"\npublished, on all {OFFICIAL_EXAMPLES:,} examples; compare within a protocol only")
    for model, protocol, acc, acc_norm, source in BASELINES:
        if protocol in results:
            lines.append(f"{protocol:12}{'' if acc is None else f'{acc:.4f}':>8}{acc_norm:25.4f}   {model}, {source}")
    return "\n".join(lines)


def ranks_text(ranks: Mapping[str, BaselineRank], num_examples: int) -> str:
    """One `rank_sentence` for each protocol; without ranks, why there are none."""
    if not ranks:
        return (
            f"These {num_examples:,} examples are not the official {OFFICIAL_EXAMPLES:,}: the published numbers do not "
            "apply to them."
        )
    return "\n".join(rank_sentence(protocol, rank) for protocol, rank in ranks.items())


def rank_sentence(protocol: str, rank: BaselineRank) -> str:
    """'completion: passed gpt2 (0.2955); next GPT-3 124M (0.3370)', by acc_norm."""

    def described(baseline: Baseline) -> str:
        doubt = ", inside the 95 % interval" if baseline.within_interval else ""
        return f"{baseline.model} ({baseline.acc_norm:.4f}{doubt})"

    passed = ", ".join(map(described, rank.passed)) or "none"
    return f"{protocol}: passed {passed}; next {described(rank.next) if rank.next else 'none'}"


def comparison_table(first: str, second: str, compared: Mapping[str, Mapping[str, PairedDifference]]) -> str:
    """Both accuracies, their difference with its 95 % interval, and McNemar's test."""
    lines = [
        f"A: {first}",
        f"B: {second}",
        "B - A with its 95 % interval (Bonett and Price); p by McNemar's test, exact (binomial)",
        f"{'protocol':12}{'':10}{'A':>8}{'B':>8}{'B - A':>10}{'':20}{'only A':>8}{'only B':>8}{'examples':>10}{'p':>9}",
    ]
    for protocol, metrics in compared.items():
        for name, pair in metrics.items():
            a, b = pair.accuracies
            low, high = pair.interval
            difference = f"{pair.difference:+10.4f} [{low:+.4f}, {high:+.4f}]"
            counts = f"{pair.only_first:>8}{pair.only_second:>8}{pair.num_examples:>10}"
            lines.append(f"{protocol:12}{name:10}{a:8.4f}{b:8.4f}{difference}{counts}{pair.p_value:9.2g}")
    return "\n".join(lines)


def comparison_json(compared: Mapping[str, Mapping[str, PairedDifference]]) -> dict[str, dict[str, dict]]:
    """{protocol: {"acc": {"first": ..., "second": ..., "difference": ..., ...}, "acc_norm": {...}}}."""
    return {
        protocol: {name: _paired_difference_json(pair) for name, pair in metrics.items()}
        for protocol, metrics in compared.items()
    }


def _paired_difference_json(pair: PairedDifference) -> dict[str, float | int | str | list[float]]:
    first, second = pair.accuracies
    return {
        "rows": pair.num_examples,
        "first": first,
        "second": second,
        "difference": pair.difference,
        "interval": list(pair.interval),
        "only_first": pair.only_first,
        "only_second": pair.only_second,
        "p_value": pair.p_value,
        "test": "McNemar, exact binomial, two-sided",
    }
