"""1F1B (PipeDream-Flush): each rank holds one stage and, once it has begun, alternates one forward and one backward.

The reference that DualPipe is measured against: a bubble of (P-1)(F+B) on every rank, and activations of at most
P - rank micro-batches (report, Table 2).
"""

from parallel.errors import UserError
from parallel.schedule.program import Instruction, Program


def one_f_one_b(ranks: int, microbatches: int) -> Program:
    """The 1F1B program of any number of ranks and micro-batches (both at least 1)."""
    if ranks < 1:
        raise UserError(f"parallel.pipeline={ranks}: a pipeline has at least 1 rank")
    if microbatches < 1:
        raise UserError(f"parallel.microbatches={microbatches}: a step has at least 1 micro-batch")
    program = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, microbatches)

        # 1. nF: fill the ranks below
        instructions: list[Instruction] = [("F", rank, mb) for mb in range(ahead)]

        # 2. nFB, the steady state
        for mb in range(microbatches - ahead):
            instructions.append(("F", rank, ahead + mb))
            instructions.append(("B", rank, mb))

        # 3. nB: drain
        instructions += [("B", rank, mb) for mb in range(microbatches - ahead, microbatches)]
        program.append(tuple(instructions))
    return Program("train", ranks, ranks, microbatches, tuple((rank,) for rank in range(ranks)), tuple(program))
