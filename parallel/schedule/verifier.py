"""Proves a program before anything runs it.

Three steps: each rank's own list obeys the rules (known instructions on stages it holds, every pass once and in order);
the ranks together never wait in a circle; and the lowered lists finish when every send and receive blocks and nothing
is buffered, with each message made, sent, received and used once. Whatever runs those lists more concurrently meets
fewer constraints, so what passes here cannot deadlock. A refusal says the rank, the position and the cause.
"""

from collections import Counter, deque
from collections.abc import Sequence

from parallel.schedule.lowering import lower
from parallel.schedule.program import Instruction, Message, Program, ProgramError, makes, needs, passes, place, route

KINDS = {"train": ("F", "B", "I", "W", "FB"), "eval": ("F",)}


def verify(program: Program, lowered: Sequence[Sequence[Instruction]] | None = None) -> None:
    """Raises ProgramError unless the program and its lowered form (by default what `lower` makes of it) are sound."""
    _check_instructions(program)
    _check_passes(program)
    program.ends()
    lowered = lower(program) if lowered is None else lowered
    _check_lowered(program, lowered)
    _run_blocking(program, lowered)


def _check_instructions(program: Program) -> None:
    """Every instruction is a known one, about a stage that its rank holds and a micro-batch that exists."""
    if program.kind not in KINDS:
        raise ProgramError(f"kind={program.kind!r}: expected one of {', '.join(KINDS)}")
    if not len(program.placement) == len(program.program) == program.ranks > 0:
        rows = f"{len(program.placement)} of placement and {len(program.program)} of program"
        raise ProgramError(f"ranks={program.ranks}: expected as many rows, found {rows}")
    if {stage for stages in program.placement for stage in stages} != set(range(program.stages)):
        raise ProgramError(f"placement: holds other stages than 0 to {program.stages - 1}")
    for rank, instructions in enumerate(program.program):
        for at, ins in enumerate(instructions):
            known = ins and ins[0] in KINDS[program.kind] and len(ins) == (5 if ins[0] == "FB" else 3)
            if not known or not all(type(number) is int for number in ins[1:]):
                expected = f"{', '.join(KINDS[program.kind])}, each with stage and micro-batch"
                raise ProgramError(f"rank {rank}, position {at}: unknown instruction {list(ins)}; expected {expected}")
            for _, stage, mb in passes(ins):
                if not 0 <= mb < program.microbatches:
                    raise ProgramError(f"{place(rank, at, ins)}: micro-batches are 0 to {program.microbatches - 1}")
                if stage not in program.placement[rank]:
                    held = ", ".join(map(str, program.placement[rank]))
                    raise ProgramError(f"{place(rank, at, ins)}: this rank holds stages {held}, not {stage}")


def _check_passes(program: Program) -> None:
    """Each (stage, micro-batch) goes F, B or F, I, W on one rank; a W takes the oldest that its rank has deferred."""
    forwards: dict[tuple[int, int], int] = {}
    for rank, instructions in enumerate(program.program):
        for at, ins in enumerate(instructions):
            if ins[0] in ("F", "FB") and forwards.setdefault(ins[1:3], rank) != rank:
                raise ProgramError(f"{place(rank, at, ins)}: rank {forwards[ins[1:3]]} runs this forward too")

    for rank, instructions in enumerate(program.program):
        begun: set[tuple[int, int]] = set()
        ended: set[tuple[int, int]] = set()
        deferred: deque[tuple[int, int]] = deque()
        for at, ins in enumerate(instructions):
            for kind, stage, mb in passes(ins):
                key, here = (stage, mb), place(rank, at, ins)
                if kind == "F":
                    if key in begun:
                        raise ProgramError(f"{here}: the second forward of stage {stage}, micro-batch {mb}")
                    begun.add(key)
                elif kind == "W":
                    if not deferred:
                        raise ProgramError(f"{here}: no weight gradient is deferred here")
                    if deferred[0] != key:
                        raise ProgramError(f"{here}: the oldest deferred weight gradient is W{deferred[0]}")
                    deferred.popleft()
                else:
                    if forwards.get(key) != rank:
                        where = f"is on rank {forwards[key]}" if key in forwards else "is nowhere"
                        raise ProgramError(f"{here}: the forward of stage {stage}, micro-batch {mb} {where}")
                    if key not in begun:
                        raise ProgramError(f"{here}: before the forward of stage {stage}, micro-batch {mb}")
                    if key in ended:
                        raise ProgramError(f"{here}: the second backward of stage {stage}, micro-batch {mb}")
                    ended.add(key)
                    if kind == "I":
                        deferred.append(key)
        end = f"rank {rank}, position {len(instructions)}, the end"
        if deferred:
            raise ProgramError(f"{end}: the deferred weight gradient W{deferred[0]} has not run")
        if program.kind == "train" and begun != ended:
            raise ProgramError(f"{end}: the backward of F{min(begun - ended)} has not run")

    for stage in range(program.stages):
        for mb in range(program.microbatches):
            if (stage, mb) not in forwards:
                holders = [rank for rank, stages in enumerate(program.placement) if stage in stages]
                end = " or ".join(f"rank {rank}, position {len(program.program[rank])}" for rank in holders)
                raise ProgramError(f"{end}, the end: F({stage}, {mb}) has not run")


