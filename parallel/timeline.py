"""A rank's recorded steps as a file that Perfetto opens, and back.

The format is Chrome's trace events in JSON: one process a rank; on its first thread the step, the instructions of the
program, their segments and waits, nested; on further threads what was in flight meanwhile, so many as it takes for what
overlaps; and a counter of memory. Times are microseconds on rank 0's clock. `otherData` says to which layout and
programs the file belongs, for `weft schedule --compare`. See docs/how-to/tracing.md.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import UserError
from parallel.schedule.program import Program, spell

Mark = Any  # a moment, as a clock takes it: seconds, or an event on a stream


# ---------------------------------------------------------------- what is recorded
@dataclass(slots=True)
class Span:
    """A piece of work on the rank itself, inside `parent`; `begin` and `end` are seconds once the step has ended."""

    lane: str
    name: str
    details: dict[str, Any]
    parent: "Span | None"
    begin: Mark = None
    end: Mark = None

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def instruction(self) -> str | None:
        """Name of the program's instruction that this is a part of."""
        span: Span | None = self
        while span is not None and span.lane != "instruction":
            span = span.parent
        return span.name if span else None


@dataclass(slots=True)
class Flight:
    """A communication from the moment it was posted until it arrived.

    If the backend did not tell when that was, it was not `seen`, and `arrived` is the end of the wait for it.
    """

    lane: str
    name: str
    size: int
    posted: Mark
    arrived: Mark = None
    waited: Mark = None
    seen: bool = False
    details: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Step:
    """One step of one rank. memory: (moment, bytes held)."""

    number: int
    program: Program
    begin: Mark
    end: Mark = None
    spans: list[Span] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    memory: list[tuple[Mark, int]] = field(default_factory=list)


# ---------------------------------------------------------------- writing
LANES = {"experts": 100, "pipeline": 200, "gradients": 300}  # number of each lane's first thread; the rank's own is 0
VERSION = 1


def file_of(directory: Path, rank: int) -> Path:
    """Where a rank's timeline is."""
    return directory / f"rank-{rank:05}.json"


class Timeline:
    """The file of one rank, written anew after each step that is added; it replaces those of an earlier start."""

    def __init__(self, directory: Path, rank: int, pipelines: int) -> None:
        """pipelines: how many there are; rank r is at position r // pipelines of pipeline r % pipelines."""
        self.path, self.rank, self.pipelines = file_of(directory, rank), rank, pipelines
        self.events: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        directory.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for old in directory.glob("rank-*.json"):
                old.unlink(missing_ok=True)

    def add(self, step: Step, measured: dict[str, float]) -> None:
        """A step whose times are seconds, and the shares of all ranks in it."""
        if not self.events:
            position = self.rank // self.pipelines
            stages = " and ".join(map(str, step.program.placement[position]))
            name = f"rank {self.rank}: pipeline {self.rank % self.pipelines}, position {position}, stages {stages}"
            self.events.append(self._meta("process_name", 0, name=name))
            self.events.append(self._meta("process_sort_index", 0, sort_index=self.rank))
            self.events.append(self._meta("thread_name", 0, name="compute"))
        known = {event["tid"] for event in self.events if event["name"] == "thread_name"}
        new = sorted(self._of(step), key=lambda event: (event["ts"], -event.get("dur", 0)))
        for thread in sorted({event["tid"] for event in new} - known):
            lane = max((lane for lane, first in LANES.items() if first <= thread), key=LANES.__getitem__)
            number = f" {thread - LANES[lane] + 1}" if thread > LANES[lane] else ""
            self.events.append(self._meta("thread_name", thread, name=lane + number))
        self.events += new
        begin, end = micro(step.begin), micro(step.end)
        program = json.loads(step.program.to_json())
        self.steps.append({"step": step.number, "begin": begin, "end": end, **measured, "program": program})
        about = {"weft": VERSION, "rank": self.rank, "pipelines": self.pipelines, "steps": self.steps}
        self.path.write_text(json.dumps({"displayTimeUnit": "ms", "otherData": about, "traceEvents": self.events}))

    def _meta(self, what: str, thread: int, **args: Any) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": self.rank, "tid": thread, "args": args}

    def _event(
        self, cat: str, name: str, thread: int, begin: float, end: float, args: dict[str, Any]
    ) -> dict[str, Any]:
        ts = micro(begin)
        event = {"name": name, "cat": cat, "ph": "X", "pid": self.rank, "tid": thread, "ts": ts}
        return event | {"dur": round(micro(end) - ts, 3), "args": args}

    def _of(self, step: Step) -> Iterator[dict[str, Any]]:
        yield self._event("step", f"step {step.number}", 0, step.begin, step.end, {})
        for span in step.spans:
            name = f"wait for {span.name}" if span.lane == "wait" else span.name
            yield self._event(span.lane, name, 0, span.begin, span.end, span.details)
        free: dict[int, float] = {}  # thread -> when its last communication arrives
        for flight in sorted(step.flights, key=lambda each: each.posted):
            thread = LANES[flight.lane]
            while free.get(thread, flight.posted) > flight.posted:
                thread += 1
            free[thread] = flight.arrived
            args = {"bytes": flight.size, **flight.details, "arrival": "seen" if flight.seen else "end of the wait"}
            yield self._event(flight.lane, flight.name, thread, flight.posted, flight.arrived, args)
        for moment, held in step.memory:
            counter = {"name": "memory", "ph": "C", "pid": self.rank, "tid": 0, "ts": micro(moment)}
            yield counter | {"args": {"MB": round(held / 1e6, 1)}}


