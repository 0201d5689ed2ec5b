"""From a program to what each rank issues: the same instructions, with sends, receives and gradient reductions between.

The program is run once with ideal costs and a small message delay, and everything is sorted by END time into one list.
A transfer stands right after the instruction that makes its message; it becomes a SEND on one rank and a RECV on the
other. The reduction of a stage stands where the last of the ranks that hold it has run its last weight gradient. Each
rank's lowered program is its share of that one list. Because all ranks see projections of one total order, they finish
even if every transfer and reduction blocks and nothing is buffered, and anything more concurrent only has fewer
constraints. Sorting by END posts a receive while the message is still being made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from parallel.schedule.program import UNIT_COSTS, Instruction, Program, makes, passes, route


def lower(program: Program, costs: Mapping[str, float] = UNIT_COSTS, delay: float = 0.01) -> list[list[Instruction]]:
    """The program of each rank, and between its instructions

    - `("SEND", kind, stage, mb, peer)`, `("RECV", kind, stage, mb, peer)`: transfer the message (kind, stage, mb) to or
      from pipeline rank `peer`;
    - `("R", stage)`: all ranks that hold `stage` have run its last weight gradient and posted its last message, so that
      together they start to reduce its gradients.

    Raises ProgramError if the ranks of the program wait for each other in a circle.
    """
    ends = program.ends(costs, delay)
    events: list[tuple[Any, list[tuple[int, Instruction]]]] = []  # (sort key, [(rank, what it issues)])
    for rank, instructions in enumerate(program.program):
        for at, (end, ins) in enumerate(zip(ends[rank], instructions, strict=True)):
            events.append(((end, 0, rank, at), [(rank, ins)]))
            for order, msg in enumerate(makes(program, ins)):
                source, target = route(program, msg)
                if source != target:
                    transfer = [(source, ("SEND", *msg, target)), (target, ("RECV", *msg, source))]
                    events.append(((end, 1, rank, at, order), transfer))
    for stage, end in _last_weight_gradients(program, ends).items():
        events.append(((end, 2, stage), [(rank, ("R", stage)) for rank in program.holders(stage)]))

    lowered: list[list[Instruction]] = [[] for _ in range(program.ranks)]
    for _, event in sorted(events, key=lambda event: event[0]):
        for rank, ins in event:
            lowered[rank].append(ins)
    return lowered


def _last_weight_gradients(program: Program, ends: Sequence[Sequence[float]]) -> dict[int, float]:
    """{stage: when its last weight gradient on any rank ends}; empty for an evaluation."""
    last: dict[int, float] = {}
    for instructions, times in zip(program.program, ends, strict=True):
        for ins, end in zip(instructions, times, strict=True):
            for stage in (stage for kind, stage, _ in passes(ins) if kind in ("B", "W")):
                last[stage] = max(last.get(stage, 0.0), end)
    return last
