"""One step of one pipeline on a cluster: the program that the executor would run, with the times of `race`.

An instruction begins when its rank has ended the one before and what it needs has arrived; what it makes leaves through
the sender's card, over a node's own links, or stays on the rank. A pair, or a lone pass, of the same stages takes as
long every time, so each is raced once, unless ranks differ (`skew`). After the last instruction come what the program
leaves over: the rest of the gradient sums, the optimizer, and the gathering of parameters (`Update`). The other
pipelines of the cluster do the same at the same time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.stages.work import StageWork
from launch.simulate.step.race import Race, race
from launch.simulate.step.skew import Skew
from parallel.mesh import Mesh
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


def neighbours(mesh: Mesh) -> Callable[[int, int], bool]:
    """Whether two positions of a pipeline share a node, in every pipeline."""

    @cache
    def near(rank: int, other: int) -> bool:
        lines = (mesh.line(column) for column in range(mesh.width))
        return all(line[rank] // mesh.node_size == line[other] // mesh.node_size for line in lines)

    return near


def run(
    program: Program,
    stages: Mapping[int, StageWork],
    sheet: Sheet,
    slower: Callable[[int], float] = lambda rank: 1.0,
    near: Callable[[int, int], bool] = lambda rank, other: False,
    skew: Skew | None = None,
) -> Timeline:
    """Execute `program`. slower: by which factor a rank's instructions take longer than the sheet says.

    near: whether two ranks share a node. skew: how the ranks of their expert groups differ.
    Raises `ProgramError` for a program that cannot end.
    """
    program.ends()  # says who waits for whom, if it cannot
    races: dict[tuple[object, ...], Race] = {}

    def ways(instruction: Instruction) -> list[tuple[int, int]]:
        return [route(program, message) for message in makes(program, instruction)]

    def through_card(source: int, target: int) -> bool:
        return source != target and not near(source, target)

    def time_of(rank: int, instruction: Instruction) -> Race:
        todo = passes(instruction)[::-1]
        crossing = [way for way in ways(instruction) if through_card(*way)]
        works = [stages[stage].passes[kind] for kind, stage, _ in todo]
        key: tuple[object, ...] = (*map(id, works), len(crossing))
        leaving = len(crossing) * stages[0].message if len(todo) > 1 else 0
        if skew:
            return race(works, sheet, leaving, skew.peers(rank, instruction))
        if key not in races:
            races[key] = race(works, sheet, leaving)
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
                gap = sheet.gap if row else 0.0
                begin = max([clock[rank] + gap, *(arrives[message] for message in wanted)])
                took = time_of(rank, instruction)
                clock[rank] = begin + took.seconds * slower(rank)
                row.append(Slot(instruction, begin, clock[rank], took))
                left = begin + took.ready * slower(rank)
                together = sum(through_card(*way) for way in ways(instruction))
                for message in makes(program, instruction):
                    source, target = route(program, message)
                    arrives[message] = left
                    if source != target:
                        size = stages[message[1]].message or stages[0].message
                        far = through_card(source, target)
                        arrives[message] += sheet.across.seconds(together * size) if far else sheet.inside.seconds(size)
                        timeline.messages.append((message, left, arrives[message], size))
            if len(row) == len(instructions):
                waiting.discard(rank)
    return timeline
