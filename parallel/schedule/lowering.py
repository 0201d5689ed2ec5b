"""From a program to what each rank issues: the same instructions, with sends, receives and gradient reductions between.

The program is run once with ideal costs and a small message delay, and everything is sorted by END time into one list.
A transfer stands right after the instruction that makes its message; it becomes a SEND on one rank and a RECV on the
other. Each rank's lowered program is its share of that one list. Because all ranks see projections of one total
order, they finish even if every transfer blocks and nothing is buffered, and anything more concurrent only has fewer
constraints. Sorting by END posts a receive while the message is still being made.
"""

from collections.abc import Mapping
from typing import Any

from parallel.schedule.program import UNIT_COSTS, Instruction, Program, makes, passes, route


def lower(program: Program, costs: Mapping[str, float] = UNIT_COSTS, delay: float = 0.01) -> list[list[Instruction]]:
    """The program of each rank, and between its instructions

    - `("SEND", kind, stage, mb, peer)`, `("RECV", kind, stage, mb, peer)`: transfer the message (kind, stage, mb) to or
      from pipeline rank `peer`;
    - `("R", stage)`: the last weight gradient of `stage` on this rank has run and its message is posted, so that the
      reduction of the stage's gradients may start.

    Raises ProgramError if the ranks of the program wait for each other in a circle.
    """
    events: list[tuple[Any, list[tuple[int, Instruction]]]] = []  # (sort key, [(rank, what it issues)])
    for rank, ends in enumerate(program.ends(costs, delay)):
        completes = _last_weight_gradients(program.program[rank])
        for at, (end, ins) in enumerate(zip(ends, program.program[rank], strict=True)):
            issued: list[list[tuple[int, Instruction]]] = [[(rank, ins)]]
            for msg in makes(program, ins):
                source, target = route(program, msg)
                if source != target:
                    issued.append([(source, ("SEND", *msg, target)), (target, ("RECV", *msg, source))])
            if at in completes:
                issued.append([(rank, ("R", completes[at]))])
            events += [((end, order > 0, rank, at, order), each) for order, each in enumerate(issued)]
    lowered: list[list[Instruction]] = [[] for _ in range(program.ranks)]
    for _, event in sorted(events, key=lambda event: event[0]):
        for rank, ins in event:
            lowered[rank].append(ins)
    return lowered


def _last_weight_gradients(instructions: tuple[Instruction, ...]) -> dict[int, int]:
    """{position of the last weight gradient of a stage: that stage}."""
    last = {p[1]: at for at, ins in enumerate(instructions) for p in passes(ins) if p[0] in ("B", "W")}
    return {at: stage for stage, at in last.items()}
