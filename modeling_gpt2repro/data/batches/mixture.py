"""Several prepared folders in fixed proportions, row by row; a pure function of (seed, step), as for one folder.

Out of every PERIOD rows each folder gives its share, in an order that the seed decides once. Each folder's rows come in
its own epochs, so each of them is used once before one is used again.
"""

from pathlib import Path

import numpy as np

from modeling_gpt2repro.data.shards.dataset import TokenDataset, open_shards

from .shuffled import BatchConfig, EpochShuffle, ShuffledBatches, TokenSequences

PERIOD = 1000


def parse_mix(text: str) -> dict[str, float]:
    """'a:0.7,b:0.3' -> {'a': 0.7, 'b': 0.3}; shares that do not add up to 1 are scaled.

    Raises:
        ValueError: If a part has no share, or a share that gives no row in PERIOD, or a folder stands there twice.
    """
    shares = {}
    for part in text.split(","):
        folder, _, share = part.strip().rpartition(":")
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
    small = [folder for folder, share in shares.items() if share * PERIOD < 1]
    if small:
        raise ValueError(f"mix ({text}) gives {small[0]} less than one row in {PERIOD}: give it more, or leave it out.")
    return shares


def rows_of_period(shares: list[float]) -> np.ndarray:
    """How many of PERIOD rows each share gets, by largest remainders: [0.5, 0.25, 0.25] -> [500, 250, 250]."""
    exact = np.array(shares) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]] += 1
    return counts


class MixedBatches(ShuffledBatches):
    """The training batches of one process out of several folders, any step at any time."""

    def __init__(self, sources: list[TokenSequences], shares: list[float], shape: BatchConfig, end_of_text: int):
        self.sources, self.shape, self.end_of_text = sources, shape, end_of_text
        self.orders = [EpochShuffle(len(rows), [shape.seed, number]) for number, rows in enumerate(sources)]
        self.counts = rows_of_period(shares)
        draws = np.random.PCG64(np.random.SeedSequence([shape.seed])).random_raw(PERIOD)
        self.pattern = np.repeat(np.arange(len(sources)), self.counts)[np.argsort(draws, kind="stable")]
        self.rank = np.empty(PERIOD, dtype=np.int64)  # of a place among those of its source
        for number, count in enumerate(self.counts):
            self.rank[self.pattern == number] = np.arange(count)

    def read(self, places: np.ndarray) -> np.ndarray:
        """Places in the order of training (n,) -> ids (n, T + 1)."""
        sources, numbers = self._rows(places)
        ids = np.empty((len(places), self.shape.block_size + 1), dtype=np.int64)
        for number, rows in enumerate(self.sources):
            ids[sources == number] = rows.read(numbers[sources == number])
        return ids

    def sample_ids(self, step: int) -> list:
        """Which rows this process takes in a step: [number of the folder, number of the row] each."""
        return np.stack(self._rows(self.places(step)), axis=1).tolist()

    def _rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places (n,) -> folders (n,) and row numbers in them (n,)."""
        periods, within = np.divmod(places, PERIOD)
        sources, numbers = self.pattern[within], np.empty_like(places)
        for number, order in enumerate(self.orders):
            mine = sources == number
            numbers[mine] = order.row_numbers(periods[mine] * self.counts[number] + self.rank[within[mine]])
        return sources, numbers


def open_mix(shares: dict[str, float]) -> list[TokenDataset]:
    """Open the folders of a mix.

    Raises:
        ValueError: With every folder that is none, and those that have another tokenizer than the first.
    """
    opened, problems = [], []
    for folder in shares:
        try:
            opened.append(open_shards(Path(folder)))
        except ValueError as error:
            problems.append(str(error))
    problems += [
        f"{shards.folder} was prepared with another tokenizer than {opened[0].folder}: prepare both with one."
        for shards in opened[1:]
        if shards.manifest["tokenizer"]["sha256"] != opened[0].manifest["tokenizer"]["sha256"]
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return opened


def mixed_validation(mix: list[TokenDataset], shares: list[float], block_size: int, tokens: int) -> TokenSequences:
    """The beginnings of the validation splits, in the proportions of the mix, as one split.

    Raises:
        ValueError: If they are too short for one row.
    """
    parts = []
    for shards, share in zip(mix, shares, strict=True):
        left = int(share * tokens) + block_size + 1
        for ids in shards.shards("validation"):
            parts.append(ids[:left])
            left -= len(parts[-1])
    return TokenSequences([part for part in parts if len(part)], block_size, "validation")
