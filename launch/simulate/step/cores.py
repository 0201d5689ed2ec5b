"""One step on a machine whose ranks are processes that share its cores: the same program, with its work shared out.

As in `engine`, an instruction begins when its rank has ended the one before and what it needs has arrived, and its race
says what it takes. But ranks that compute at the same time slow each other: while there are more of them than cores,
each gets an equal part, and while all cores are busy each is slower by what they have in common. Cores may have paces
of their own. A rank that waits for an exchange or a message takes no part. Sending and receiving cost a core's time,
too.
"""

from collections.abc import Iterator, Mapping
from math import inf

from launch.simulate.cluster.sheet import Cores, Sheet
from launch.simulate.stages.work import Exchange, PassWork, Read, StageWork
from launch.simulate.step.engine import Slot, Timeline
from launch.simulate.step.race import Race, race
from parallel.schedule.program import Instruction, Message, Program, makes, needs, passes, route

Task = tuple[str, float]  # "work" or "stall" of so many seconds, or "wait" until then
LITTLE = 1e-9  # seconds


def speed(cores: Cores, busy: int) -> float:
    """What each of so many busy processes gets, as a part of the speed that one has alone."""
    if busy > cores.count:
        return cores.count / busy / max(cores.together, cores.crowded)
    return 1 / (1 + (cores.together - 1) * max(0, busy - 1) / max(cores.count - 1, 1))


def own_speed(cores: Cores, ranks: int, width: int) -> list[float]:
    """How fast each of `ranks` is if nobody slows it: as the slowest core that one of its `width` replicas has.

    If there are more processes than cores, nobody keeps one, and all are as fast as the cores are on average.
    """
    paces = cores.paces or (1.0,) * cores.count
    if ranks * width > cores.count:
        return [sum(1 / pace for pace in paces) / len(paces)] * ranks
    return [1 / max(paces[rank * width : (rank + 1) * width]) for rank in range(ranks)]


def run(program: Program, stages: Mapping[int, StageWork], sheet: Sheet, width: int) -> Timeline:
    """Execute `program` on the cores of `sheet`. width: pipelines that do the same on the same cores.

    Raises `ProgramError` for a program that cannot end.
    """
    program.ends()
    assert sheet.cores is not None
    cores, now = sheet.cores, 0.0
    races: dict[tuple[int, ...], tuple[Race, float]] = {}
    arrives: dict[Message, float] = {}
    timeline = Timeline([[] for _ in program.program])

    def size(message: Message) -> int:
        """Bytes that leave a rank for it."""
        source, target = route(program, message)
        return 0 if source == target else stages[message[1]].message or stages[0].message

    def raced(instruction: Instruction) -> tuple[Race, float]:
        """Its race, and a core's time that its exchanges take."""
        works = [stages[stage].passes[kind] for kind, stage, _ in passes(instruction)[::-1]]
        key = tuple(map(id, works))
        if key not in races:
            races[key] = race(works, sheet), sum(exchanging(one, cores) for one in works)
        return races[key]

    def life(rank: int) -> Iterator[Task]:
        """What a rank has to do, one thing after the other."""
        for instruction in program.program[rank]:
            wanted = needs(program, instruction)
            while (ready := max((arrives.get(message, inf) for message in wanted), default=now)) > now:
                yield "wait", ready
            begin = now
            took, exchanged = raced(instruction)
            handling = sum(cores.message.seconds(size(message)) for message in wanted if size(message))
            before = took.compute + exchanged - (took.seconds - took.ready)
            yield "work", handling + before
            yield "stall", max(0.0, took.seconds - took.compute - exchanged)
            for message in makes(program, instruction):
                arrives[message] = now + (sheet.inside.seconds(size(message)) if size(message) else 0.0)
                if size(message):
                    timeline.messages.append((message, now, arrives[message], size(message)))
                    yield "work", cores.message.seconds(size(message))
            yield "work", took.seconds - took.ready
            timeline.ranks[rank].append(Slot(instruction, begin, now, took))

    lives = {rank: life(rank) for rank in range(program.ranks)}
    tasks: dict[int, Task] = dict.fromkeys(lives, ("stall", 0.0))
    own = own_speed(cores, program.ranks, width)

    def advance(rank: int) -> None:
        while task := next(lives[rank], None):
            tasks[rank] = task
            if task[0] == "wait" or task[1] > LITTLE:
                return
        del tasks[rank]

    while tasks:
        each = speed(cores, width * sum(kind == "work" for kind, _ in tasks.values()))
        rates = {rank: each * own[rank] if kind == "work" else 1.0 for rank, (kind, _) in tasks.items()}
        step = min(left - now if kind == "wait" else left / rates[rank] for rank, (kind, left) in tasks.items())
        now += step
        for rank, (kind, left) in list(tasks.items()):
            if kind != "wait":
                tasks[rank] = kind, left - step * rates[rank]
            if (left - now if kind == "wait" else tasks[rank][1]) <= LITTLE:
                advance(rank)
        while waiting := [rank for rank, task in tasks.items() if task == ("wait", inf)]:
            for rank in waiting:  # what they wait for may have been sent just now
                advance(rank)
            if all(tasks.get(rank) == ("wait", inf) for rank in waiting):
                break
    return timeline


def exchanging(one: PassWork, cores: Cores) -> float:
    """A core's time that the exchanges of a pass take."""
    sizes = [event.inside + event.across for event in one.events if isinstance(event, Exchange)]
    reads = sum(isinstance(event, Read) for event in one.events)
    return sum(cores.message.seconds(each) for each in sizes if each) + reads * cores.message.latency
