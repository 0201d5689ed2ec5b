"""The executor without work: its own `merge`, on a clock for which nobody waits, with durations that were measured.

It tells what a program allows: in the serial order, overlapped, and if pairs overlapped perfectly.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from parallel.passes import Comm, Pass, merge
from parallel.schedule import Program
from parallel.schedule.program import Message, makes, needs, passes
from tests.benchmarks.turns import Key


@dataclass
class Clock:
    """A rank of the model: its time, its link's, and the weight gradients that it has yet to run."""

    carries: float
    serial: bool
    now: float = 0.0
    busy_until: float = 0.0
    left: float = 0.0
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    inside: str = ""

    def post(self, name: str) -> Comm:
        self.busy_until = max(self.now, self.busy_until) + self.carries
        work = Arrives(self, self.busy_until)
        if self.serial:
            work.wait()
        return Comm(name, work, 0, 0, None)


@dataclass(frozen=True)
class Arrives:
    clock: Clock
    at: float

    def wait(self) -> None:
        self.clock.waited[self.clock.inside] += max(0.0, self.at - self.clock.now)
        self.clock.now = max(self.clock.now, self.at)


@dataclass(frozen=True)
class Costs:
    """Mean seconds of the turns of a pass through each stage of `layers` MoE layers, and of one communication."""

    turns: Mapping[Key, float]
    layers: int
    carries: float

    def of(self, way: str, stage: int, name: str) -> float:
        return self.turns.get((way, stage, name), 0.0)

    def every_stage_alike(self, stages: int) -> "Costs":
        """The mean stage, `stages` times."""
        means: dict[tuple[str, str], list[float]] = defaultdict(list)
        for (way, _, name), value in self.turns.items():
            means[way, name].append(value)
        found = {(way, s, name): statistics.fmean(v) for (way, name), v in means.items() for s in range(stages)}
        return replace(self, turns=found)

    def forward(self, stage: int, clock: Clock) -> Pass:
        for _ in range(self.layers):
            for name in ("dispatch", "combine"):
                clock.now += self.of("F", stage, name)
                yield clock.post(name)
        clock.now += self.of("F", stage, "")

    def backward(self, stage: int, clock: Clock, split: bool) -> Pass:
        for _ in range(self.layers):
            for name in ("combine.B", "dispatch.B"):
                clock.now += self.of("B", stage, name)
                comm = clock.post(name)
                clock.now += 0 if split else self.of("W", stage, name)
                yield comm
        clock.now += self.of("B", stage, "")
        clock.left += 0 if split else self.of("W", stage, "")

    def weights(self, stage: int) -> float:
        each = self.of("W", stage, "combine.B") + self.of("W", stage, "dispatch.B")
        return self.layers * each + self.of("W", stage, "")


def model(program: Program, costs: Costs, *, serial: bool = False, perfect: bool = False) -> tuple[float, list[Clock]]:
    """Seconds of a step, and the ranks at its end. perfect: an `F&B` takes as long as its longer lane, no more."""
    clocks = [Clock(costs.carries, serial) for _ in program.program]
    arrives: dict[Message, float] = {}
    todo = [list(instructions) for instructions in program.program]
    while any(todo):
        for clock, mine in zip(clocks, todo, strict=True):
            while mine and all(message in arrives for message in needs(program, mine[0])):
                ins = mine.pop(0)
                clock.now, clock.left, clock.inside = clock.now + clock.left, 0.0, ins[0]
                clock.now = max([clock.now, *(arrives[message] for message in needs(program, ins))])
                _run(ins, costs, clock, perfect)
                arrives |= dict.fromkeys(makes(program, ins), clock.now)
    return max(clock.now + clock.left for clock in clocks), clocks


def _run(ins: tuple[Any, ...], costs: Costs, clock: Clock, perfect: bool) -> None:
    if ins[0] == "W":
        clock.now += costs.weights(ins[1])
        return
    start, before = clock.now, clock.waited["FB"]
    running = [
        costs.forward(stage, clock) if kind == "F" else costs.backward(stage, clock, kind == "I")
        for kind, stage, _ in passes(ins)[::-1]
    ]
    merge(*running)
    if perfect and ins[0] == "FB":
        stood = clock.waited["FB"] - before
        lanes = clock.now - start - stood, 4 * costs.layers * costs.carries
        clock.now, clock.waited["FB"] = start + max(lanes), before + max(0.0, lanes[1] - lanes[0])
        clock.busy_until = clock.now
