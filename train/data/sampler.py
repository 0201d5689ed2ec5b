"""Which row stands at which position of a run: a pure function, random access, no state.

Position `c` of the whole run lies in epoch `c // rows`; within an epoch a seeded bijection of `0 .. rows-1`, keyed by
(seed, epoch), gives the row. The bijection is a Feistel network on the next even power of two, walked along its cycle
until it lands inside the range. Nothing depends on ranks, so any layout and any resume sees the same order.
"""

import numpy as np

ROUNDS = 6
_MASK = (1 << 64) - 1


def row_ids(first: int, count: int, rows: int, seed: int) -> list[int]:
    """Rows at positions `first .. first+count-1` of a run over `rows` rows; each epoch visits every row once.

    Raises `ValueError` if there are no rows or a position is negative.
    """
    if rows < 1 or first < 0 or count < 0:
        raise ValueError(f"row_ids(first={first}, count={count}, rows={rows}): expected rows >= 1, the others >= 0")
    epochs, positions = np.divmod(np.arange(first, first + count, dtype=np.uint64), np.uint64(rows))
    keys = _mix(epochs ^ _mix(np.full_like(epochs, seed & _MASK)))
    ids = _feistel(positions, keys, rows)
    while (outside := ids >= rows).any():
        ids[outside] = _feistel(ids[outside], keys[outside], rows)
    return [int(i) for i in ids]


def _feistel(values: np.ndarray, keys: np.ndarray, rows: int) -> np.ndarray:
    """One pass of the keyed permutation of `0 .. 4**half - 1`, the smallest such range that holds `rows`."""
    half = np.uint64(max(1, ((rows - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    left, right = values >> half, values & low
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & low)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit moves every output bit (uint64, modulo 2**64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
