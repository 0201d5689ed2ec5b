"""What a step does after its last micro-batch: the sums of gradients, the optimizer, the gathering of parameters.

As ZeRO-1 does it (`parallel.zero`): the copies of a parameter scatter-reduce its gradient, each updates its share of
masters and moments, and all gather the result. A stage's sum begins when the last of its holders has run its last
weight gradient (`R`), beside what remains of the pipeline. Weights are quantised again by the first forward that reads
them, whose price is counted here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.stages.work import StageWork
from launch.simulate.step.engine import Slot, Timeline
from parallel.mesh import Mesh
from parallel.replicas import homes
from parallel.schedule import Program
from parallel.schedule.program import passes
from train.optim import MOMENTS
from train.recipe import CheckpointConfig


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


def shared(begin: float, seconds: float, row: Sequence[Slot]) -> float:
    """When a sum has ended that begins then and would take so long alone: it has half a card while experts exchange."""
    at, left = begin, seconds
    for slot in row:
        for span in slot.race.spans if slot.end > at else ():
            first, last = slot.begin + span.begin, slot.begin + span.end
            if span.lane != "experts" or last <= at:
                continue
            alone = min(left, max(first - at, 0.0))
            left, at = left - alone, at + alone
            halved = min(2 * left, last - at) if left else 0.0
            left, at = left - halved / 2, at + halved
            if not left:
                return at
    return at + left


def update(
    program: Program,
    stages: Mapping[int, StageWork],
    timeline: Timeline,
    mesh: Mesh,
    sheet: Sheet,
    moments: str,
    others: Sequence[Timeline] = (),
) -> Update:
    """The end of the step on the rank that is last to be ready. others: pipelines that are not like this one."""
    done: dict[int, float] = {}  # when a stage's last weight gradient has run on all of its holders
    for row in (row for each in (timeline, *others) for row in each.ranks):
        for slot in row:
            for kind, stage, _ in passes(slot.instruction):
                if kind in ("B", "W"):
                    done[stage] = max(done.get(stage, 0.0), slot.end)
    users = {stage for stage, work in stages.items() if work.tied}
    latest, optimizer, gather, quantise = 0.0, 0.0, 0.0, 0.0
    for held, row in zip(program.placement, timeline.ranks, strict=True):
        buckets = []  # (when its sum may begin, its parameters, its copies)
        for stage in {*held}:
            work, places = stages[stage], homes(program.placement, {stage})
            buckets += [
                (done[stage], work.dense, mesh.replicas(places, None)),
                (done[stage], work.experts, mesh.replicas(places, 0)),
            ]
        if mine := users & {*held}:  # what is tied is one parameter, whose sum waits for the end
            tied = mesh.replicas(homes(program.placement, users), None)
            buckets.append((max(row[-1].end, *(done[each] for each in users)), stages[min(mine)].tied, tied))
        work, card, touched, gathered = stages[held[0]], 0.0, 0.0, 0.0
        for ready, count, ranks in sorted(buckets):
            card = shared(max(card, ready), ring(work.gradient_size * count, ranks, mesh, sheet), row)
            gathered += ring(work.parameter_size * count, ranks, mesh, sheet)
            state = work.gradient_size + 2 * MOMENTS[moments].itemsize  # master and moments, read and written
            touched += count / len(ranks) * (2 * state + work.gradient_size + work.parameter_size)
        quantised = sum(sheet.seconds(one.cost, one.name) for stage in {*held} for one in stages[stage].once)
        latest, optimizer = max(latest, card), max(optimizer, touched / (sheet.optimizer or sheet.memory))
        gather, quantise = max(gather, gathered), max(quantise, quantised)
    return Update(max(0.0, latest - timeline.seconds), optimizer, gather, quantise)


def pause(size: float, config: CheckpointConfig, pipeline: float, sheet: Sheet) -> float:
    """Seconds of a step, on average, in which training stands still for checkpoints of `size` bytes a rank.

    In the background they are copied to the host while the next step's pipeline runs, for so many seconds, and written
    until the next one is due; only what takes longer is waited for. What the sheet has no rate for takes no time.
    """
    copy, write = (size / rate if rate else 0.0 for rate in (sheet.copy_out, sheet.storage))
    if not config.every:
        return 0.0
    stands = max(0.0, copy - pipeline, copy + write - config.every * pipeline) if config.background else copy + write
    return stands / config.every
