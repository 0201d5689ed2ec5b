"""The trace that takes times: one rank's training steps as they really ran.

On a CPU a time is the host's clock; on a GPU it is an event on the current stream, turned into seconds when the step
has ended. The clock is the monotonic one that all processes of a machine share; ranks on other machines measure, once,
how far theirs is from rank 0's. From a step's spans come its `Times`, from all ranks' times the shares in
`metrics.jsonl`, and `timeline.py` writes some steps down for Perfetto and for `weft schedule --compare`.
"""

import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from parallel.schedule.program import Program
from parallel.timeline import Flight, Mark, Span, Step, Timeline
from parallel.trace import Trace


# ---------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Times:
    """One rank's step in seconds.

    begin, end: of its part in the pipeline, from the first instruction to the end of the last, on rank 0's clock.
    compute: inside instructions, waits left out. exposed: standing still for experts (rows and counts), of which
    exposed_in_pairs inside overlapped pairs, whose length is pairs. messages: standing still for other pipeline ranks
    between begin and end. in_flight: expert exchanges from post to arrival, summed. step: from `begin` to `end` call.
    """

    begin: float
    end: float
    compute: float
    exposed: float
    exposed_in_pairs: float
    pairs: float
    messages: float
    in_flight: float
    step: float

    @classmethod
    def of(cls, step: Step) -> "Times":
        """From the spans of a step whose times are seconds."""
        work = [span for span in step.spans if span.lane != "wait" and span.parent is None]
        begin = min((span.begin for span in work), default=step.begin)
        end = max((span.end for span in work), default=step.begin)
        waits = [span for span in step.spans if span.lane == "wait" and span.end <= end]
        exposed = [span for span in waits if span.details["on"] == "experts"]
        messages = [span for span in waits if span.details["on"] == "pipeline"]
        standing = sum(span.seconds for span in waits if span.parent)
        return cls(
            begin=begin,
            end=end,
            compute=sum(span.seconds for span in work) - standing,
            exposed=sum(span.seconds for span in exposed),
            exposed_in_pairs=sum(span.seconds for span in exposed if is_pair(span.instruction)),
            pairs=sum(span.seconds for span in work if is_pair(span.name)),
            messages=sum(span.seconds for span in messages),
            in_flight=sum(each.arrived - each.posted for each in step.flights if each.lane == "experts"),
            step=step.end - step.begin,
        )


def is_pair(instruction: str | None) -> bool:
    """Whether an instruction, by its name, is a forward overlapped with a backward."""
    return instruction is not None and instruction.startswith("FB(")


def shares(ranks: list[Times], pipelines: int) -> dict[str, float]:
    """The step of all ranks as shares, by the keys of `metrics.jsonl`; docs/reference/metrics.md defines them.

    ranks: by number; rank r is in pipeline r % pipelines. A key whose share cannot be taken is absent.
    """
    last = [max(each.end for each in ranks[column::pipelines]) for column in range(pipelines)]
    ends = [last[rank % pipelines] for rank in range(len(ranks))]
    lengths = [end - each.begin for end, each in zip(ends, ranks, strict=True)]
    if min(lengths) <= 0:
        return {}
    idle = [each.messages + end - each.end for end, each in zip(ends, ranks, strict=True)]
    measured = {
        "bubble": sum(each / length for each, length in zip(idle, lengths, strict=True)) / len(ranks),
        "exposed_comm": sum(each.exposed / length for each, length in zip(ranks, lengths, strict=True)) / len(ranks),
    }
    if pairs := sum(each.pairs for each in ranks):
        measured["exposed_comm_pairs"] = sum(each.exposed_in_pairs for each in ranks) / pairs
    return measured


