"""Passes that run once and are repeated from then on.

All micro-batches go through a stage by the same operators. `Repeating` takes the place of an engine's pipeline: each
kind of pass really runs the first time that a stage is asked for one, and what was seen of it, turn by turn between
the effects that it hands to the executor, stands for every later one: its communication, its bytes, its traffic.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from launch.simulate.ranks.communication import Call
from launch.simulate.ranks.witness import Witness
from parallel.experts.dispatch import Tag
from parallel.experts.local import Nothing
from parallel.passes import Comm, Effect, HostSync, Microbatch, Pass, Tape, backward, forward
from parallel.pipeline import Pipeline
from parallel.schedule.program import Program
from train.engine import Engine


@dataclass
class Turn:
    """What a pass does until its next effect. peak: most bytes above those before it. left: bytes more after it."""

    calls: list[Call] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    inside: Counter[str] = field(default_factory=Counter)
    across: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    left: int = 0
    effect: Effect | None = None


@dataclass
class Seen:
    """A pass from turn to turn; then its result, its losses, and the weight gradients that it leaves."""

    turns: list[Turn]
    result: tuple[int, ...] | None
    losses: list[tuple[str, int]]
    weights: Turn | None


class Repeating(Pipeline):
    """The pipeline of an engine, whose passes really run only the first time that a stage is asked for one."""

    def __init__(self, engine: Engine, witness: Witness) -> None:
        numerics, reduce = engine.numerics, engine.optimizer.reduce_stage
        super().__init__(engine.mesh, engine.stages, numerics.weight_grads, numerics.dtype, engine.device, reduce)
        self.dispatcher, self.witness, self.memory = engine.dispatcher, witness, witness.memory
        self.seen: dict[tuple[Any, ...], Seen] = {}

    def _start(self, program: Program, kind: str, number: int, batch: Microbatch) -> Pass:
        taken = super()._start(program, kind, number, batch)
        if (kind, number, batch.shape) not in self.seen:
            self.seen[kind, number, batch.shape] = self._look(kind, number, batch)
        with self.memory.unchanged():
            del taken  # it never began; what it starts from is let go by the turn that was seen to do so
        return self._repeat(self.seen[kind, number, batch.shape], batch)

    def _repeat(self, seen: Seen, batch: Microbatch) -> Pass:
        """The pass of another micro-batch."""
        *turns, last = seen.turns
        for turn in turns:
            self._take(turn, batch.index)
            assert turn.effect is not None
            yield turn.effect
        with self.memory.unchanged():
            batch.losses.update({key: torch.zeros((), dtype=torch.float64) for key in seen.losses})
            result = None if seen.result is None else torch.empty(seen.result, dtype=self.dtype)
        self._take(last, batch.index)
        if seen.weights:
            self.weights.now.append(partial(self._take, seen.weights, batch.index))
        return result

    def _take(self, turn: Turn, microbatch: int) -> None:
        """As if that turn were taken."""
        self.witness.calls += turn.calls
        self.dispatcher.log += [replace(tag, microbatch=microbatch) for tag in turn.tags]
        self.dispatcher.traffic.inside.update(turn.inside)
        self.dispatcher.traffic.across.update(turn.across)
        self.memory.say(turn.peak, turn.left)

    # -- seeing
    def _look(self, kind: str, number: int, batch: Microbatch) -> Seen:
        """Run a pass of this kind, and a forward before it: the first of a stage also quantises its weights."""
        stage, peak, like = self.stages[number], self.memory.peak, replace(batch, losses={})

        def message(needed: bool) -> Tensor | None:
            return torch.empty(batch.shape, dtype=self.dtype) if needed else None

        for _ in range(2 if kind == "F" else 1):
            tape: Tape = []
            turns, result = self._watch(forward(stage, message(not stage.is_first), like, tape))
        if kind != "F":
            like.losses.clear()
            split = kind == "I"
            turns, result = self._watch(backward(stage, message(not stage.is_last), like, tape, self.weights, split))
        weights: list[Turn] = []
        if self.weights.now:
            with self._turn(weights):
                self.weights.run()
        self.memory.peak = peak
        shape = None if result is None else tuple(result.shape)
        return Seen(turns, shape, list(like.losses), weights[0] if weights else None)

    def _watch(self, one: Pass) -> tuple[list[Turn], Any]:
        turns: list[Turn] = []
        effect: Effect | None = None
        result, ended = None, False
        while not ended:
            with self._turn(turns):
                if isinstance(effect, Comm | HostSync):
                    effect.work.wait()
                try:
                    effect = next(one)
                except StopIteration as end:
                    effect, result, ended = None, end.value, True
            turns[-1].effect = replace(effect, work=Nothing()) if isinstance(effect, Comm | HostSync) else effect
        return turns, result

    @contextmanager
    def _turn(self, turns: list[Turn]) -> Iterator[None]:
        """Note what happens meanwhile as one more turn, and make it unsaid."""
        calls, log, traffic, memory = self.witness.calls, self.dispatcher.log, self.dispatcher.traffic, self.memory
        before = len(calls), len(log), traffic.inside.copy(), traffic.across.copy()
        held = memory.peak = memory.alive()
        yield
        sent = traffic.inside - before[2], traffic.across - before[3]
        turns.append(Turn(calls[before[0] :], log[before[1] :], *sent, memory.peak - held, memory.alive() - held))
        del calls[before[0] :], log[before[1] :]
        traffic.inside, traffic.across = before[2:]