def _check_lowered(program: Program, lowered: Sequence[Sequence[Instruction]]) -> None:
    """Lowering changed no order, added each transfer once, and each R after the last weight gradient of its stage."""
    if len(lowered) != program.ranks:
        raise ProgramError(f"lowered: {len(lowered)} rows for {program.ranks} ranks")
    transfers: list[set[Instruction]] = [set() for _ in range(program.ranks)]
    for msg in (msg for each in program.program for ins in each for msg in makes(program, ins)):
        source, target = route(program, msg)
        if source != target:
            transfers[source].add(("SEND", *msg, target))
            transfers[target].add(("RECV", *msg, source))

    for rank, instructions in enumerate(program.program):
        expected = iter(instructions)
        unreduced = Counter(p[1] for ins in instructions for p in passes(ins) if p[0] in ("B", "W"))
        for at, ins in enumerate(lowered[rank]):
            here = place(rank, at, ins)
            if ins[0] in ("SEND", "RECV"):
                if ins not in transfers[rank]:
                    raise ProgramError(f"{here}: no such transfer belongs here, or it stands here twice")
                transfers[rank].remove(ins)
            elif ins[0] == "R":
                if unreduced.pop(ins[1], None) != 0:
                    raise ProgramError(f"{here}: not once and after the last weight gradient of the stage")
            else:
                if (right := next(expected, None)) != ins:
                    raise ProgramError(f"{here}: the program has {right or 'ended'} here")
                unreduced.subtract(p[1] for p in passes(ins) if p[0] in ("B", "W"))
        end = f"rank {rank}, position {len(lowered[rank])}, the end"
        if left := [*expected, *sorted(transfers[rank]), *(("R", stage) for stage in sorted(unreduced))]:
            raise ProgramError(f"{end}: {left[0]} is missing")


def _run_blocking(program: Program, lowered: Sequence[Sequence[Instruction]]) -> None:
    """Runs the lowered lists; a transfer happens only while both of its ranks stand at it."""
    position = [0] * program.ranks
    held: set[tuple[int, Message]] = set()

    def head(rank: int) -> Instruction:
        return lowered[rank][position[rank]] if position[rank] < len(lowered[rank]) else ("END",)

    progress = True
    while progress:
        progress = False
        for rank in range(program.ranks):
            while (ins := head(rank))[0] not in ("RECV", "END"):  # a receive is moved on by its sender
                here = place(rank, position[rank], ins)
                if ins[0] == "SEND":
                    _, kind, stage, mb, peer = ins
                    msg = (kind, stage, mb)
                    if (rank, msg) not in held:
                        raise ProgramError(f"{here}: the message has not been made yet")
                    if head(peer) != ("RECV", *msg, rank):
                        break
                    position[peer] += 1
                    held.remove((rank, msg))
                    held.add((peer, msg))
                elif ins[0] != "R":
                    for msg in needs(program, ins):
                        if (rank, msg) not in held:
                            raise ProgramError(f"{here}: its input from {msg[0]}{msg[1:]} has not been received yet")
                        held.remove((rank, msg))
                    held.update((rank, msg) for msg in makes(program, ins))
                position[rank] += 1
                progress = True

    stuck = [place(rank, position[rank], head(rank)) for rank in range(program.ranks) if head(rank)[0] != "END"]
    if stuck:
        raise ProgramError(f"deadlock: each of these waits for its other side to come to it: {'; '.join(stuck)}")
