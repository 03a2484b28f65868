"""Several prepared folders in fixed proportions; the order is a pure function of (seed, step), as for one folder.

Out of every PERIOD samples each folder gives its share, in a pattern that the seed decides once. So a proportion does
not only hold on average, as if each sample were drawn at random: it is exact over every 1,000 samples, two steps of the
124M run. Each folder's sequences come in epochs of its own, so a small folder with a large share is repeated more often
than a large one.

    shares 0.5, 0.25, 0.25 and PERIOD = 8, to make it small

    sample                        0  1  2  3  4  5  6  7 |  8  9 ...
    pattern: from which folder    0  2  0  1  0  0  1  2 |  0  2
    how many of it came before    0  0  1  0  2  3  1  1 |  4  2
"""

from pathlib import Path

import numpy as np

from modeling_gpt2repro.data.shards.dataset import TokenDataset, open_shards
from modeling_gpt2repro.runtime.command_line import InputErrors

from .sequences import TokenSequences, first_tokens
from .shuffled import SHUFFLES, BatchConfig, ShuffledBatches, seeded_permutation

PERIOD = 1000  # shares are exact to a thousandth


def parse_mix(text: str) -> dict[str, float]:
    """'a:0.7,b:0.3' -> {'a': 0.7, 'b': 0.3}; shares that do not add up to 1 are scaled.

    Raises:
        ValueError: If a part has no share, or one that gives no sequence in PERIOD, or a folder is there twice.
    """
    shares = {}
    for part in text.split(","):
        folder, _, share = part.strip().rpartition(":")  # the last one: a Windows path has a colon of its own
        if Path(folder) in map(Path, shares):
            raise ValueError(f"mix ({text}) names {folder} twice: give it once, with the sum of its shares.")
        try:
            shares[folder] = float(share)
        except ValueError:
            raise ValueError(f"mix ({text}) must be FOLDER:SHARE,FOLDER:SHARE,...; {part!r} has no share.") from None
        if not folder or not 0 < shares[folder] < float("inf"):
            raise ValueError(f"mix ({text}) must give folders and shares greater than 0, not {part!r}.")
    total = sum(shares.values())
    shares = {folder: share / total for folder, share in shares.items()}
    too_small = [folder for folder, share in shares.items() if share * PERIOD < 1]
    if too_small:
        raise ValueError(
            f"mix ({text}) gives {too_small[0]} less than one sequence in {PERIOD}: give it more, or leave it out."
        )
    return shares


def sequences_per_period(shares: list[float]) -> np.ndarray:
    """How many of PERIOD sequences each share gets, by largest remainders: [0.5, 0.25, 0.25] -> [500, 250, 250]."""
    exact = np.array(shares) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")
    counts[largest_remainders[: PERIOD - counts.sum()]] += 1
    return counts


class MixedBatches(ShuffledBatches):
    """The training batches of one process out of several folders, each of which gives its share of the samples."""

    def __init__(self, sources: list[TokenSequences], shares: list[float], config: BatchConfig, end_of_text: int):
        self.sources = sources
        self.config = config
        self.end_of_text = end_of_text
        # The folder's number in the seed, or two folders of one size would be shuffled alike.
        shuffle = SHUFFLES[config.order]
        self.shuffles = [shuffle(len(sequences), [config.seed, n]) for n, sequences in enumerate(sources)]
        self.counts = sequences_per_period(shares)
        in_blocks = np.repeat(np.arange(len(sources)), self.counts)  # (PERIOD,): 0, 0, ..., 1, 1, ...
        self.pattern = in_blocks[seeded_permutation(PERIOD, [config.seed])]  # (PERIOD,) source of each sample
        self.index_in_source = np.empty(PERIOD, dtype=np.int64)  # (PERIOD,) how many of its source came before
        for source, count in enumerate(self.counts):
            self.index_in_source[self.pattern == source] = np.arange(count)

    @property
    def sequences_per_epoch(self) -> int | None:
        """None: each folder has epochs of its own."""
        return None

    def read(self, sample_indices: np.ndarray) -> np.ndarray:
        """Sample indices (n,) -> ids (n, T + 1) int64."""
        sources, indices = self._source_and_sequence_indices(sample_indices)
        ids = np.empty((len(sample_indices), self.config.block_size + 1), dtype=np.int64)
        for source, sequences in enumerate(self.sources):
            of_source = sources == source
            ids[of_source] = sequences.read(indices[of_source])
        return ids

    def sample_ids(self, step: int) -> list:
        """What this process takes in a step, so that it can be found again: [folder, sequence index] each."""
        return np.stack(self._source_and_sequence_indices(self.sample_indices(step)), axis=1).tolist()

    def _source_and_sequence_indices(self, sample_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices (n,) -> sources (n,) and sequence indices in them (n,)."""
        periods, within_period = np.divmod(sample_indices, PERIOD)  # (n,) each
        sources = self.pattern[within_period]  # (n,)
        indices = np.empty_like(sample_indices)
        for source, shuffle in enumerate(self.shuffles):
            of_source = sources == source
            # The sample index that it would have if its source were the only one.
            alone = periods[of_source] * self.counts[source] + self.index_in_source[within_period[of_source]]
            indices[of_source] = shuffle.indices(alone)
        return sources, indices


def load_mixture(shares: dict[str, float]) -> list[TokenDataset]:
    """Open the folders of a mix.

    Raises:
        ValueError: With every folder that cannot be opened, and those with another tokenizer than the first.
    """
    errors = InputErrors()
    datasets = [errors.capture(open_shards, folder) for folder in shares]
    datasets = [dataset for dataset in datasets if dataset is not None]
    errors.messages += [
        f"{dataset.folder} was prepared with another tokenizer than {datasets[0].folder}: prepare both with one."
        for dataset in datasets[1:]
        if dataset.manifest["tokenizer"]["sha256"] != datasets[0].manifest["tokenizer"]["sha256"]
    ]
    errors.raise_if_any()
    return datasets


def mixed_validation(datasets: list[TokenDataset], shares: list[float], block_size: int, tokens: int) -> TokenSequences:
    """The beginnings of the validation splits, in the proportions of the mix, as one split, in memory.

    Raises:
        ValueError: If they are too short for one sequence.
    """
    parts = []
    for dataset, share in zip(datasets, shares, strict=True):
        # One sequence more than its share, because one that begins in this folder may end in the next.
        parts += first_tokens(dataset.shard_files("validation"), int(share * tokens) + block_size + 1)
    return TokenSequences(parts, block_size, "validation")
