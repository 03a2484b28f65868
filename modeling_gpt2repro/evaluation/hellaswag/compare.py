"""Two models on the same rows of HellaSwag: their difference, row by row, which is surer than two intervals apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from .examples import PROTOCOLS
from .metrics import Z95
from .samples import SavedScores, read_results


@dataclass(frozen=True)
class PairedDifference:
    """A second model against a first one, by which of them had each row right. Only rows where they differ tell."""

    rows: int
    both: int
    only_first: int
    only_second: int

    @property
    def accuracies(self) -> tuple[float, float]:
        """Share of the rows that the first and the second had right."""
        return (self.both + self.only_first) / self.rows, (self.both + self.only_second) / self.rows

    @property
    def difference(self) -> float:
        """The second accuracy minus the first."""
        return (self.only_second - self.only_first) / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: Wald's with a row added to each kind (Bonett and Price 2012), so that it has
        a width for equal models, too. 10 only the first, 20 only the second, of 100 rows -> -0.0090, 0.2051."""
        rows = self.rows + 2
        first, second = (self.only_first + 1) / rows, (self.only_second + 1) / rows
        half = Z95 * math.sqrt((first + second - (second - first) ** 2) / rows)
        return second - first - half, second - first + half

    @property
    def p_value(self) -> float:
        """McNemar's test, exact for any number of rows: two-sided binomial test that as many rows are right only under
        the one as only under the other. 1 against 5 -> 2 * (1 + 6) / 2**6 = 0.21875."""
        n, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        ways = total = 1  # of none of n
        for k in range(1, fewer + 1):
            ways = ways * (n - k + 1) // k
            total += ways
        return min(1.0, 2 * total / 2**n)


def compare_results(
    first: str | Path, second: str | Path, protocols: Sequence[str] = PROTOCOLS
) -> dict[str, dict[str, PairedDifference]]:
    """{protocol: {"acc": ..., "acc_norm": ...}} of two files of `write_results`, of the protocols asked for.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file holds no results, or they are not of the same rows and protocols in the same order.
    """
    ours, theirs = ([s for s in read_results(path) if s.scores.protocol in protocols] for path in (first, second))
    check_same_questions(first, second, ours, theirs)
    compared = {}
    for protocol in dict.fromkeys(saved.scores.protocol for saved in ours):
        pairs = [(a.scores, b.scores) for a, b in zip(ours, theirs, strict=True) if a.scores.protocol == protocol]
        compared[protocol] = {
            "acc": paired_difference([(a.correct, b.correct) for a, b in pairs]),
            "acc_norm": paired_difference([(a.correct_norm, b.correct_norm) for a, b in pairs]),
        }
    return compared


def paired_difference(pairs: Sequence[tuple[bool, bool]]) -> PairedDifference:
    """Count, for each row, whether the first and whether the second had it right."""
    kinds = ((True, True), (True, False), (False, True))
    return PairedDifference(len(pairs), *(sum(pair == kind for pair in pairs) for kind in kinds))


def check_same_questions(
    first: str | Path, second: str | Path, ours: Sequence[SavedScores], theirs: Sequence[SavedScores]
):
    """Refuse what cannot be compared, with what differs."""
    protocols = [sorted({saved.scores.protocol for saved in results}) for results in (ours, theirs)]
    if protocols[0] != protocols[1] or not protocols[0]:
        held = [" and ".join(names) or "none" for names in protocols]
        raise ValueError(
            f"of the protocols asked for, {first} holds {held[0]}, {second} {held[1]}: numbers compare within a "
            "protocol only, so name one with --protocol that both hold."
        )
    for a, b in zip_longest(ours, theirs):
        if a is None or b is None:
            counts = [len({saved.scores.row for saved in results}) for results in (ours, theirs)]
            raise ValueError(
                f"{first} has {counts[0]:,} rows, {second} {counts[1]:,}: a paired difference needs the same rows, so "
                "score both models with the same --data and --limit."
            )
        if (a.scores.row, a.question, a.scores.protocol) != (b.scores.row, b.question, b.scores.protocol):
            raise ValueError(
                f"row {a.scores.row} of {first} is another question (fingerprint {a.question}) than row {b.scores.row} "
                f"of {second} ({b.question}): score both models with the same --data."
            )
