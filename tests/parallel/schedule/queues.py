"""Does a lowered program finish under a discipline of queues, whatever the timing? A graph of waits, without a cycle.

Every item of a rank has two nodes, its start and its end. A pass starts when the pass before it and the transfers that
it consumes have ended: receives are posted early and waited for by their consumer. A transfer or reduction is posted
after the pass before it, starts when the one before it on its communicator has ended, and ends when all its sides have
started. Communicators pair the k-th send from one rank to another with the k-th receive there, whatever their names.
"""

from collections import defaultdict
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter

from parallel.schedule import Instruction, Program
from parallel.schedule.program import needs

DISCIPLINES = {
    "one communicator for each direction": {},
    "one communicator for everything": {"shared": True},
    "one launch queue for all communicators": {"launch": True},
    "nothing runs beside anything": {"serial": True},
    "one send in flight": {"in_flight": 1},
    "four sends in flight": {"in_flight": 4},
}


def finishes(
    program: Program,
    lowered: Sequence[Sequence[Instruction]],
    shared: bool = False,
    launch: bool = False,
    serial: bool = False,
    in_flight: int | None = None,
) -> bool:
    """shared: one communicator carries everything. launch: an item waits until all before it on its rank have started.
    serial: ... have ended. in_flight: a rank goes on only when all but so many of its sends have ended.

    False too if a communicator would pair sends and receives, or reductions, of different names.
    """
    waits: TopologicalSorter[tuple] = TopologicalSorter()
    sides: defaultdict[tuple, list[tuple[int, int, object]]] = defaultdict(list)  # of a transfer or reduction
    for rank, row in enumerate(lowered):
        queue: dict[object, tuple] = {}  # communicator: the end of its last item
        counts: defaultdict[tuple, int] = defaultdict(int)
        received: dict[tuple, tuple] = {}
        sends: list[tuple] = []
        computed: list[tuple] = []
        for at, ins in enumerate(row):
            start, end = ("start", rank, at), ("end", rank, at)
            waits.add(start, *computed)
            waits.add(end, start)
            if at and launch:
                waits.add(start, ("start", rank, at - 1))
            if at and serial:
                waits.add(start, ("end", rank, at - 1))
            if in_flight and len(sends) > in_flight:
                waits.add(start, sends[-1 - in_flight])
            if ins[0] not in ("SEND", "RECV", "R"):
                waits.add(start, *(received[msg] for msg in needs(program, ins) if msg in received))
                computed = [end]
                continue
            if ins[0] == "R":
                ends, name = tuple(program.holders(ins[1])), ins[1]
                communicator: object = ends
            else:
                ends, name = (rank, ins[4]) if ins[0] == "SEND" else (ins[4], rank), ins[1:4]
                communicator = ends[0] < ends[1]
            communicator = shared or communicator
            waits.add(start, *(queue[communicator] for _ in range(communicator in queue)))
            queue[communicator] = end
            event = (ins[0] == "R", *ends)
            sides[*event, counts[event]].append((rank, at, name))
            counts[event] += 1
            if ins[0] == "RECV":
                received[ins[1:4]] = end
            if ins[0] == "SEND":
                sends.append(end)
    for event in sides.values():
        if len({name for *_, name in event}) > 1:
            return False
        for rank, at, _ in event:
            waits.add(("end", rank, at), *(("start", other, there) for other, there, _ in event))
    try:
        waits.prepare()
    except CycleError:
        return False
    return True
