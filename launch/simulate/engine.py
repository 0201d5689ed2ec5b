"""One step of one pipeline on a cluster: the program that the executor would run, with the times of `race`.

An instruction begins when its rank has ended the one before and what it needs has arrived; what it makes leaves through
the sender's card, or stays on the rank. A pair, or a lone pass, of the same stages takes as long every time, so each is
raced once. After the last instruction come what the program leaves over: the rest of the gradient sums, the optimizer,
and the gathering of parameters (`Update`). The other pipelines of the cluster do the same at the same time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from launch.simulate.race import Race, race
from launch.simulate.sheet import Sheet
from launch.simulate.work import StageWork
from parallel.schedule.program import Instruction, Message, Program, makes, needs, passes, route


@dataclass(frozen=True)
class Slot:
    """An instruction of a rank, from `begin` to `end` seconds after the step began; what it waited for came before."""

    instruction: Instruction
    begin: float
    end: float
    race: Race


@dataclass
class Timeline:
    """What every rank does when. messages: (message, left at, arrived at, bytes)."""

    ranks: list[list[Slot]]
    messages: list[tuple[Message, float, float, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Until the last rank has run its last instruction."""
        return max(row[-1].end for row in self.ranks)


def run(
    program: Program, stages: Mapping[int, StageWork], sheet: Sheet, slower: Callable[[int], float] = lambda rank: 1.0
) -> Timeline:
    """Execute `program`. slower: by which factor a rank's instructions take longer than the sheet says.

    Raises `ProgramError` for one that cannot end.
    """
    program.ends()  # says who waits for whom, if it cannot
    races: dict[tuple[object, ...], Race] = {}

    def time_of(instruction: Instruction) -> Race:
        todo = passes(instruction)[::-1]
        crossing = [msg for msg in makes(program, instruction) if len(set(route(program, msg))) > 1]
        works = [stages[stage].passes[kind] for kind, stage, _ in todo]
        key = (*map(id, works), len(crossing))
        if key not in races:
            leaving = sum(stages[0].message for _ in crossing)
            races[key] = race(works, sheet, leaving if len(todo) > 1 else 0)
        return races[key]

    rows: list[list[Slot]] = [[] for _ in program.program]
    timeline = Timeline(rows)
    clock = [0.0] * program.ranks
    arrives: dict[Message, float] = {}
    waiting = set(range(program.ranks))
    while waiting:
        for rank in sorted(waiting):
            instructions, row = program.program[rank], rows[rank]
            while len(row) < len(instructions):
                instruction = instructions[len(row)]
                wanted = needs(program, instruction)
                if any(message not in arrives for message in wanted):
                    break
                begin = max([clock[rank], *(arrives[message] for message in wanted)])
                took = time_of(instruction)
                clock[rank] = begin + took.seconds * slower(rank)
                row.append(Slot(instruction, begin, clock[rank], took))
                for message in makes(program, instruction):
                    source, target = route(program, message)
                    arrives[message] = clock[rank]
                    if source != target:
                        size = stages[message[1]].message or stages[0].message
                        arrives[message] += sheet.across.seconds(size)
                        timeline.messages.append((message, clock[rank], arrives[message], size))
            if len(row) == len(instructions):
                waiting.discard(rank)
    return timeline
