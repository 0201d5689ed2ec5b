"""DualPipe (DeepSeek-V3 report, section 3.2.1 and Figure 5): micro-batches pass each rank in two directions.

`dualpipe`: ranks r and P-1-r hold the same two stages, r and P-1-r. Micro-batches 0..N/2-1 enter at rank 0, the others
at rank P-1, so that in the middle of the step each rank has a forward of one direction to overlap with a backward of
the other. `dualpipev` is its upper half, folded: rank r holds stages r and 2P-1-r, each of them once, and every
micro-batch goes down the ranks and comes back. The eight phases below, those of the authors' open-source `dualpipe.py`
and `dualpipev.py`, write both. Steps too short to fill them are arranged by `greedy`.
"""

from parallel.errors import UserError
from parallel.schedule.greedy import greedy
from parallel.schedule.program import Program
from parallel.schedule.row import Row, assemble


def dualpipe(ranks: int, microbatches: int) -> Program:
    """An even number of ranks and an even number of micro-batches (both directions together).

    In unit costs every rank idles for exactly (P/2-1)(FB + B - 3W) and holds at most P+1 activations (report, Table 2),
    if N >= 2P; a smaller N promises the activations only.
    """
    if ranks % 2:
        raise UserError(
            f"parallel.pipeline={ranks}: expected an even number for parallel.schedule=dualpipe, "
            "whose ranks hold stages in mirrored pairs"
        )
    if microbatches % 2:
        raise UserError(
            f"parallel.microbatches={microbatches}: expected an even number for parallel.schedule=dualpipe, "
            "which feeds half of them at each end"
        )
    half = microbatches // 2
    placement = tuple((rank, ranks - 1 - rank) for rank in range(ranks))
    return both_ways(placement, (range(half), range(half, microbatches)))


def dualpipev(ranks: int, microbatches: int) -> Program:
    """Any number of ranks and micro-batches.

    Rank r does what it would do in the DualPipe of 2P ranks and 2N micro-batches, whose idle time and activations it
    therefore has, in stages half as long: (P-1)(FB + B - 3W) and 2P+1, if N >= 2P.
    """
    placement = tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    return both_ways(placement, (range(microbatches), range(microbatches)))


def both_ways(placement: tuple[tuple[int, int], ...], directions: tuple[range, range]) -> Program:
    """placement[rank]: its stage on either way; directions: the micro-batches that travel each, as many on both."""
    stages, n = 1 + max(map(max, placement)), len(directions[0])
    if n < stages:
        return greedy(placement, directions)
    rows = []
    for held in placement:
        row = Row(*sorted(zip(held, directions, strict=True), key=lambda lane: lane[0]))
        eight_phases(row, stages // 2, min(held), n)
        rows.append(row)
    return assemble(directions[1].stop, placement, rows)


def eight_phases(row: Row, half: int, h: int, n: int) -> None:
    """Writes one rank's step: `half` ranks to the turning point, this one `h` from its end, `n` micro-batches a way.

    Notation of the comments: F forward, B backward, I and W its input and weight half, 0 and 1 the phase (0 is the
    direction that reaches this rank first), F0B1 an overlapped pair.
    """
    middle = h == half - 1

    # 1. nF0: fill the pipeline as far as the other direction's first micro-batch leaves time
    for _ in range(2 * (half - h - 1)):
        row.forward(0)

    # 2. nF0 F1: the other direction has arrived
    for _ in range(h + 1):
        row.forward(0)
        row.forward(1)

    # 3. nI1 W1 F1: send the first gradients on early; their weight halves fill the wait for the next forward
    for _ in range(half - h - 1):
        row.backward_input(1)
        row.backward_weight()
        row.forward(1)

    # 4. nF0B1 F1B0, the steady state (the middle ranks run their very first pair apart: less bubble)
    for i in range(n - 2 * half + h + 1):
        if i == 0 and middle:
            row.forward(0)
            row.backward(1)
        else:
            row.overlapped(0, 1)
        row.overlapped(1, 0)

    # 5. nB1 F1B0: direction 0 has no forwards left
    for _ in range(half - h - 1):
        row.backward(1)
        row.overlapped(1, 0)

    # 6. nB1 B0: only backwards are left; from the middle on they defer their weight half (zero bubble)
    for i in range(2 * (h + 1)):
        if i <= h:
            row.backward(1 - i % 2)
        else:
            row.backward_input(1 - i % 2)

    # 7. nW I0: weight halves fill the wait for the last gradients
    for _ in range(half - h - 1):
        row.backward_weight()
        row.backward_input(0)

    # 8. nW: the rest of them
    for _ in range(h + 1):
        row.backward_weight()
