"""What a plan may choose without changing what is learnt, under the names of the recipe's keys.

Widths of pipeline, data and experts, the schedule, the micro-batch, what is recomputed and how tokens are dispatched;
the precision only if asked. Everything is listed, legal or not: the recipe's own rules say which is.
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from math import gcd
from typing import Any

from kernels.recompute import CHOICES
from launch.simulate.cluster.sheet import Sheet
from parallel.experts.build import choose
from parallel.schedule import SCHEDULES
from train.recipe import PRECISIONS, Recipe

SEQUENCES = (1, 2, 4, 8)  # of a micro-batch


@dataclass(frozen=True)
class Layout:
    """What a plan chooses, under the names of the recipe's keys."""

    pipeline: int
    data: int
    expert: int
    schedule: str
    chunks: int
    microbatch_size: int
    dispatch: str
    recompute: tuple[str, ...]
    precision: str

    @classmethod
    def of(cls, recipe: Recipe) -> "Layout":
        """The recipe's own."""
        p = recipe.parallel
        own = p.pipeline, p.data, p.expert, p.schedule, p.chunks, p.microbatch_size, p.dispatch
        return cls(*own, _sorted(recipe.train.recompute), recipe.precision)

    def applied(self, recipe: Recipe) -> Recipe:
        """A copy of `recipe` in this layout; a given split of layers stays only with the stages that it was for."""
        mine, own = deepcopy(recipe), Layout.of(recipe)
        chosen = asdict(self)
        mine.precision, mine.train.recompute = chosen.pop("precision"), list(chosen.pop("recompute"))
        for key, value in chosen.items():
            setattr(mine.parallel, key, value)
        if (self.pipeline, self.schedule, self.chunks) != (own.pipeline, own.schedule, own.chunks):
            mine.parallel.layers_per_stage = None
        if (self.data, self.microbatch_size) != (own.data, own.microbatch_size):
            mine.parallel.microbatches = None
        return mine

    @property
    def gpus(self) -> int:
        """Ranks of it."""
        return self.pipeline * self.data

    def __str__(self) -> str:
        chunks = f" of {self.chunks} chunks" if SCHEDULES[self.schedule].chunked else ""
        dispatch = "" if self.dispatch == "auto" else f", {self.dispatch}"
        again = "+".join(self.recompute) or "nothing"
        return (
            f"PP {self.pipeline} x DP {self.data}, EP {self.expert}{dispatch}, {self.schedule}{chunks}, "
            f"micro-batch {self.microbatch_size}, recompute {again}, {self.precision}"
        )


def world_size(recipe: Recipe, sheet: Sheet, most: int | None = None) -> int:
    """The most GPUs of the cluster, whole nodes or a part of one, over which pipelines can share out the batch.

    most: not more than so many.
    """
    room = min(most or sheet.gpus, sheet.gpus)
    quantum, stages = recipe.train.batch.multiple_of, recipe.model.num_hidden_layers
    shares = [data for data in range(1, quantum + 1) if quantum % data == 0]
    sizes = {pipeline * data for pipeline in range(1, stages + 1) for data in shares}
    return max(s for s in sizes if s <= room and (s % sheet.node_size == 0 or sheet.node_size % s == 0))


def layouts(recipe: Recipe, gpus: int, precisions: Iterable[str]) -> Iterator[Layout]:
    """Every layout of `gpus` ranks with the recipe's own recomputation and dispatch, legal or not."""
    own, layers = Layout.of(recipe), recipe.model.num_hidden_layers
    for pipeline in _divisors(gpus):
        if pipeline > layers:
            continue
        data = gpus // pipeline
        for name, kind in SCHEDULES.items():
            for chunks in range(2, max(2, min(4, layers // pipeline)) + 1) if kind.chunked else [own.chunks]:
                for expert in _divisors(gcd(data, recipe.model.n_routed_experts)):
                    for size in SEQUENCES:
                        for precision in precisions:
                            yield replace(
                                own,
                                pipeline=pipeline,
                                data=data,
                                expert=expert,
                                schedule=name,
                                chunks=chunks,
                                microbatch_size=size,
                                precision=precision,
                            )


def choices(recipe: Recipe, sheet: Sheet, any_precision: bool) -> list[str]:
    """The precisions to choose from: the recipe's own, or all for whose products the sheet has a curve."""
    return sorted({recipe.precision, *sheet.products} & {*PRECISIONS}) if any_precision else [recipe.precision]


def variants(layout: Layout, node_size: int, fits: bool) -> list[Layout]:
    """The layout with other recomputation and dispatch: with less of it if it `fits`, else with more."""
    partial = [c for c in CHOICES if c != "layer"]
    sets = [set(chosen) for count in range(len(partial) + 1) for chosen in combinations(partial, count)]
    sets.append({"layer"})
    mine = set(layout.recompute)

    def more(those: set[str], these: set[str]) -> bool:
        return "layer" in those or ("layer" not in these and those >= these)

    recomputes = [_sorted(each) for each in sets if (more(mine, each) if fits else more(each, mine))]
    dispatches = [layout.dispatch]
    if choose("auto", layout.expert, node_size) == "hierarchical":
        dispatches = list(dict.fromkeys([layout.dispatch, "auto", "all_to_all"]))
    found = [replace(layout, recompute=r, dispatch=d) for d in dispatches for r in recomputes]
    return [each for each in found if each != layout]


def distance(layout: Layout, own: Layout) -> tuple[Any, ...]:
    """How far from the recipe's own layout: near ones first, so that a bound is known early, and stages are shared."""
    return (
        layout.precision != own.precision,
        layout.microbatch_size,
        abs(layout.expert.bit_length() - own.expert.bit_length()),
        layout.expert,
        abs(layout.pipeline.bit_length() - own.pipeline.bit_length()),
        layout.pipeline,
        list(SCHEDULES).index(layout.schedule),
        layout.chunks,
    )


def _sorted(chosen: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(chosen), key=CHOICES.index))


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
