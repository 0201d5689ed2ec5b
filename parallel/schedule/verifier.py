"""Proves a program before anything runs it.

Three steps: each rank's own list obeys the rules (known instructions on stages it holds, every pass once and in order);
the ranks together never wait in a circle; and the lowered lists finish in the strictest run, in which a rank does one
thing at a time, a send blocks until it is received, a reduction until all holders of the stage stand at it, and
nothing is buffered. A refusal says the rank, the position and the cause.

Why that run is enough: it puts all transfers and reductions, each one event of all its sides, into one order that
agrees with every rank's list. Any other way to run the lists waits only for other sides and for what stands earlier in
the same list: receives posted early and waited for by their consumer, one queue for each communicator, one launch queue
that all communicators of a rank share, a bound on sends in flight. All such waits point backwards in that one order, so
they form no circle. And two ranks have what they exchange in the same order on both sides, so that communicators, which
match by order and not by name, pair the right messages.

Expert collectives are issued inside the passes. The ranks of an expert group stand at one pipeline position and run one
row, and what a row issues follows from the row alone (`experts.lockstep.predict`), not from what has arrived. So the
group issues them in one order exactly if lowering keeps each row's order, which is checked here; that its ranks do hold
the same row is for `experts.lockstep.agree`. Moving together they count as one rank in the run above.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from parallel.schedule.lowering import lower
from parallel.schedule.program import (
    Instruction,
    Message,
    Program,
    ProgramError,
    makes,
    needs,
    passes,
    place,
    route,
    spell,
)

KINDS = {"train": ("F", "B", "I", "W", "FB"), "eval": ("F",)}
ADDED = ("SEND", "RECV", "R")


def verify(program: Program, lowered: Sequence[Sequence[Instruction]] | None = None) -> None:
    """Raises ProgramError unless the program and its lowered form (by default what `lower` makes of it) are sound.

    Memory is counted by the program: `Program.peak_tapes`, `Program.peak_deferred`.
    """
    _check_placement(program)
    _check_instructions(program)
    _check_passes(program)
    program.ends()
    lowered = lower(program) if lowered is None else lowered
    _check_lowered(program, lowered)
    _run_blocking(program, lowered)


def _check_placement(program: Program) -> None:
    """The head makes sense: a known kind, one row for each rank, and every stage on some rank."""
    if program.kind not in KINDS:
        raise ProgramError(f"kind={program.kind!r}: expected one of {', '.join(KINDS)}")
    if program.stages < 1 or program.microbatches < 1:
        sizes = f"stages={program.stages}, microbatches={program.microbatches}"
        raise ProgramError(f"{sizes}: expected at least 1 of each")
    if not len(program.placement) == len(program.program) == program.ranks > 0:
        rows = f"{len(program.placement)} of placement and {len(program.program)} of program"
        raise ProgramError(f"ranks={program.ranks}: expected as many rows, found {rows}")
    for rank, stages in enumerate(program.placement):
        for at, stage in enumerate(stages):
            if type(stage) is not int or not 0 <= stage < program.stages:
                raise ProgramError(f"placement, rank {rank}: holds {stage!r}; stages are 0 to {program.stages - 1}")
            if stage in stages[:at]:
                raise ProgramError(f"placement, rank {rank}: holds stage {stage} twice")
    for stage in range(program.stages):
        if not program.holders(stage):
            raise ProgramError(f"placement: no rank holds stage {stage}")


def _check_instructions(program: Program) -> None:
    """Every instruction is a known one, about a stage that its rank holds and a micro-batch that exists."""
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
                    held = ", ".join(map(str, program.placement[rank])) or "none"
                    raise ProgramError(f"{place(rank, at, ins)}: this rank holds stages {held}, not {stage}")
            if ins[0] == "FB" and ins[1:3] == ins[3:]:
                raise ProgramError(f"{place(rank, at, ins)}: a backward cannot run beside its own forward")


def _check_passes(program: Program) -> None:
    """Each (stage, micro-batch) goes F, B or F, I, W on one rank; a W takes the oldest that its stage has deferred."""
    forwards: dict[tuple[int, int], int] = {}
    for rank, instructions in enumerate(program.program):
        for at, ins in enumerate(instructions):
            if ins[0] in ("F", "FB") and forwards.setdefault(ins[1:3], rank) != rank:
                raise ProgramError(f"{place(rank, at, ins)}: rank {forwards[ins[1:3]]} runs this forward too")

    for rank, instructions in enumerate(program.program):
        begun: set[tuple[int, int]] = set()
        ended: set[tuple[int, int]] = set()
        deferred: deque[Instruction] = deque()
        for at, ins in enumerate(instructions):
            for kind, stage, mb in passes(ins):
                key, here = (stage, mb), place(rank, at, ins)
                if kind == "F":
                    if key in begun:
                        raise ProgramError(f"{here}: the second forward of stage {stage}, micro-batch {mb}")
                    begun.add(key)
                elif kind == "W":
                    oldest = next((each for each in deferred if each[1] == stage), None)
                    if oldest is None:
                        raise ProgramError(f"{here}: no weight gradient of stage {stage} is deferred here")
                    if oldest != ins:
                        raise ProgramError(f"{here}: the stage's oldest deferred weight gradient is {spell(oldest)}")
                    deferred.remove(oldest)
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
                        deferred.append(("W", stage, mb))
        end = f"rank {rank}, position {len(instructions)}, the end"
        if deferred:
            raise ProgramError(f"{end}: the deferred weight gradient {spell(deferred[0])} has not run")
        if program.kind == "train" and begun != ended:
            forward = spell(("F", *min(begun - ended)))
            raise ProgramError(f"{end}: the backward of {forward} has not run")

    for stage in range(program.stages):
        for mb in range(program.microbatches):
            if (stage, mb) not in forwards:
                ends = (f"rank {rank}, position {len(program.program[rank])}" for rank in program.holders(stage))
                raise ProgramError(f"{' or '.join(ends)}, the end: F({stage}, {mb}) has not run")


def _check_lowered(program: Program, lowered: Sequence[Sequence[Instruction]]) -> None:
    """Lowering kept each row's order, and added each transfer once, and each R after the stage's weight gradients."""
    if len(lowered) != program.ranks:
        raise ProgramError(f"lowered: {len(lowered)} rows for {program.ranks} ranks")
    transfers: list[set[Instruction]] = [set() for _ in range(program.ranks)]
    for msg in (msg for each in program.program for ins in each for msg in makes(program, ins)):
        source, target = route(program, msg)
        if source != target:
            transfers[source].add(("SEND", *msg, target))
            transfers[target].add(("RECV", *msg, source))

    for rank, instructions in enumerate(program.program):
        due, done = set(transfers[rank]), set[Instruction]()
        if program.kind == "train":
            due |= {("R", stage) for stage in program.placement[rank]}
        expected = deque(instructions)
        missing = Counter(_weight_gradients(instructions))
        for at, ins in enumerate(lowered[rank]):
            if expected and ins == expected[0]:
                missing.subtract(_weight_gradients([expected.popleft()]))
            elif ins in done:
                raise ProgramError(f"{place(rank, at, ins)}: stands here a second time")
            elif ins in due:
                if ins[0] == "R" and missing[ins[1]]:
                    raise ProgramError(f"{place(rank, at, ins)}: before this rank's last weight gradient of the stage")
                due.remove(ins)
                done.add(ins)
            elif not ins or ins[0] not in KINDS["train"] + ADDED:
                raise ProgramError(f"rank {rank}, position {at}: unknown instruction {list(ins)}")
            elif ins[0] in ADDED:
                raise ProgramError(f"{place(rank, at, ins)}: no such transfer or reduction belongs on this rank")
            else:
                right = spell(expected[0]) if expected else "ended"
                raise ProgramError(f"{place(rank, at, ins)}: the program has {right} here")
        if left := [*expected, *sorted(due)]:
            raise ProgramError(f"rank {rank}, position {len(lowered[rank])}, the end: {spell(left[0])} is missing")


def _weight_gradients(instructions: Iterable[Instruction]) -> list[int]:
    """The stages whose weight gradients these instructions run, one entry each."""
    return [stage for ins in instructions for kind, stage, _ in passes(ins) if kind in ("B", "W")]


def _run_blocking(program: Program, lowered: Sequence[Sequence[Instruction]]) -> None:
    """Runs the lowered lists in the strictest way: what several ranks do happens only while all of them stand at it.

    How far it gets does not depend on whose turn it is: a rank's next instruction is fixed, and nothing undoes it.
    """
    position = [0] * program.ranks
    here: list[set[Message]] = [set() for _ in range(program.ranks)]  # messages made or received, and not used yet

    def head(rank: int) -> Instruction:
        return lowered[rank][position[rank]] if position[rank] < len(lowered[rank]) else ("END",)

    progress = True
    while progress:
        progress = False
        for rank in range(program.ranks):
            while (ins := head(rank))[0] not in ("RECV", "END"):  # a receive is moved on by its sender
                together = [rank]
                if ins[0] == "SEND":
                    msg, peer = ins[1:4], ins[4]
                    if msg not in here[rank]:
                        raise ProgramError(f"{place(rank, position[rank], ins)}: the message has not been made yet")
                    if head(peer) != ("RECV", *msg, rank):
                        break
                    here[rank].remove(msg)
                    here[peer].add(msg)
                    together = [rank, peer]
                elif ins[0] == "R":
                    together = program.holders(ins[1])
                    if any(head(holder) != ins for holder in together):
                        break
                else:
                    for msg in needs(program, ins):
                        if msg not in here[rank]:
                            cause = f"its input from {spell(msg)} has not been received yet"
                            raise ProgramError(f"{place(rank, position[rank], ins)}: {cause}")
                        here[rank].remove(msg)
                    here[rank].update(makes(program, ins))
                for each in together:
                    position[each] += 1
                progress = True

    stuck = [place(rank, position[rank], head(rank)) for rank in range(program.ranks) if head(rank)[0] != "END"]
    if stuck:
        raise ProgramError(f"deadlock: each of these waits for its other sides to come to it: {'; '.join(stuck)}")
