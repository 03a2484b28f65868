"""Two models on the same HellaSwag examples: the paired difference, which needs fewer examples than two intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from .examples import PROTOCOLS
from .metrics import Z95
from .samples import SavedScores, read_scores


@dataclass(frozen=True)
class PairedDifference:
    """How many examples both models, only the first and only the second got right.

    Only the examples on which they differ say which model is better.
    """

    num_examples: int
    both: int
    only_first: int
    only_second: int

    @property
    def accuracies(self) -> tuple[float, float]:
        """Of the first and of the second model."""
        return (self.both + self.only_first) / self.num_examples, (self.both + self.only_second) / self.num_examples

    @property
    def difference(self) -> float:
        """The second accuracy minus the first."""
        return (self.only_second - self.only_first) / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference (Bonett and Price 2012).

        Wald's interval after an example was added to each kind, so that equal models have an interval of some width,
        too. 10 only the first, 20 only the second, of 100 -> -0.0090, 0.2051.
        """
        total = self.num_examples + 2
        first = (self.only_first + 1) / total
        second = (self.only_second + 1) / total
        half_width = Z95 * math.sqrt((first + second - (second - first) ** 2) / total)
        return second - first - half_width, second - first + half_width

    @property
    def p_value(self) -> float:
        """McNemar's test, exact for any number of examples.

        A two-sided binomial test of whether as many examples are right only under one model as only under the other.
        1 against 5 -> 2 * (1 + 6) / 2**6 = 0.21875.
        """
        n = self.only_first + self.only_second
        ways = sum(math.comb(n, k) for k in range(min(self.only_first, self.only_second) + 1))
        return min(1.0, 2 * ways / 2**n)


def compare_scores(
    first: str | Path, second: str | Path, protocols: Sequence[str] = PROTOCOLS
) -> dict[str, dict[str, PairedDifference]]:
    """Compare two files of `write_scores`: {protocol: {"acc": ..., "acc_norm": ...}}, of the protocols asked for.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file holds no scores, or they are not of the same examples and protocols in the same order.
    """
    ours = [saved for saved in read_scores(first) if saved.scores.protocol in protocols]
    theirs = [saved for saved in read_scores(second) if saved.scores.protocol in protocols]
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
    """Count the examples by (first is right, second is right)."""
    return PairedDifference(
        num_examples=len(pairs),
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
    )


def check_same_questions(
    first: str | Path, second: str | Path, ours: Sequence[SavedScores], theirs: Sequence[SavedScores]
):
    """Raise a ValueError that names the first difference between the questions of two files."""
    our_protocols = sorted({saved.scores.protocol for saved in ours})
    their_protocols = sorted({saved.scores.protocol for saved in theirs})
    if our_protocols != their_protocols or not our_protocols:
        raise ValueError(
            f"of the protocols asked for, {first} holds {' and '.join(our_protocols) or 'none'}, {second} "
            f"{' and '.join(their_protocols) or 'none'}: numbers compare within a protocol only, so name one with "
            "--protocol that both hold."
        )
    for a, b in zip_longest(ours, theirs):
        if a is None or b is None:
            our_count = len({saved.scores.index for saved in ours})
            their_count = len({saved.scores.index for saved in theirs})
            raise ValueError(
                f"{first} has {our_count:,} examples, {second} {their_count:,}: a paired difference needs the same "
                "examples, so score both models with the same --data and --limit."
            )
        if (a.scores.index, a.question, a.scores.protocol) != (b.scores.index, b.question, b.scores.protocol):
            raise ValueError(
                f"example {a.scores.index} of {first} is another question (fingerprint {a.question}) than example "
                f"{b.scores.index} of {second} ({b.question}): score both models with the same --data."
            )
