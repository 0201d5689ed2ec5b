"""DualPipe (DeepSeek-V3 report, section 3.2.1 and Figure 5): micro-batches enter the pipeline from both ends.

Ranks r and P-1-r hold the same two stages, r and P-1-r. Micro-batches 0..N/2-1 enter at rank 0, the others at
rank P-1, so that in the middle of the step each rank has a forward of one direction to overlap with a backward of the
other. The eight phases below are those of the authors' open-source `dualpipe/dualpipe.py`. Fewer than 2P micro-batches
cannot fill them; `greedy` arranges those.
"""

from collections import deque
from collections.abc import Iterable

from parallel.errors import UserError
from parallel.schedule.greedy import greedy
from parallel.schedule.program import Instruction, Program


class _Rank:
    """One rank's list while it is written. Each phase (one direction of travel on this rank) counts its own forwards
    and backwards; weight gradients that an input-only backward defers wait first in, first out."""

    def __init__(self, stages: Iterable[int], microbatches: Iterable[range]) -> None:
        lanes = list(zip(stages, microbatches, strict=True))
        self._forwards = [iter([(stage, mb) for mb in mbs]) for stage, mbs in lanes]
        self._backwards = [iter([(stage, mb) for mb in mbs]) for stage, mbs in lanes]
        self._deferred: deque[tuple[int, int]] = deque()
        self.instructions: list[Instruction] = []

    def forward(self, phase: int) -> None:
        self.instructions.append(("F", *next(self._forwards[phase])))

    def backward(self, phase: int) -> None:
        self.instructions.append(("B", *next(self._backwards[phase])))

    def backward_input(self, phase: int) -> None:
        self._deferred.append(next(self._backwards[phase]))
        self.instructions.append(("I", *self._deferred[-1]))

    def backward_weight(self) -> None:
        self.instructions.append(("W", *self._deferred.popleft()))

    def overlapped(self, forward_phase: int, backward_phase: int) -> None:
        forward, backward = next(self._forwards[forward_phase]), next(self._backwards[backward_phase])
        self.instructions.append(("FB", *forward, *backward))


def eight_phases(run: _Rank, half: int, h: int, n: int) -> None:
    """Writes one rank's step: `half` ranks to the middle, this one `h` from its end, `n` micro-batches a direction.

    Notation of the comments: F forward, B backward, I and W its input and weight half, 0 and 1 the phase (0 is the
    direction that reaches this rank first), F0B1 an overlapped pair.
    """
    middle = h == half - 1

    # 1. nF0: fill the pipeline as far as the other direction's first micro-batch leaves time
    for _ in range(2 * (half - h - 1)):
        run.forward(0)

    # 2. nF0 F1: the other direction has arrived
    for _ in range(h + 1):
        run.forward(0)
        run.forward(1)

    # 3. nI1 W1 F1: send the first gradients on early; their weight halves fill the wait for the next forward
    for _ in range(half - h - 1):
        run.backward_input(1)
        run.backward_weight()
        run.forward(1)

    # 4. nF0B1 F1B0, the steady state (the middle ranks run their very first pair apart: less bubble)
    for i in range(n - 2 * half + h + 1):
        if i == 0 and middle:
            run.forward(0)
            run.backward(1)
        else:
            run.overlapped(0, 1)
        run.overlapped(1, 0)

    # 5. nB1 F1B0: direction 0 has no forwards left
    for _ in range(half - h - 1):
        run.backward(1)
        run.overlapped(1, 0)

    # 6. nB1 B0: only backwards are left; from the middle on they defer their weight half (zero bubble)
    for i in range(2 * (h + 1)):
        if i <= h:
            run.backward(1 - i % 2)
        else:
            run.backward_input(1 - i % 2)

    # 7. nW I0: weight halves fill the wait for the last gradients
    for _ in range(half - h - 1):
        run.backward_weight()
        run.backward_input(0)

    # 8. nW: the rest of them
    for _ in range(h + 1):
        run.backward_weight()


def dualpipe(ranks: int, microbatches: int) -> Program:
    """The DualPipe program of an even number of ranks and an even number of micro-batches (both directions together).

    In unit costs every rank idles for exactly (P/2-1)(FB + B - 3W) and holds at most P+1 activations (report, Table 2),
    if N >= 2P; a smaller N promises the activations only.
    """
    if ranks < 2 or ranks % 2:
        raise UserError(
            f"parallel.pipeline={ranks}: dualpipe needs an even number of ranks (r and P-1-r hold the same stages)"
        )
    if microbatches < 2 or microbatches % 2:
        raise UserError(
            f"parallel.microbatches={microbatches}: dualpipe needs an even number, at least 2 (half from either end)"
        )
    if microbatches < 2 * ranks:
        return greedy(ranks, microbatches)
    half, n = ranks // 2, microbatches // 2
    program = []
    for rank in range(ranks):
        mirror = ranks - 1 - rank
        stages, directions = (rank, mirror), (range(n), range(n, microbatches))
        if rank >= half:
            stages, directions = stages[::-1], directions[::-1]
        run = _Rank(stages, directions)
        eight_phases(run, half, min(rank, mirror), n)
        program.append(tuple(run.instructions))
    placement = tuple((rank, ranks - 1 - rank) for rank in range(ranks))
    return Program("train", ranks, ranks, microbatches, placement, tuple(program))
