"""The load of the experts over time: how uneven it is, who starves, and what a rank's memory has room for.

`LoadWatch` sees the loads of every step's whole global batch and says what is to be recorded and told. `RowLimit` looks
at a single dispatch, once its rows are counted and before any memory is allocated for them. Neighbours: the router
counts the loads (`train.model.router`), `train.metrics` writes them down, `launch.load` draws them.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from parallel.errors import UserError
from parallel.experts.dispatch import Limit, Tag, no_limit
from train.model.router import max_violation
from train.recipe import LogConfig, Recipe

Loads = Mapping[int, Tensor]  # tokens that chose each expert, [E], by layer


class LoadWatch:
    """Remembers the loads of this start's steps; `sums` are those of the last `recorded` steps."""

    def __init__(self, log: LogConfig) -> None:
        self.log = log
        self.window: deque[Tensor] = deque(maxlen=log.load_window)  # of [layer, E]
        self.hungry = torch.zeros(0)  # steps in a row that each expert has starved, [layer, E]
        self.sums = torch.zeros(0)
        self.recorded = 0

    def step(self, loads: Loads) -> tuple[dict[str, Any], list[str]]:
        """Take in the loads of a step; returns figures for its record, and what the user should be told now."""
        if not loads:
            return {}, []
        load_LE = torch.stack(list(loads.values())).double()
        if not self.window:
            self.hungry, self.sums = torch.zeros_like(load_LE), torch.zeros_like(load_LE)
        self.window.append(load_LE)
        self.sums, self.recorded = self.sums + load_LE, self.recorded + 1
        now = [max_violation(load_E) for load_E in load_LE]
        together = [max_violation(load_E) for load_E in sum(self.window, torch.zeros_like(load_LE))]
        figures: dict[str, Any] = {"max_violation": max(now), "max_violation_mean": fmean(now)}
        figures["layer_max_violation"] = dict(zip(map(str, loads), now, strict=True))
        figures |= {"max_violation_global": max(together), "max_violation_global_mean": fmean(together)}
        warnings = self._starving(list(loads), load_LE) if self.log.starving_steps else []
        if self.log.starving_steps:
            figures["starving"] = int((self.hungry >= self.log.starving_steps).sum())
        return figures, warnings

    def take(self, loads: Loads) -> dict[str, Any]:
        """For load.jsonl: how many steps since the last such call, and the tokens that each expert got in them."""
        sums = {str(number): load_E.long().tolist() for number, load_E in zip(loads, self.sums, strict=True)}
        record = {"steps": self.recorded, "load": sums}
        self.sums, self.recorded = torch.zeros_like(self.sums), 0
        return record

    def _starving(self, numbers: list[int], load_LE: Tensor) -> list[str]:
        """A line for each layer in which experts have begun to starve with this step."""
        share, steps = self.log.starving_share, self.log.starving_steps
        starved = load_LE < share * load_LE.mean(1, keepdim=True)
        self.hungry = (self.hungry + 1) * starved
        told = []
        for number, hungry_E in zip(numbers, self.hungry, strict=True):
            if found := (hungry_E == steps).nonzero().flatten().tolist():
                who = f"expert{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
                told.append(f"layer {number}: {who} starved, below {share:g} of the mean load for {steps} steps")
        return told


@dataclass(frozen=True)
class RowLimit:
    """What the memory plan allows a rank to receive, or to pass on, in one dispatch: `factor` x `balanced` rows.

    A dispatcher calls it as soon as the rows are counted. Those that pad an expert's are not.
    """

    rank: int
    factor: float
    balanced: int
    arithmetic: str

    @classmethod
    def of(cls, recipe: Recipe, rank: int) -> Limit:
        """The limit of a recipe on a rank, if it sets one: a balanced rank gets as many rows as its own tokens make."""
        factor = recipe.parallel.max_rows_factor
        if factor is None:
            return no_limit
        sizes = {
            "parallel.microbatch_size": recipe.parallel.microbatch_size,
            "train.sequence_length": recipe.train.sequence_length,
            "model.num_experts_per_tok": recipe.model.num_experts_per_tok,
        }
        arithmetic = " x ".join(f"{key}={size}" for key, size in sizes.items())
        return cls(rank, factor, math.prod(sizes.values()), arithmetic)

    def __call__(self, rows: int, doing: str, tag: Tag) -> None:
        """Raise `UserError` if `rows` are too many. doing: "receive" | "pass on"."""
        limit = int(self.factor * self.balanced)
        if rows > limit:
            raise UserError(
                f"parallel.max_rows_factor={self.factor:g}: layer {tag.layer}, micro-batch {tag.microbatch}: rank "
                f"{self.rank} is about to {doing} {rows:,} rows for experts; expected at most {limit:,} = "
                f"{self.factor:g} x {self.balanced:,}, the rows of a balanced rank ({self.arithmetic})"
            )
