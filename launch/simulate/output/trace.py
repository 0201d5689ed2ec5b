"""A simulated step as the timelines that a real one leaves: the same files, in the same schema, by the same writer.

`DIR/traces/rank-*.json` are those of the cluster's first pipeline, so that `weft schedule --compare DIR` and whoever
reads a run's traces read these (`parallel.timeline`, docs/how-to/tracing.md); `DIR/traces/all.json` has its ranks in
one file for Perfetto. Every instruction and every wait is there; the segments and exchanges inside an instruction only
the first `SHOWN` times that a rank runs one like it, because they repeat.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from launch.simulate.result import Result
from launch.simulate.stages.work import Exchange
from launch.simulate.step.engine import Slot
from parallel import timeline
from parallel.errors import UserError
from parallel.recorder import Times, shares
from parallel.schedule.program import makes, needs, passes, route, spell
from parallel.timeline import Flight, Span, Step

SHOWN = 2


def write(result: Result, directory: Path) -> None:
    """Write the traces of `result` below `directory`. Raises `UserError` if they cannot be written."""
    pipelines = result.recipe.parallel.world_size // result.program.ranks
    steps = [step_of(result, rank) for rank in range(result.program.ranks)]
    measured = shares([Times.of(step) for step in steps], 1)
    events: list[dict[str, Any]] = []
    try:
        for position, step in enumerate(steps):
            file = timeline.Timeline(directory / "traces", position * pipelines, pipelines)
            file.add(step, measured)
            events += file.events
        together = json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
        (directory / "traces" / "all.json").write_text(together)
    except OSError as error:
        raise UserError(f"--trace {directory}: expected a folder to write into; {error.strerror}") from None


def step_of(result: Result, rank: int) -> Step:
    """What `rank` does in the step, in the words of a real trace."""
    program, line = result.program, result.timeline
    step = Step(1, program, 0.0, result.step_seconds)
    moves = {message: (left, arrived, size) for message, left, arrived, size in line.messages}
    shown: Counter[tuple[object, ...]] = Counter()
    clock = 0.0
    for slot in line.ranks[rank]:
        wanted = [message for message in needs(program, slot.instruction) if message in moves]
        if slot.begin > clock and wanted:
            last = max(wanted, key=lambda message: moves[message][1])
            step.spans.append(Span("wait", f"receive {spell(last)}", {"on": "pipeline"}, None, clock, slot.begin))
        for message in wanted:
            left, arrived, size = moves[message]
            step.flights.append(_flight("pipeline", f"receive {spell(message)}", size, left, arrived))
        for message in makes(program, slot.instruction):
            if message in moves and len({*route(program, message)}) > 1:
                left, arrived, size = moves[message]
                step.flights.append(_flight("pipeline", f"send {spell(message)}", size, left, arrived))
        like = slot.instruction[0], *slot.instruction[1::2]
        shown[like] += 1
        _inside(step, slot, _exchanges(result, slot), shown[like] <= SHOWN)
        clock = slot.end
    return step


def _inside(step: Step, slot: Slot, sizes: dict[str, Exchange], whole: bool) -> None:
    """The instruction and its waits; with `whole`, its segments and exchanges too."""
    instruction = Span("instruction", spell(slot.instruction), {}, None, slot.begin, slot.end)
    step.spans.append(instruction)
    scale = (slot.end - slot.begin) / slot.race.seconds if slot.race.seconds else 1.0
    for span in slot.race.spans:
        begin, end = slot.begin + span.begin * scale, slot.begin + span.end * scale
        if span.lane == "wait":
            step.spans.append(Span("wait", span.name, {"on": "experts"}, instruction, begin, end))
        elif whole and span.lane == "compute":
            step.spans.append(Span("compute", span.name, {"layer": span.layer}, instruction, begin, end))
        elif whole:
            one = sizes[span.name]
            size = one.inside + one.across
            step.flights.append(_flight("experts", span.name, size, begin, end, across=one.across))


def _flight(lane: str, name: str, size: int, posted: float, arrived: float, **details: int) -> Flight:
    return Flight(lane, name, size, posted, arrived=arrived, waited=arrived, seen=True, details=details)


def _exchanges(result: Result, slot: Slot) -> dict[str, Exchange]:
    """The exchanges of an instruction's passes by name; layers exchange alike."""
    works = (result.stages[stage].passes[kind] for kind, stage, _ in passes(slot.instruction))
    return {event.name: event for work in works for event in work.events if isinstance(event, Exchange)}
