"""How long the passes of one instruction take: a race of two lanes, the SMs and the network card.

Passes take turns as `parallel.passes.merge` lets them, the backward of a pair first. Kernels run in the order of issue,
exchanges in the order in which they are posted; a pass that goes on after an exchange makes the SMs wait for it.
Messages to neighbouring ranks leave through the same card before the exchanges do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.simulate.sheet import Sheet
from launch.simulate.work import Exchange, PassWork, Piece, Read


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
    """The outcome: seconds in all; of them those in which nothing computes for an exchange is awaited."""

    seconds: float = 0.0
    exposed: float = 0.0
    weights: float = 0.0
    compute: float = 0.0
    spans: list[Span] = field(default_factory=list)


def race(passes: Sequence[PassWork], sheet: Sheet, leaving: int = 0) -> Race:
    """Run `passes` against each other; `leaving` bytes of messages occupy the card first."""
    sms = sheet.sms
    if any(isinstance(event, Exchange) and event.across + event.inside for one in passes for event in one.events):
        sms -= sheet.comm_sms
    result, beside = Race(), len(passes) > 1
    clock, card = 0.0, sheet.across.seconds(leaving) if leaving else 0.0
    arrives: dict[int, float] = {}
    todo = {number: iter(one.events) for number, one in enumerate(passes)}
    while todo:
        for number, events in list(todo.items()):
            if number in arrives:
                landed = arrives.pop(number)
                if landed > clock:
                    result.exposed += landed - clock
                    result.spans.append(Span("wait", "exchange", -1, clock, landed))
                    clock = landed
            for event in events:
                begin = clock
                if isinstance(event, Piece):
                    clock += sum(sheet.seconds(one.cost, one.name, sms) for one in event.operators)
                    result.compute += clock - begin
                    if event.name == "weights.W":
                        result.weights += clock - begin
                    result.spans.append(Span("compute", event.name, event.layer, begin, clock))
                elif isinstance(event, Read):
                    clock += sheet.read
                    result.exposed += sheet.read
                    result.spans.append(Span("wait", event.name, -1, begin, clock))
                else:
                    start = max(clock, card)
                    card = arrives[number] = start + sheet.exchange_seconds(event.inside, event.across, beside)
                    result.spans.append(Span("experts", event.name, -1, start, card))
                    break
            else:
                del todo[number]
    result.seconds = clock
    return result
