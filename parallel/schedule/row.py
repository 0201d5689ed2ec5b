"""One rank's list of instructions, written in the words of the papers: forward, backward, and a backward's halves.

A rank visits each of its stages in a phase: a chunk of `interleaved`, a way of travel of `dualpipe` or `zbv`. A phase
counts its own forwards and backwards, so a generator says only which phase goes next, never which micro-batch.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from parallel.schedule.program import Instruction, Program


class Row(list[Instruction]):
    """phases: for each, its stage and the micro-batches that visit it, in order. Without a number, phase 0 is meant."""

    def __init__(self, *phases: tuple[int, Iterable[int]]) -> None:
        super().__init__()
        self._forwards = [iter([(stage, mb) for mb in mbs]) for stage, mbs in phases]
        self._backwards = [iter([(stage, mb) for mb in mbs]) for stage, mbs in phases]
        self._deferred: deque[tuple[int, tuple[int, int]]] = deque()  # phase, (stage, mb)

    def forward(self, phase: int = 0) -> None:
        self.append(("F", *next(self._forwards[phase])))

    def backward(self, phase: int = 0) -> None:
        self.append(("B", *next(self._backwards[phase])))

    def backward_input(self, phase: int = 0) -> None:
        """The input half of a backward; its weight half is deferred."""
        self._deferred.append((phase, next(self._backwards[phase])))
        self.append(("I", *self._deferred[-1][1]))

    def backward_weight(self, phase: int | None = None) -> None:
        """The weight half that has been deferred longest, of `phase` or of all."""
        oldest = next(each for each in self._deferred if phase in (None, each[0]))
        self._deferred.remove(oldest)
        self.append(("W", *oldest[1]))

    def overlapped(self, forward_phase: int, backward_phase: int) -> None:
        forward, backward = next(self._forwards[forward_phase]), next(self._backwards[backward_phase])
        self.append(("FB", *forward, *backward))


def assemble(microbatches: int, placement: Sequence[tuple[int, ...]], rows: Sequence[Sequence[Instruction]]) -> Program:
    """The training program of these rows; placement[rank]: the stages that the rank holds."""
    stages = 1 + max(map(max, placement))
    return Program("train", stages, len(placement), microbatches, tuple(placement), tuple(map(tuple, rows)))
