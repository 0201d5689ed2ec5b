"""Stages of many layers from studies of short ones: a layer more adds the same as the layer before it did.

A planner asks for the same layers in many splits. `Studies` looks at each kind of stage with one MoE layer at most
(first and last stage, dense layers), and at inner stages of one and of two; what the second layer adds to the passes,
to memory and to parameters is added again for every further one (`stretch`).
"""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace

from launch.simulate.stages import world
from launch.simulate.stages.storage import Bytes, difference
from launch.simulate.stages.work import Event, Operator, PassWork, Piece, StageWork
from train.model.stage import split_layers
from train.recipe import Recipe

Kind = tuple[bool, bool, int, int]  # first stage, last stage, dense layers, MoE layers


@dataclass
class Studies:
    """Stages of one model under one precision, expert width, dispatch, micro-batch and choice of recomputation."""

    seen: dict[tuple[object, ...], StageWork] = field(default_factory=dict)
    ends: dict[tuple[object, ...], int] = field(default_factory=dict)  # number of the last layer, when it was seen

    def of(self, recipe: Recipe, placement: tuple[tuple[int, ...], ...]) -> dict[int, StageWork]:
        """As `world.study_stages`."""
        model, count = recipe.model, 1 + max(stage for held in placement for stage in held)
        layers = split_layers(model, count, recipe.parallel.layers_per_stage)
        kinds: list[Kind] = []
        for number, held in enumerate(layers):
            experts = sum(map(model.is_moe, held))
            kinds.append((number == 0, number == count - 1, len(held) - experts, experts))
        if count == 1 or not any(self._long(kind) for kind in kinds):
            return self._study(recipe, placement, layers)
        self._look(recipe, kinds)
        made = {kind: self._stage(kind) for kind in set(kinds)}
        return {number: made[kind] for number, kind in enumerate(kinds)}

    def _study(
        self, recipe: Recipe, placement: tuple[tuple[int, ...], ...], layers: list[range]
    ) -> dict[int, StageWork]:
        """`world.study_stages`; remembers where the stages ended that it had not seen."""
        before, found = set(self.seen), world.study_stages(recipe, placement, self.seen)
        for number, held in enumerate(layers):
            key = number == 0, number == len(layers) - 1, *map(recipe.model.is_moe, held)
            if key not in before:
                self.ends.setdefault(key, held[-1])
        return found

    def _long(self, kind: Kind) -> bool:
        return kind[3] > (1 if kind[0] or kind[1] else 2)

    def _look(self, recipe: Recipe, kinds: list[Kind]) -> None:
        """Study what is lacking, on a model of those stages alone."""
        ends = [(first, last, dense, min(experts, 1)) for first, last, dense, experts in kinds if first or last]
        mixed = [kind for kind in kinds if kind[2] and not (kind[0] or kind[1])]
        inner = [(False, False, dense, min(experts, 1)) for _, _, dense, experts in mixed]
        short = [ends[0], *inner, (False, False, 0, 1), (False, False, 0, 2), ends[-1]]
        short = [kind for at, kind in enumerate(short) if kind not in short[:at]]
        if all(_key(kind) in self.seen for kind in short):
            return
        small = deepcopy(recipe)
        small.model.first_k_dense_replace = sum(dense for _, _, dense, _ in short)
        small.model.num_hidden_layers = sum(dense + experts for _, _, dense, experts in short)
        small.parallel.layers_per_stage = [dense + experts for _, _, dense, experts in short]
        small.parallel.pipeline, small.parallel.data, small.parallel.context = 1, small.parallel.expert, 1
        layers = split_layers(small.model, len(short), small.parallel.layers_per_stage)
        self._study(small, (tuple(range(len(short))),), layers)

    def _stage(self, kind: Kind) -> StageWork:
        first, last, dense, experts = kind
        if not (first or last or dense):
            base = False, False, 0, min(experts, 2)
            return self._stretch(self.seen[_key(base)], base, experts - base[3])
        base = first, last, dense, min(experts, 1)
        return self._stretch(self.seen[_key(base)], base, experts - base[3])

    def _stretch(self, work: StageWork, base: Kind, times: int) -> StageWork:
        """`work`, whose kind is `base`, with so many MoE layers more."""
        if not times:
            return work
        inner = [_key((False, False, 0, count)) for count in (1, 2)]
        one, two = (self.seen[key] for key in inner)
        upper = self.ends[inner[1]]
        at = self.ends[_key(base)]
        blocks = {
            "F": _of_layer(two.passes["F"].events, upper),
            "B": _of_layer(two.passes["B"].events, upper - 1),
            "I": _of_layer(two.passes["I"].events, upper - 1),
        }
        passes = {}
        for name, done in work.passes.items():
            events, less, much = done.events, one.passes[name], two.passes[name]
            if name in blocks:
                after = _end_of(events, at if name == "F" or base[3] < 2 else at - 1)
                ending = _grown(done, less, much, times)
                events = [*events[:after], *blocks[name] * times, *events[after:-1], ending]
            else:
                more = [o for o in _added(less.operators, much.operators) for _ in range(times)]
                events = [replace(_grown(done, less, much, times), operators=[*done.operators, *more])]
            passes[name] = PassWork(events, done.afterwards)
        return replace(
            work,
            passes=passes,
            once=work.once + times * _added(one.once, two.once),
            **{
                name: getattr(work, name) + times * (getattr(two, name) - getattr(one, name))
                for name in ("cached", "turned", "dense", "experts")
            },
        )


def _key(kind: Kind) -> tuple[object, ...]:
    """As `world.study_stages` names a stage."""
    first, last, dense, experts = kind
    return first, last, *[False] * dense, *[True] * experts


def _layers(events: list[Event]) -> list[int]:
    """The layer of each event: what is no piece belongs to the layer of the piece before it."""
    layer, found = -1, []
    for event in events:
        layer = event.layer if isinstance(event, Piece) else layer
        found.append(layer)
    return found


def _of_layer(events: list[Event], layer: int) -> list[Event]:
    return [event for event, number in zip(events, _layers(events), strict=True) if number == layer]


def _end_of(events: list[Event], layer: int) -> int:
    """The place after the last event of `layer`."""
    return 1 + max(place for place, number in enumerate(_layers(events)) if number == layer)


def _grown(work: PassWork, one: PassWork, two: PassWork, times: int) -> Piece:
    """The last event of `work`; for each layer more it leaves as much more as that of `two` does than that of `one`."""
    piece, less, much = (each.events[-1] for each in (work, one, two))
    assert isinstance(piece, Piece) and isinstance(less, Piece) and isinstance(much, Piece)
    added = difference(much.left, less.left)
    left = {part: piece.left[part] + times * added[part] for part in {*piece.left, *added}}
    return replace(piece, left=Bytes({part: size for part, size in left.items() if size}))


def _added(before: list[Operator], after: list[Operator]) -> list[Operator]:
    return list((Counter(after) - Counter(before)).elements())
