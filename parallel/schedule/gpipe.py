"""GPipe (Huang et al. 2019): each rank holds one stage and runs all forwards of the step, then all backwards.

The simplest schedule, and the measure of the others' memory: it idles as little as 1F1B, but holds the activations of
every micro-batch of the step.
"""

from parallel.schedule.program import Program
from parallel.schedule.row import Row, assemble


def gpipe(ranks: int, microbatches: int) -> Program:
    """Any number of ranks and micro-batches. Each rank idles for (P-1)(F+B) and holds N activations."""
    rows = []
    for rank in range(ranks):
        row = Row((rank, range(microbatches)))

        # 1. nF
        for _ in range(microbatches):
            row.forward()

        # 2. nB
        for _ in range(microbatches):
            row.backward()
        rows.append(row)
    return assemble(microbatches, [(rank,) for rank in range(ranks)], rows)