def micro(seconds: float) -> float:
    """Seconds as the format's microseconds, to the nanosecond."""
    return round(seconds * 1e6, 3)


# ---------------------------------------------------------------- reading
@dataclass(frozen=True)
class Bar:
    """An instruction as it ran, with the weight gradients that it left until its messages were posted.

    begin, end: seconds. waits: (lane, begin, end) of each time that the rank stood still in it.
    """

    name: str
    begin: float
    end: float
    waits: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Measured:
    """One pipeline's step: the program, rows[position] its instructions as they ran, and the shares of all ranks."""

    step: int
    program: Program
    rows: tuple[tuple[Bar, ...], ...]
    shares: dict[str, float]


def read(run: Path) -> Measured:
    """The last recorded step of a run's first pipeline. Raises `UserError`."""
    if not run.is_dir():
        raise UserError(f"--compare {run}: no such folder; expected that of a run, as runs/NAME")
    if not any((run / "traces").glob("rank-*.json")):
        raise UserError(f"--compare {run}: no {run / 'traces'}/rank-*.json; expected a run of weft train trace=on")
    first = _load(run, 0)
    about = first["otherData"]
    last = about["steps"][-1]
    program = Program.from_json(json.dumps(last["program"]))
    rows = []
    for position in range(program.ranks):
        rank = position * about["pipelines"]
        trace = first if rank == 0 else _load(run, rank)
        bars = _bars(trace["traceEvents"], last["step"])
        if [bar.name for bar in bars] != [spell(instruction) for instruction in program.program[position]]:
            raise UserError(
                f"--compare {run}: {file_of(run / 'traces', rank)} is of another layout or step than rank 0's; "
                "expected the traces of one start"
            )
        rows.append(tuple(bars))
    shares = {key: value for key, value in last.items() if key not in ("step", "begin", "end", "program")}
    return Measured(last["step"], program, tuple(rows), shares)


def _load(run: Path, rank: int) -> dict[str, Any]:
    path = file_of(run / "traces", rank)
    try:
        trace = json.loads(path.read_text())
        if trace["otherData"]["weft"] == VERSION and trace["otherData"]["rank"] == rank:
            return dict(trace)
    except FileNotFoundError:
        raise UserError(f"--compare {run}: {path} is missing; expected a file of each rank of the run") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--compare {run}: {path}: expected a trace as weft train trace=on writes it (version {VERSION})")


def _bars(events: list[dict[str, Any]], step: int) -> list[Bar]:
    """The instructions of a step in order; none if the step is not there."""
    whole = next((event for event in events if event["name"] == f"step {step}"), None)
    if whole is None:
        return []
    inside = [
        event
        for event in events
        if event["ph"] == "X" and event["tid"] == 0 and whole["ts"] <= event["ts"] <= whole["ts"] + whole["dur"]
    ]
    spans: list[tuple[str, float, float]] = []
    for event in inside:
        begin, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        if event["cat"] == "instruction":
            spans.append((event["name"], begin, end))
        elif event["cat"] == "compute" and spans and begin + end > 2 * spans[-1][2]:
            spans[-1] = (*spans[-1][:2], end)
    waits = [
        (event["args"]["on"], event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in inside
        if event["cat"] == "wait"
    ]
    return [
        Bar(name, begin, end, tuple(wait for wait in waits if begin <= (wait[1] + wait[2]) / 2 <= end))
        for name, begin, end in spans
    ]
