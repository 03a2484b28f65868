"""The order of an epoch by the book: a table on paper, whose columns and rows are rolled one after another."""

import math

import numpy as np

MASK = 2**64 - 1


def splitmix(x: int) -> int:
    """The output function of SplitMix64, in whole numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def shuffled_epoch(size: int, seed: list[int]) -> list[int]:
    """All of an epoch at once: the index at each position."""
    columns = next(n for n in range(1, size + 1) if n * n >= size)
    rows = math.ceil(size / columns)
    table = [[row * columns + column for column in range(columns)] for row in range(rows)]
    keys = iter(np.random.SeedSequence(seed).generate_state(16, np.uint64).tolist())
    for _ in range(8):
        key = next(keys)
        for column in range(columns):
            old = [table[row][column] for row in range(rows)]
            by = splitmix((column + key) & MASK) % rows
            for row in range(rows):
                table[(row + by) % rows][column] = old[row]
        key = next(keys)
        for row in range(rows):
            by = splitmix((row + key) & MASK) % columns
            table[row] = table[row][columns - by :] + table[row][: columns - by]
    cell_of = {number: row * columns + column for row in range(rows) for column, number in enumerate(table[row])}
    epoch = []
    for position in range(size):
        cell = cell_of[position]
        while cell >= size:
            cell = cell_of[cell]
        epoch.append(cell)
    return epoch
