"""Zero Bubble (Qi et al. 2023): a backward is split, and its weight half fills what would be a wait.

Only the input half is waited for by the stage before; the weight half can run at any time after it. `zb-h1` is 1F1B
with that freedom, called ZB1P in the DeepSeek-V3 report. `zbv` gives each rank two stages, one on the way down and one
on the way back, so that the last stage is on rank 0 and the first gradients come back early (section 6).
"""

from parallel.schedule.program import Program
from parallel.schedule.row import Row, assemble


def zb_h1(ranks: int, microbatches: int) -> Program:
    """Any number of ranks and micro-batches.

    From N = P on each rank idles for (P-1)(F+B-2W) (report, Table 2). Rank r holds at most P - r activations and as
    many deferred weight halves as make up P: the memory of 1F1B's first rank, on all.
    """
    rows = []
    for rank in range(ranks):
        row = Row((rank, range(microbatches)))
        ahead = min(ranks - 1 - rank, microbatches)

        # 1. nF: fill the ranks below
        for _ in range(ahead):
            row.forward()

        # 2. nFIW, the steady state; weight halves stay `rank` behind, for the wait at the end
        # 3. nIW: drain
        for mb in range(microbatches):
            if mb < microbatches - ahead:
                row.forward()
            row.backward_input()
            if mb >= rank:
                row.backward_weight()

        # 4. nW: the rest of them
        for _ in range(min(rank, microbatches)):
            row.backward_weight()
        rows.append(row)
    return assemble(microbatches, [(rank,) for rank in range(ranks)], rows)


def zbv(ranks: int, microbatches: int) -> Program:
    """Any number of ranks and micro-batches; rank r holds stages r (phase 0, going down) and 2P-1-r (phase 1, back).

    In unit costs, from N = 2P-1 on, a rank never waits between its first pass and its last; it idles for P-1 forwards
    of a stage, since the ranks start one after another. It holds at most 2P activations of a stage, those of deferred
    weight halves with them: as much as the first rank of 1F1B. A step of fewer than 2P-1 micro-batches is a longer
    one without those that it does not have.
    """
    n = max(microbatches, 2 * ranks - 1)
    placement = tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    rows = []
    for rank, stages in enumerate(placement):
        row = Row(*((stage, range(n)) for stage in stages))
        left = ranks - rank  # ranks from here to the turning point, with this one

        # 1. nF0: fill the way down
        for _ in range(2 * left - 1):
            row.forward(0)

        # 2. nF1 F0: the first ones come back
        for _ in range(rank):
            row.forward(1)
            row.forward(0)

        # 3. nF1 I1 W1: the first gradients
        for _ in range(left):
            row.forward(1)
            row.backward_input(1)
            row.backward_weight(1)

        # 4. nF0 I0 W0 F1 I1 W1, the steady state, which ends without forwards of phase 0
        for i in range(n - ranks):
            if i <= n - ranks - left:
                row.forward(0)
            row.backward_input(0)
            row.backward_weight(0)
            row.forward(1)
            row.backward_input(1)
            row.backward_weight(1)

        # 5. nI0 I1: only backwards are left; they send gradients on before anything else
        for _ in range(rank):
            row.backward_input(0)
            row.backward_input(1)

        # 6. nI0 W0: weight halves fill the wait for the last gradients
        for _ in range(left):
            row.backward_input(0)
            row.backward_weight(0)

        # 7. nW1, nW0: the rest of them
        for phase in (1, 0):
            for _ in range(rank):
                row.backward_weight(phase)
        rows.append(tuple(ins for ins in row if ins[2] < microbatches))
    return assemble(microbatches, placement, rows)
