"""Steps too short for DualPipe's phases (fewer than 2P micro-batches: the start of a batch ramp), arranged greedily.

The placement is DualPipe's or DualPipeV's. Tick by tick in unit costs, an idle rank runs whatever is ready: a gradient
before a forward before a weight gradient, since that is the order in which others wait. Nothing is overlapped, because
a pair would hold back the first of its two messages, and here ranks wait for them. Of S stages, stage s keeps at most
S-s micro-batches of a direction in flight, as 1F1B does, and at most S/2 weight gradients are deferred: no more memory
than DualPipe's.
"""

from collections import deque
from dataclasses import dataclass, field, replace

from parallel.schedule.program import UNIT_COSTS, Instruction, Message, Program, makes


@dataclass
class _Lane:
    """One direction of travel on one rank: its stage, its micro-batches, and how many have gone forward and back."""

    stage: int
    stages: int
    microbatches: range
    forwards: int = 0
    backwards: int = 0

    def forward(self, arrived: set[Message]) -> tuple[int, int] | None:
        """Takes the next (stage, mb) to go forward, if its input is there and not too many are in flight."""
        if self.forwards == len(self.microbatches) or self.forwards - self.backwards == self.stages - self.stage:
            return None
        mb = self.microbatches[self.forwards]
        if self.stage > 0 and ("F", self.stage - 1, mb) not in arrived:
            return None
        self.forwards += 1
        return self.stage, mb

    def backward(self, arrived: set[Message]) -> tuple[int, int] | None:
        """Takes the next (stage, mb) to go backward, if its gradient is there (the last stage makes its own)."""
        if self.backwards == self.forwards:
            return None
        mb = self.microbatches[self.backwards]
        if self.stage < self.stages - 1 and ("B", self.stage + 1, mb) not in arrived:
            return None
        self.backwards += 1
        return self.stage, mb


@dataclass
class _Rank:
    """What one rank has still to do. The first lane is the one whose stage comes earlier in the model."""

    lanes: list[_Lane]
    deferred: deque[tuple[int, int]] = field(default_factory=deque)

    def choose(self, arrived: set[Message]) -> Instruction | None:
        """The instruction to run now, or None if nothing is ready."""
        for lane in self.lanes:  # nearest to the end of its way back first
            if backward := lane.backward(arrived):
                if len(self.deferred) == lane.stages // 2:
                    return ("B", *backward)
                self.deferred.append(backward)
                return ("I", *backward)
        for lane in reversed(self.lanes):  # nearest to its loss first
            if forward := lane.forward(arrived):
                return ("F", *forward)
        return ("W", *self.deferred.popleft()) if self.deferred else None

    @property
    def finished(self) -> bool:
        return not self.deferred and all(lane.backwards == len(lane.microbatches) for lane in self.lanes)


def greedy(placement: tuple[tuple[int, int], ...], directions: tuple[range, range]) -> Program:
    """placement[rank]: its stage on either way; directions: the micro-batches that travel each, as many on both.

    No bubble is promised; a rank holds at most one more activation than there are stages, as in DualPipe.
    """
    stages = 1 + max(map(max, placement))
    todo = []
    for held in placement:
        lanes = [_Lane(stage, stages, mbs) for stage, mbs in zip(held, directions, strict=True)]
        todo.append(_Rank(sorted(lanes, key=lambda lane: lane.stage)))

    program = Program("train", stages, len(placement), directions[1].stop, placement, ())
    written: list[list[Instruction]] = [[] for _ in placement]
    busy_until = [0.0] * len(placement)
    arrives: dict[Message, float] = {}
    now = 0
    while not all(rank.finished for rank in todo):
        arrived = {msg for msg, time in arrives.items() if time <= now}
        for rank, work in enumerate(todo):
            if busy_until[rank] <= now and (ins := work.choose(arrived)):
                written[rank].append(ins)
                busy_until[rank] = now + UNIT_COSTS[ins[0]]
                arrives |= dict.fromkeys(makes(program, ins), busy_until[rank])
        now += 1
    return replace(program, program=tuple(map(tuple, written)))
