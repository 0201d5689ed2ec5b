"""Spikes: a loss or gradient norm that jumps far above the last steps', and what the recipe wants done about it.

    none       nothing
    skip       the step is left out: its rows are consumed, nothing moves
    rollback   if `patience` steps in a row are spikes, back to the newest checkpoint before the first of them; the rows
               from there up to now are never seen again (as PaLM's authors did by hand, arXiv 2204.02311 section 5.1)

The judgement is a pure function of losses and norms that all ranks share, and everything it remembers is in the
checkpoint's JSON, so that a run which is killed and resumed decides as one that was not. Time stays counted in tokens
consumed; a window that is skipped only moves the rows on.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from parallel.errors import UserError

POLICIES = ("none", "skip", "rollback")


@dataclass
class SpikeConfig:
    """A spike lies more than `factor` standard deviations above the mean of the last `window` steps without one."""

    policy: str = "none"
    factor: float = 6.0
    window: int = 128
    patience: int = 5  # spikes in a row: skip takes the next step all the same, rollback rolls back
    max_rollbacks: int = 3

    def check(self) -> None:
        """Raise `UserError` naming the first value that cannot work."""
        if self.policy not in POLICIES:
            raise UserError(f"train.spike.policy={self.policy}: expected one of {', '.join(POLICIES)}")
        if self.factor <= 0:
            raise UserError(f"train.spike.factor={self.factor}: expected more than 0")
        for name, minimum in (("window", 2), ("patience", 1), ("max_rollbacks", 0)):
            if getattr(self, name) < minimum:
                raise UserError(f"train.spike.{name}={getattr(self, name)}: expected at least {minimum}")


class Spikes:
    """Judges one step after another, and knows which windows of data are left out."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.history: list[list[float]] = []  # [loss, gradient norm] of the last steps that were no spikes
        self.in_a_row = 0
        self.windows: list[list[int]] = []  # [from, to) in tokens of data, in the order in which they were left out

    # -- judging
    def is_spike(self, loss: float, norm: float) -> bool:
        """Whether a step stands out of the steps before it; nothing does before the window is full."""
        if len(self.history) < self.config.window:
            return False
        return any(
            value > self._limit(values)
            for value, values in zip((loss, norm), zip(*self.history, strict=True), strict=True)
        )

    def _limit(self, values: tuple[float, ...]) -> float:
        return fmean(values) + self.config.factor * pstdev(values)

    def applies(self, loss: float, norm: float) -> bool:
        """Whether the policy lets a step move the parameters."""
        skips = self.config.policy == "skip" and self.in_a_row < self.config.patience
        return not (skips and self.is_spike(loss, norm))

    def take(self, loss: float, norm: float) -> bool:
        """Remember a step; returns whether it was a spike. One whose gradient was not finite says nothing."""
        if self.config.policy == "none" or not math.isfinite(norm) or not math.isfinite(loss):
            return False
        if self.is_spike(loss, norm):
            if self.config.policy == "skip" and self.in_a_row == self.config.patience:
                self.history, self.in_a_row = [], 0  # not a spike but the new level
                return False
            self.in_a_row += 1
            return True
        self.in_a_row = 0
        self.history = [*self.history, [loss, norm]][-self.config.window :]
        return False

    @property
    def persists(self) -> bool:
        """Whether it is time to roll back."""
        return self.config.policy == "rollback" and self.in_a_row >= self.config.patience

    # -- data
    def position(self, tokens: int) -> int:
        """Where in the data the run stands that has consumed so many tokens."""
        return tokens + sum(end - begin for begin, end in self.windows)

    def leave_out(self, begin: int, end: int) -> None:
        """Never use the data of [begin, end) tokens: after going back to its begin."""
        self.windows = [*self.windows, [begin, end]]

    # -- checkpoints
    def state(self) -> dict[str, Any]:
        """For the checkpoint's JSON."""
        return {"history": self.history, "in_a_row": self.in_a_row, "windows": self.windows}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.history, self.in_a_row, self.windows = state["history"], state["in_a_row"], state["windows"]
