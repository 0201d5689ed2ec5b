"""Every rank of a cluster for itself: what `engine` takes one pipeline to stand for, and nobody taken to be alike.

Each rank has its own clock and runs its own list of instructions. An exchange begins when the last member of its expert
group is ready, wherever the others are in their programs, and ends when all of their cards are done with it; a message
is waited for by the next position of the same pipeline; gradients are summed when the last replica of a stage has
finished. With ranks that are alike this is the symmetric step, which the tests hold it to. It is for small clusters:
the cost grows with all ranks' instructions and their pieces.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.stages.work import Exchange, PassWork, Piece, Read, StageWork
from launch.simulate.step.card import Card
from launch.simulate.step.engine import Slot, Timeline, neighbours
from launch.simulate.step.race import Race, Span, turns
from launch.simulate.step.skew import Peers, Skew
from launch.simulate.step.update import update
from parallel.mesh import Mesh
from parallel.schedule import Program, ProgramError
from parallel.schedule.program import Message, makes, needs, passes, route

Life = Generator[Hashable, None, None]  # what a rank waits for next, until it is known


class Meeting:
    """One exchange of an expert group: begins when all have posted it, and ends for all at once."""

    def __init__(self, members: int) -> None:
        self.members, self.posts = members, list[tuple[float, float, Card, float, float]]()
        self.begins = self.ends = 0.0

    def post(self, begin: float, ready: float, card: Card, seconds: float, share: float) -> bool:
        """A member whose instruction began at `begin` is `ready` so long after it. True if it is the last."""
        self.posts.append((begin, ready, card, seconds, share))
        if len(self.posts) < self.members:
            return False
        self.begins = last = max(begin + max(ready, card.now) for begin, ready, card, *_ in self.posts)
        took = max(seconds for *_, seconds, _ in self.posts)
        ends = [begin + card.exchange(last - begin, took, share)[1] for begin, _, card, _, share in self.posts]
        self.ends = max(ends)
        for begin, _, card, *_ in self.posts:
            card.now = self.ends - begin
        return True


@dataclass
class Cluster:
    """A step of all ranks. unlike: how the ranks of the expert group of that number differ, if they do."""

    program: Program
    stages: Mapping[int, StageWork]
    sheet: Sheet
    mesh: Mesh
    slower: Callable[[int], float] = lambda rank: 1.0
    unlike: Callable[[int], Skew] | None = None

    def run(self) -> list[Timeline]:
        """One timeline for each pipeline. Raises `ProgramError` if ranks wait for each other in a circle."""
        self.timelines = [Timeline([[] for _ in self.program.program]) for _ in range(self.mesh.width)]
        self.arrives: dict[tuple[int, Message], float] = {}
        self.meetings: dict[tuple[int, int], Meeting] = {}
        self.met = set[tuple[int, int]]()
        self.near = neighbours(self.mesh)
        self.skews = [self.unlike(g) if self.unlike else None for g in range(self.mesh.world_size // self.mesh.expert)]
        self.awake = deque(self._life(rank) for rank in range(self.mesh.world_size))
        self.asleep: dict[Hashable, list[Life]] = defaultdict(list)
        while self.awake:
            life = self.awake.popleft()
            wanted = next(life, None)
            if wanted is not None:
                self.asleep[wanted].append(life)
        if any(self.asleep.values()):
            raise ProgramError(f"ranks wait in a circle, for {[key for key, lives in self.asleep.items() if lives]}")
        return self.timelines

    def _wake(self, key: Hashable) -> None:
        self.awake.extend(self.asleep.pop(key, ()))

    def _life(self, rank: int) -> Life:
        """What a rank of the world does in the step."""
        position, column = divmod(rank, self.mesh.width)
        row, clock, met = self.timelines[column].ranks[position], 0.0, 0
        for instruction in self.program.program[position]:
            wanted = [(column, message) for message in needs(self.program, instruction)]
            for each in wanted:
                if each not in self.arrives:
                    yield each
            begin = max([clock + (self.sheet.gap if row else 0.0), *(self.arrives[each] for each in wanted)])
            made = makes(self.program, instruction)
            ways = [route(self.program, message) for message in made]
            far = [source != target and not self.near(source, target) for source, target in ways]
            works = [self.stages[stage].passes[kind] for kind, stage, _ in passes(instruction)[::-1]]
            leaving = sum(far) * self.stages[0].message if len(works) > 1 else 0
            skew = self.skews[rank // self.mesh.expert]
            peers = skew.peers(position, instruction) if skew else None
            took = Race()
            met = yield from self._race(rank, begin, works, leaving, peers, took, met)
            clock = begin + took.seconds
            row.append(Slot(instruction, begin, clock, took))
            for message, (source, target), through_card in zip(made, ways, far, strict=True):
                left = arrived = begin + took.ready
                if source != target:
                    size = self.stages[message[1]].message or self.stages[0].message
                    link, load = (self.sheet.across, sum(far)) if through_card else (self.sheet.inside, 1)
                    arrived += link.seconds(load * size)
                    self.timelines[column].messages.append((message, left, arrived, size))
                self.arrives[column, message] = arrived
                self._wake((column, message))

    def _race(
        self,
        rank: int,
        begin: float,
        works: list[PassWork],
        leaving: int,
        peers: Peers | None,
        took: Race,
        met: int,
    ) -> Generator[Hashable, None, int]:
        """`race.race` as one member of the group sees it; fills `took`, returns how many exchanges there have been.

        Of its spans only the exchanges are noted.
        """
        sheet, clock = self.sheet, 0.0
        card = Card(sheet.across.seconds(leaving) if leaving else 0.0)
        group, member = divmod(rank, self.mesh.expert)
        events = (event for one in works for event in one.events)
        talks = any(isinstance(event, Exchange) and event.across + event.inside for event in events)
        sms = sheet.sms - (sheet.comm_sms if talks else 0)
        in_flight: dict[int, tuple[tuple[int, int], str]] = {}
        layers = dict.fromkeys(range(len(works)), -1)

        def compute(number: int, piece: Piece) -> float:
            alone: Any = sum(sheet.seconds(one.cost, one.name, sms) for one in piece.operators)
            seconds = float(peers.seconds(number, piece, sms)[member] if peers else alone) * self.slower(rank)
            took.compute += seconds
            took.weights += seconds if piece.name == "weights.W" else 0.0
            return seconds

        for number, event in turns(works):
            if event is None:
                if number in in_flight:
                    key, name = in_flight.pop(number)
                    if key not in self.met:
                        yield key
                    meeting = self.meetings[key]
                    arrived = meeting.ends - begin
                    took.spans.append(Span("experts", name, -1, meeting.begins - begin, arrived))
                    took.exposed += max(0.0, arrived - clock)
                    clock = max(clock, arrived)
            elif isinstance(event, Piece):
                layers[number] = event.layer
                clock += compute(number, event) if event.operators else 0.0
            elif isinstance(event, Read):
                clock, took.exposed = clock + sheet.read, took.exposed + sheet.read
            else:
                inside, across = peers.bytes(number, layers[number], event) if peers else (event.inside, event.across)
                seconds = sheet.exchange_seconds(inside, across, len(works) > 1)
                link = sheet.exchange if len(works) > 1 else sheet.exchange_alone
                share = across / link.bytes_per_second / seconds if across else 0.0
                key = group, met
                in_flight[number], met = (key, event.name), met + 1
                meeting = self.meetings.setdefault(key, Meeting(self.mesh.expert))
                if meeting.post(begin, clock, card, seconds, share):
                    self.met.add(key)
                    self._wake(key)
        took.ready = clock
        for number, one in enumerate(works):
            if one.afterwards is not None:
                clock += compute(number, one.afterwards)
        took.seconds = clock
        return met


def step_seconds(cluster: Cluster, moments: str) -> float:
    """The whole step of all ranks: gradients wait for the last replica, and parameters for the last rank."""
    timelines = cluster.run()
    ends = []
    for mine in timelines:
        ending = update(cluster.program, cluster.stages, mine, cluster.mesh, cluster.sheet, moments, timelines)
        ends.append(mine.seconds + ending.seconds)
    return max(ends)