# ---------------------------------------------------------------- clocks
class Clock(Protocol):
    """How moments, arrivals and memory are taken on a device."""

    def begin(self) -> None: ...

    def mark(self) -> Mark:
        """Now, in the order of the rank's work."""
        ...

    def watch(self, work: Any, flight: Flight) -> None:
        """See to it that `flight.arrived` is marked when `work` is done, if that can be had."""
        ...

    def memory(self) -> int | None:
        """Bytes that the rank holds; None if nobody knows."""
        ...

    def settle(self) -> Callable[[Mark], float]:
        """The step's work is done; returns what turns its marks into seconds."""
        ...


class HostClock:
    """A CPU computes when the host calls. A work tells of its end through its future, or (gloo's messages and
    reductions) not at all."""

    def begin(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def watch(self, work: Any, flight: Flight) -> None:
        def arrived(_: Any) -> None:
            if flight.arrived is None:  # else the step has ended without it
                flight.arrived = time.perf_counter()

        try:
            work.get_future().add_done_callback(arrived)
        except (RuntimeError, AttributeError):  # not implemented
            return

    def memory(self) -> int | None:
        statm = Path("/proc/self/statm")
        return int(statm.read_text().split()[1]) * resource.getpagesize() if sys.platform == "linux" else None

    def settle(self) -> Callable[[float], float]:
        return float


class StreamClock:
    """A GPU computes later: a moment is an event on the current stream, an arrival one on a stream that waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.watchers: list[torch.cuda.Stream] = []

    def begin(self) -> None:
        """Tie the device's time to the host's."""
        torch.cuda.synchronize(self.device)
        self.host, self.zero = time.perf_counter(), self.mark()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def watch(self, work: Any, flight: Flight) -> None:
        """On a stream of its own: behind another communication that is still in flight it would be seen too late."""
        watcher = next((stream for stream in self.watchers if stream.query()), None)
        if watcher is None:
            watcher = torch.cuda.Stream(self.device)
            self.watchers.append(watcher)
        with torch.cuda.stream(watcher):
            work.wait()
            flight.arrived = self.mark()

    def memory(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def settle(self) -> Callable[[torch.cuda.Event], float]:
        torch.cuda.synchronize(self.device)
        return lambda event: self.host + self.zero.elapsed_time(event) / 1e3


def offset_to_rank_0(now: Callable[[], float] = time.perf_counter, machine: str | None = None) -> float:
    """What to add to this process's clock to get rank 0's, in seconds; every rank of the world calls this.

    0 on rank 0's machine, whose processes share one clock. Elsewhere from the fastest of 16 round trips: wrong by at
    most half of it.
    """
    machines: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(machines, machine or machine_id())
    if len(set(machines)) == 1:
        return 0.0
    group, rank, offset = dist.new_group(backend="gloo"), dist.get_rank(), 0.0
    there = torch.zeros((), dtype=torch.float64)
    for peer in (peer for peer, each in enumerate(machines) if each != machines[0]):
        fastest = float("inf")
        for _ in range(16):
            if rank == 0:
                dist.recv(there, peer, group=group)
                dist.send(there.fill_(now()), peer, group=group)
            elif rank == peer:
                sent = now()
                dist.send(there, 0, group=group)
                dist.recv(there, 0, group=group)
                trip = now() - sent
                if trip < fastest:
                    fastest, offset = trip, float(there) - (sent + trip / 2)
    return offset


def machine_id() -> str:
    """The same for all processes that share a clock: the boot of the kernel they run on."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else platform.node()


# ---------------------------------------------------------------- the recorder
class _Open(AbstractContextManager[None]):
    """A span while it lasts."""

    def __init__(self, recorder: "Recorder", span: Span) -> None:
        self.recorder, self.span = recorder, span

    def __enter__(self) -> None:
        self.recorder.inside = self.span
        self.span.begin = self.recorder.clock.mark()

    def __exit__(self, *error: Any) -> None:
        self.span.end = self.recorder.clock.mark()
        self.recorder.inside = self.span.parent


class Recorder(Trace):
    """Measures every step, and writes the steps after the first `skip`, `keep` of them, into `directory`.

    After `end()` the step is in `step`, and this rank's seconds are in `times`. What happens between steps
    (evaluation) is not looked at.
    """

    def __init__(
        self, device: torch.device, pipelines: int, directory: Path | None = None, skip: int = 0, keep: int = 0
    ) -> None:
        """The default process group exists, and all ranks construct theirs together.

        pipelines: how many there are side by side. directory: None writes nothing.
        """
        self.device, self.pipelines = device, pipelines
        self.clock: Clock = StreamClock(device) if device.type == "cuda" else HostClock()
        self.timeline = Timeline(directory, dist.get_rank(), pipelines) if directory and keep else None
        self.offset = offset_to_rank_0()
        self.skip, self.keep = skip, keep
        self.seen = 0
        self.running = False
        self.step: Step
        self.times: Times
        self.inside: Span | None = None
        self.flying: dict[int, Flight] = {}  # id of the work -> its flight

    @property
    def writes(self) -> bool:
        """Whether the step that runs will be written."""
        return self.timeline is not None and self.skip < self.seen <= self.skip + self.keep

    # -- what the trace is told
    def begin(self, step: int, program: Program) -> None:
        self.seen += 1
        self.running = True
        self.clock.begin()
        self.step = Step(step, program, self.clock.mark())

    def span(self, lane: str, name: str, **details: Any) -> AbstractContextManager[Any]:
        if not self.running:
            return super().span(lane, name)
        span = Span(lane, name, details, self.inside)
        self.step.spans.append(span)
        if lane == "instruction":
            self._weigh()
        return _Open(self, span)

    def post(self, lane: str, name: str, work: Any, size: int, **details: int) -> None:
        if self.running and size:
            flight = Flight(lane, name, size, self.clock.mark(), details=details)
            self.step.flights.append(flight)
            self.flying[id(work)] = flight
            self.clock.watch(work, flight)

    def wait(self, lane: str, name: str, work: Any) -> None:
        with self.span("wait", name, on=lane):
            work.wait()
        if self.running and (flight := self.flying.pop(id(work), None)):
            flight.waited = self.step.spans[-1].end

    def end(self) -> dict[str, float]:
        """Close the step; returns the shares of all ranks. Writes the file anew if the step belongs in it."""
        self.running = False
        step = self.step
        self._weigh()
        step.end = self.clock.mark()
        seconds = self.clock.settle()
        self._settle(step, lambda mark: seconds(mark) + self.offset)
        self.flying.clear()
        self.times = Times.of(step)
        measured = shares(self._gather(), self.pipelines)
        if self.writes:
            assert self.timeline
            self.timeline.add(step, measured)
        return measured

    # -- inside
    def _weigh(self) -> None:
        """Memory as it is now; finding out takes a while, so only for steps that are written."""
        if self.writes and (held := self.clock.memory()) is not None:
            self.step.memory.append((self.clock.mark(), held))

    def _settle(self, step: Step, seconds: Callable[[Mark], float]) -> None:
        """Turn all marks into seconds on rank 0's clock."""
        step.begin, step.end = seconds(step.begin), seconds(step.end)
        for span in step.spans:
            span.begin, span.end = seconds(span.begin), seconds(span.end)
        for flight in step.flights:
            ends = [seconds(mark) for mark in (flight.arrived, flight.waited) if mark is not None]
            flight.seen = flight.arrived is not None
            flight.posted, flight.arrived = seconds(flight.posted), min(ends, default=step.end)
        step.memory = [(seconds(mark), held) for mark, held in step.memory]

    def _gather(self) -> list[Times]:
        """The times of every rank."""
        table = torch.zeros(dist.get_world_size(), len(astuple(self.times)), dtype=torch.float64, device=self.device)
        table[dist.get_rank()] = torch.tensor(astuple(self.times), dtype=torch.float64)
        dist.all_reduce(table)
        return [Times(*row) for row in table.tolist()]
