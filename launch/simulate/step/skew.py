"""Ranks of an expert group that are not alike: routers that load some more than others, and machines that jitter.

`skew` says how much more rows than the mean the fullest rank of a group receives, averaged over layers and
micro-batches: 0.3 is 30 % more, in other words a maximum over mean of 1.3. Loads are drawn for each stage, micro-batch
and layer, log-normally around balance, and a micro-batch's backward meets those of its forward. `jitter` is the
standard deviation of a factor that each instruction of each rank takes. At an exchange all wait for the slowest peer.

What more rows cost is not written down here either: stages are looked at with `HEAVY` times the rows (`world`), and
the difference is what a piece takes for each row more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.stages import world
from launch.simulate.stages.work import Exchange, Piece, StageWork
from parallel.errors import UserError
from parallel.experts.build import choose
from parallel.mesh import Mesh
from parallel.schedule import Program
from parallel.schedule.program import Instruction, passes
from train.recipe import Recipe

HEAVY = 1.5
DRAWS = 1 << 11  # of a group, to find how wide loads must be drawn


@dataclass(frozen=True)
class Noise:
    """How far ranks are from alike, and the seed of what is drawn."""

    skew: float = 0.0
    jitter: float = 0.0
    seed: int = 0

    @classmethod
    def read(cls, skew: str, jitter: str, seed: str) -> "Noise":
        """From the words of a command line. Raises `UserError`."""
        found = {}
        for name, word in (("skew", skew), ("jitter", jitter)):
            try:
                found[name] = float(word)
            except ValueError:
                found[name] = -1.0
            if not 0 <= found[name] < float("inf"):
                meant = {"skew": "0.3 for a fullest rank 30 % above the mean", "jitter": "0.02 for 2 %"}[name]
                raise UserError(f"{name}={word}: expected a number of at least 0, such as {meant}")
        if not seed.isdecimal():
            raise UserError(f"seed={seed}: expected a whole number of at least 0")
        return cls(**found, seed=int(seed))

    def check(self, group: int) -> None:
        """Raise `UserError` if no group of so many ranks can be loaded like this."""
        if self.skew and self.skew >= group - 1:
            raise UserError(
                f"skew={self.skew:g}: the fullest of parallel.expert={group} ranks cannot receive {1 + self.skew:g} "
                f"times the mean; expected less than {group - 1}"
            )


QUIET = Noise()


@cache
def width(skew: float, group: int) -> float:
    """Standard deviation of the logarithms of loads whose maximum over mean is 1 + `skew` in a group, on average."""
    draws = np.random.default_rng(0).standard_normal((DRAWS, group))
    low, high = 0.0, 16.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        loads = np.exp(middle * (draws - draws.max(axis=1, keepdims=True)))
        low, high = (middle, high) if (1 / loads.mean(axis=1)).mean() < 1 + skew else (low, middle)
    return low


@dataclass
class Skew:
    """Draws how the ranks of expert groups differ. heavy: the stages with `HEAVY` times the rows, if skewed.

    group: ranks of an expert group. node: of them on one node. relayed: whether rows reach a node once and are passed
    on inside it, so that its card carries what all its ranks receive, evenly.
    """

    noise: Noise
    sheet: Sheet
    group: int
    node: int
    relayed: bool
    stages: Mapping[int, StageWork]
    heavy: Mapping[int, StageWork]
    _seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    _heavier: dict[int, Piece] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, work in self.heavy.items():
            for kind, one in work.passes.items():
                pairs = zip(self.stages[number].passes[kind].pieces, one.pieces, strict=True)
                self._heavier |= {id(light): heavy for light, heavy in pairs}

    def peers(self, rank: int, instruction: Instruction) -> "Peers":
        """Those of pipeline rank `rank` in an instruction."""
        todo = passes(instruction)[::-1]
        loads = [self.loads(stage, microbatch) for _, stage, microbatch in todo]
        return Peers(self, self.factors(rank, instruction), loads)

    def loads(self, stage: int, microbatch: int) -> dict[int, np.ndarray]:
        """By layer what each rank of the group receives, with a mean of 1."""
        found = dict[int, np.ndarray]()
        if not self.noise.skew:
            return found
        layers = {piece.layer for one in self.stages[stage].passes.values() for piece in one.pieces}
        draws = np.random.default_rng([self.noise.seed, 0, stage, microbatch])
        for layer in sorted(layers - {-1}):
            drawn = np.exp(width(self.noise.skew, self.group) * draws.standard_normal(self.group))
            found[layer] = drawn / drawn.mean()
        return found

    def factors(self, rank: int, instruction: Instruction) -> np.ndarray:
        """By which each rank of the group is slower in an instruction, with a mean of 1."""
        if not self.noise.jitter:
            return np.ones(self.group)
        kind, *where = instruction
        key = [self.noise.seed, 1, rank, *map(ord, kind), *where]
        spread = self.noise.jitter * np.random.default_rng(key).standard_normal(self.group)
        return np.exp(spread - self.noise.jitter**2 / 2)

    def seconds(self, piece: Piece, sms: int) -> float:
        """How long a piece takes, as `race.Alike`."""
        key = id(piece), sms
        if key not in self._seconds:
            self._seconds[key] = sum(self.sheet.seconds(one.cost, one.name, sms) for one in piece.operators)
        return self._seconds[key]

    def slope(self, piece: Piece, sms: int) -> float:
        """Seconds that it takes more with twice the rows of its experts."""
        heavy = self._heavier.get(id(piece))
        return (self.seconds(heavy, sms) - self.seconds(piece, sms)) / (HEAVY - 1) if heavy else 0.0


def unlike(
    noise: Noise, recipe: Recipe, sheet: Sheet, mesh: Mesh, program: Program, stages: Mapping[int, StageWork]
) -> Skew:
    """The expert groups of a recipe. Raises `UserError` for a skew that they cannot have."""
    noise.check(mesh.expert)
    heavy = world.study_stages(recipe, program.placement, load=HEAVY) if noise.skew else {}
    relayed = choose(recipe.parallel.dispatch, mesh.expert, mesh.node_size) in ("hierarchical", "deepep")
    return Skew(noise, sheet, mesh.expert, len(mesh.in_node()), relayed, stages, heavy)


@dataclass
class Peers:
    """The ranks of an expert group in one instruction (`race.Peers`). loads: of each pass by layer."""

    skew: Skew
    factors: np.ndarray
    loads: list[dict[int, np.ndarray]]

    @property
    def count(self) -> int:
        """Ranks."""
        return self.skew.group

    def seconds(self, number: int, piece: Piece, sms: int) -> Any:
        """Longer by its own factor, and by the rows that it has more of."""
        took = self.skew.seconds(piece, sms)
        load = self.loads[number].get(piece.layer)
        return self.factors * (took if load is None else took + self.skew.slope(piece, sms) * (load - 1))

    def bytes(self, number: int, layer: int, exchange: Exchange) -> tuple[float, float]:
        """An exchange lasts until the fullest rank has all, and the card of the fullest node."""
        load = self.loads[number].get(layer)
        if load is None:
            return exchange.inside, exchange.across
        node = load.reshape(-1, self.skew.node).mean(axis=1) if self.skew.relayed else load
        return exchange.inside * float(load.max()), exchange.across * float(node.max())
