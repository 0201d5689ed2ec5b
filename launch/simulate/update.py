"""What a step does after its last micro-batch: the sums of gradients, the optimizer, the gathering of parameters.

As ZeRO-1 does it (`parallel.zero`): the copies of a parameter scatter-reduce its gradient, each updates its share of
masters and moments, and all gather the result. A stage's sum begins when the last of its holders has run its last
weight gradient (`R`), beside what remains of the pipeline. Weights are quantised again by the first forward that reads
them, whose price is counted here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from launch.simulate.engine import Timeline
from launch.simulate.sheet import Sheet
from launch.simulate.work import StageWork
from parallel.mesh import Mesh
from parallel.replicas import homes
from parallel.schedule import Program
from parallel.schedule.program import passes
from train.optim import MOMENTS


@dataclass(frozen=True)
class Update:
    """Seconds after the pipeline's end: of gradients that are still to be summed, of the optimizer, of gathering."""

    reduce: float
    optimizer: float
    gather: float
    quantise: float

    @property
    def seconds(self) -> float:
        return self.reduce + self.optimizer + self.gather + self.quantise


def ring(size: int, ranks: tuple[int, ...], mesh: Mesh, sheet: Sheet) -> float:
    """Seconds to scatter-reduce, or to gather, `size` bytes over `ranks`: rings through every card of each node."""
    copies = len(ranks)
    if copies == 1:
        return 0.0
    nodes = len({rank // mesh.node_size for rank in ranks})
    together = copies // nodes
    rates = [sheet.inside.bytes_per_second] if together > 1 else []
    rates += [sheet.across.bytes_per_second * together] if nodes > 1 else []
    latency = sheet.across.latency * (nodes - 1) + sheet.inside.latency * (together - 1)
    return latency + size * (copies - 1) / copies / min(rates)


def update(
    program: Program, stages: Mapping[int, StageWork], timeline: Timeline, mesh: Mesh, sheet: Sheet, moments: str
) -> Update:
    """The end of the step on the rank that is last to be ready."""
    done: dict[int, float] = {}  # when a stage's last weight gradient has run on all of its holders
    for row in timeline.ranks:
        for slot in row:
            for kind, stage, _ in passes(slot.instruction):
                if kind in ("B", "W"):
                    done[stage] = max(done.get(stage, 0.0), slot.end)
    latest, optimizer, gather, quantise = 0.0, 0.0, 0.0, 0.0
    for held in program.placement:
        card = touched = 0.0
        seconds = {"gather": 0.0, "quantise": 0.0}
        for stage in sorted({*held}, key=lambda number: done[number]):
            work, places = stages[stage], homes(program.placement, {stage})
            for count, rank in ((work.dense + work.tied, None), (work.experts, 0)):
                ranks = mesh.replicas(places, rank)
                card = max(card, done[stage]) + ring(work.gradient_size * count, ranks, mesh, sheet)
                seconds["gather"] += ring(work.parameter_size * count, ranks, mesh, sheet)
                state = work.gradient_size + 2 * MOMENTS[moments].itemsize  # master and moments, read and written
                touched += count / len(ranks) * (2 * state + work.gradient_size + work.parameter_size)
            seconds["quantise"] += sum(sheet.seconds(one.cost, one.name) for one in work.once)
        latest = max(latest, card)
        optimizer = max(optimizer, touched / sheet.memory)
        gather, quantise = max(gather, seconds["gather"]), max(quantise, seconds["quantise"])
    return Update(max(0.0, latest - timeline.seconds), optimizer, gather, quantise)
