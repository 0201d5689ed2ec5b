"""1F1B (PipeDream-Flush): each rank, once it has begun, alternates one forward and one backward.

`1f1b` gives a rank one stage. `interleaved` (Megatron-LM, Narayanan et al. 2021) gives it several chunks, P stages
apart, so that a micro-batch goes round the ranks several times. A rank then waits for the length of a chunk where it
waited for that of all its layers: the bubble is that of 1F1B divided by the number of chunks.
"""

from parallel.schedule.program import Program
from parallel.schedule.row import Row, assemble


def one_f_one_b(ranks: int, microbatches: int) -> Program:
    """Any number of ranks and micro-batches.

    Each rank idles for (P-1)(F+B) and holds at most P - rank activations (report, Table 2).
    """
    rows = []
    for rank in range(ranks):
        row = Row((rank, range(microbatches)))
        ahead = min(ranks - 1 - rank, microbatches)

        # 1. nF: fill the ranks below
        for _ in range(ahead):
            row.forward()

        # 2. nFB, the steady state
        for _ in range(microbatches - ahead):
            row.forward()
            row.backward()

        # 3. nB: drain
        for _ in range(ahead):
            row.backward()
        rows.append(row)
    return assemble(microbatches, [(rank,) for rank in range(ranks)], rows)


def interleaved(ranks: int, microbatches: int, chunks: int) -> Program:
    """Any number of ranks, micro-batches and chunks; rank r holds stages r, P+r, 2P+r and so on.

    Micro-batches go in rounds of P or a few more: a round visits the first chunk, then the second, and so on; its
    backwards come in the opposite order of chunks. From N = P on each rank idles for (P-1)(F+B) of a chunk. If P
    divides N, rank r holds (chunks-1)P + 2(P-1-r) + 1 activations of a chunk.
    """
    rounds = max(1, microbatches // ranks)
    sizes = [microbatches // rounds + (each < microbatches % rounds) for each in range(rounds)]
    visits = [chunk for size in sizes for chunk in range(chunks) for _ in range(size)]
    placement = [tuple(range(rank, ranks * chunks, ranks)) for rank in range(ranks)]
    rows = []
    for rank in range(ranks):
        row = Row(*((stage, range(microbatches)) for stage in placement[rank]))
        ahead = min((chunks - 1) * sizes[0] + 2 * (ranks - 1 - rank), len(visits))

        # 1. nF: until the first round reaches the last chunk, and the ranks below are full
        for chunk in visits[:ahead]:
            row.forward(chunk)

        # 2. nFB, the steady state
        for i, chunk in enumerate(visits[ahead:]):
            row.forward(chunk)
            row.backward(chunks - 1 - visits[i])

        # 3. nB: drain
        for chunk in visits[len(visits) - ahead :]:
            row.backward(chunks - 1 - chunk)
        rows.append(row)
    return assemble(microbatches, placement, rows)
