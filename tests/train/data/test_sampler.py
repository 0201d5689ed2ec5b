"""The order of rows: a bijection of each epoch, random access, and nothing to do with ranks."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.sampler import row_ids

seeds = st.integers(-(2**63), 2**64)


@given(rows=st.integers(1, 700), epoch=st.integers(0, 10**6), seed=seeds)
def test_each_epoch_visits_every_row_exactly_once(rows, epoch, seed):
    assert sorted(row_ids(epoch * rows, rows, rows, seed)) == list(range(rows))


@given(
    first=st.integers(0, 10**15),
    counts=st.lists(st.integers(0, 40), max_size=6),
    rows=st.integers(1, 10**12),
    seed=seeds,
)
def test_any_cutting_of_a_run_draws_the_same_rows(first, counts, rows, seed):
    whole = row_ids(first, sum(counts), rows, seed)
    pieces = [row_ids(first + sum(counts[:i]), count, rows, seed) for i, count in enumerate(counts)]
    assert whole == [i for piece in pieces for i in piece]
    assert all(0 <= i < rows for i in whole)


@pytest.mark.parametrize("worlds", [(1,), (2,), (4,), (8,), (8, 2, 4)])
def test_order_is_independent_of_world_size_even_if_it_changes_on_the_way(worlds):
    batch, steps, rows, seed = 8, 12, 37, 3
    drawn = []
    for step in range(steps):
        world = worlds[step * len(worlds) // steps]
        share = batch // world
        for rank in range(world):
            drawn += row_ids(step * batch + rank * share, share, rows, seed)
    assert drawn == row_ids(0, batch * steps, rows, seed)


def test_epochs_and_seeds_give_different_orders():
    orders = [tuple(row_ids(epoch * 100, 100, 100, seed)) for epoch in range(20) for seed in range(20)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("rows", [3, 13])
def test_every_row_is_equally_likely_at_every_position(rows):
    trials = 3000
    seen = Counter((p, i) for seed in range(trials) for p, i in enumerate(row_ids(0, rows, rows, seed)))
    spread = (trials / rows * (1 - 1 / rows)) ** 0.5
    assert len(seen) == rows * rows
    assert max(abs(count - trials / rows) for count in seen.values()) < 5 * spread


def test_consecutive_positions_are_not_correlated():
    rows = 10_000
    ids = row_ids(0, rows, rows, seed=1)
    mean = (rows - 1) / 2
    variance = (rows**2 - 1) / 12
    correlation = sum((a - mean) * (b - mean) for a, b in pairwise(ids)) / rows / variance
    assert abs(correlation) < 5 / rows**0.5


def test_the_order_never_changes_between_versions():
    assert row_ids(0, 8, 1000, 0) == [660, 352, 373, 831, 970, 297, 987, 621]
    assert row_ids(998, 4, 1000, 7) == [494, 369, 842, 908]
    assert row_ids(10**15, 3, 35529, 123) == [7072, 6674, 23346]


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (-1, 1, 5, 0), (0, -1, 5, 0)])
def test_impossible_requests_are_refused(arguments):
    with pytest.raises(ValueError, match="expected rows >= 1"):
        row_ids(*arguments)
