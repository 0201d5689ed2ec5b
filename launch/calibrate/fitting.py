"""Curves through measured times: least squares of the relative error, with no coefficient below zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

import numpy as np

from kernels.ops import Cost
from launch.simulate.cluster.sheet import Line, Link

Curve = TypeVar("Curve", Line, Link)


@dataclass(frozen=True)
class Fit(Generic[Curve]):
    """A curve, how many rows it was fitted to, and its relative errors there."""

    curve: Curve
    rows: int
    worst: float
    median: float


def positive(columns: np.ndarray, times: np.ndarray) -> np.ndarray:
    """x >= 0 such that `columns` @ x is near `times` in relation to these: the most negative leave one by one."""
    active = [number for number in range(columns.shape[1]) if columns[:, number].any()]
    scaled = columns / times[:, None]
    found = np.zeros(columns.shape[1])
    while active:
        norms = np.linalg.norm(scaled[:, active], axis=0)
        solution = np.linalg.lstsq(scaled[:, active] / norms, np.ones(len(times)), rcond=None)[0]
        if (solution >= 0).all():
            found[active] = solution / norms
            break
        active.pop(int(solution.argmin()))
    return found


def line(rows: Sequence[tuple[Cost, float]]) -> Fit[Line]:
    """Of one operator: what it costs, and the seconds that this took."""
    columns = np.array([Line.features(cost) for cost, _ in rows], dtype=float)
    times = np.array([seconds for _, seconds in rows])
    found = positive(columns, times)
    return Fit(Line(*map(float, found)), len(rows), *_errors(columns @ found, times))


def link(rows: Sequence[tuple[int, float]]) -> Fit[Link]:
    """Of a communication: bytes, and the seconds that they took."""
    columns = np.array([[1, size] for size, _ in rows], dtype=float)
    times = np.array([seconds for _, seconds in rows])
    found = positive(columns, times)
    rate = 1 / float(found[1]) if found[1] else 1e15
    return Fit(Link(rate, float(found[0])), len(rows), *_errors(columns @ found, times))


def python(gaps: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Seconds of Python for an operator, and how many more for a product in FP8: from passes (`operators.Measured`)."""
    seen = [gap for gap in gaps if gap[2]]
    if not seen:
        return 0.0, 0.0
    columns = np.array([gap[:2] for gap in seen], dtype=float)
    each, more = positive(columns, np.array([seconds for *_, seconds in seen]))
    return float(each), float(more)


def _errors(fitted: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    errors = np.abs(fitted / times - 1)
    return float(errors.max()), float(median(errors))
