"""How long the passes of one instruction take: a race of two lanes, the SMs and the network card.

Passes take turns as `parallel.passes.merge` lets them, the backward of a pair first. Kernels run in the order of issue,
exchanges in the order in which they are posted, each when the last of its peers is ready; a pass that goes on after an
exchange makes the SMs wait for it. Messages to neighbouring ranks leave through the same card meanwhile. Peers are
alike unless `skew` says otherwise: then they are an array, one clock each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.stages.work import Event, Exchange, PassWork, Piece, Read
from launch.simulate.step.card import Card


@dataclass(frozen=True)
class Span:
    """Something on a lane of one instruction: seconds since its beginning."""

    lane: str
    name: str
    layer: int
    begin: float
    end: float


@dataclass
class Race:
    """The outcome: seconds in all; of them those in which nothing computes for an exchange is awaited.

    ready: when what it makes for other instructions can leave. weights, compute: seconds that the SMs spend on weight
    gradients and on all. Of peers that differ these are means, and `spans` are those of the first.
    """

    seconds: float = 0.0
    ready: float = 0.0
    exposed: float = 0.0
    weights: float = 0.0
    compute: float = 0.0
    spans: list[Span] = field(default_factory=list)


class Peers(Protocol):
    """How the ranks of an expert group differ while they run one instruction; all are side by side in arrays."""

    @property
    def count(self) -> int:
        """Ranks."""
        ...

    def seconds(self, number: int, piece: Piece, sms: int) -> Any:
        """How long a piece of pass `number` takes on each."""
        ...

    def bytes(self, number: int, layer: int, exchange: Exchange) -> tuple[float, float]:
        """What the busiest of them sends or receives inside its node, and across."""
        ...


@dataclass(frozen=True)
class Alike:
    """They do not."""

    sheet: Sheet
    count: int = 1

    def seconds(self, number: int, piece: Piece, sms: int) -> float:
        """As the sheet says."""
        return sum(self.sheet.seconds(one.cost, one.name, sms) for one in piece.operators)

    def bytes(self, number: int, layer: int, exchange: Exchange) -> tuple[float, float]:
        """As any of them."""
        return exchange.inside, exchange.across


def turns(passes: Sequence[PassWork]) -> Iterator[tuple[int, Event | None]]:
    """The events of `passes` in the order in which they run, each with the number of its pass; None begins a turn."""
    todo = {number: iter(one.events) for number, one in enumerate(passes)}
    while todo:
        for number, events in list(todo.items()):
            yield number, None
            for event in events:
                yield number, event
                if isinstance(event, Exchange):
                    break
            else:
                del todo[number]


def race(passes: Sequence[PassWork], sheet: Sheet, leaving: int = 0, unlike: Peers | None = None) -> Race:
    """Run `passes` against each other; `leaving` bytes of messages leave through the card from the beginning on.

    unlike: how the ranks of the expert group differ, if they do.
    """
    sms = sheet.sms
    if any(isinstance(event, Exchange) and event.across + event.inside for one in passes for event in one.events):
        sms -= sheet.comm_sms
    beside, result = len(passes) > 1, Race()
    peers: Peers = unlike or Alike(sheet)
    clock, card = np.zeros(peers.count), Card(sheet.across.seconds(leaving) if leaving else 0.0)
    arrives: dict[int, float] = {}
    layers = dict.fromkeys(range(len(passes)), -1)

    def compute(number: int, piece: Piece) -> np.ndarray:
        after = clock + peers.seconds(number, piece, sms)
        took = float((after - clock).mean())
        result.compute += took
        result.weights += took if piece.name == "weights.W" else 0.0
        return after

    for number, event in turns(passes):
        before = clock
        if event is None:
            clock = np.maximum(clock, arrives.pop(number, 0.0))
            result.exposed += float((clock - before).mean())
            if clock[0] > before[0]:
                result.spans.append(Span("wait", "exchange", -1, float(before[0]), float(clock[0])))
        elif isinstance(event, Piece):
            layers[number] = event.layer
            if event.operators:
                clock = compute(number, event)
                result.spans.append(Span("compute", event.name, event.layer, float(before[0]), float(clock[0])))
        elif isinstance(event, Read):
            clock = clock + sheet.read
            result.exposed += sheet.read
            result.spans.append(Span("wait", event.name, -1, float(before[0]), float(clock[0])))
        else:
            inside, across = peers.bytes(number, layers[number], event)
            took = sheet.exchange_seconds(inside, across, beside)
            link = sheet.exchange if beside else sheet.exchange_alone
            share = across / link.bytes_per_second / took if across else 0.0
            begin, arrives[number] = card.exchange(float(clock.max()), took, share)
            result.spans.append(Span("experts", event.name, -1, begin, arrives[number]))
    result.ready = float(clock.max())
    for number, one in enumerate(passes):
        if one.afterwards is not None:
            before, clock = clock, compute(number, one.afterwards)
            result.spans.append(Span("compute", one.afterwards.name, -1, float(before[0]), float(clock[0])))
    result.seconds = float(clock.max())
    return result
