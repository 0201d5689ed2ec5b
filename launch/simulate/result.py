"""The outcome of a simulated step, in the units in which people plan: seconds, tokens a day, GPU-hours, money.

`simulate` puts the parts together. The breakdown is that of DeepSeek's own table (ISCA 2025, Table 4): seconds of a
rank by kind of instruction, averaged over ranks; what is overlapped counts once.
"""

import json
import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.memory import Peak, peaks, remedies
from launch.simulate.stages import world
from launch.simulate.stages.work import Piece, StageWork
from launch.simulate.step import cores, engine
from launch.simulate.step.engine import Timeline
from launch.simulate.step.skew import QUIET, Noise, unlike
from launch.simulate.step.update import pause, update
from parallel import schedule
from parallel.errors import UserError
from parallel.mesh import Mesh
from parallel.schedule import Program
from parallel.schedule.program import spell
from train.recipe import Recipe

KINDS = ("forward", "backward_input", "backward_weight", "overlapped", "bubble", "optimizer", "checkpoint")


@dataclass
class Result:
    """One step of `recipe` on `sheet`. breakdown: seconds by `KINDS`. exposed_comm: seconds of a rank, on average."""

    recipe: Recipe
    sheet: Sheet
    program: Program
    stages: dict[int, StageWork]
    timeline: Timeline
    tokens: int
    step_seconds: float
    breakdown: dict[str, float]
    exposed_comm: float
    memory: list[Peak]
    wall_seconds: float
    uncovered: list[str] = field(default_factory=list)

    @property
    def mfu(self) -> dict[str, float]:
        """Model FLOPs over the BF16 peak, with attention counted as causal and as if it were not."""
        peak = self.recipe.parallel.world_size * self.sheet.peak["bf16"]
        flops = flops_per_token(self)
        return {name: flops[name] * self.tokens / self.step_seconds / peak for name in ("causal", "noncausal")}

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.step_seconds * 86400

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        return 1e12 / self.tokens * self.step_seconds * self.recipe.parallel.world_size / 3600

    def as_json(self) -> dict[str, Any]:
        """The keys that scripts rely on; see docs/reference/simulation.md."""
        return {
            "step_seconds": self.step_seconds,
            "tokens_per_day": self.tokens_per_day,
            "gpu_hours_per_trillion_tokens": self.gpu_hours_per_trillion_tokens,
            "mfu": self.mfu,
            "flops_per_token": flops_per_token(self),
            "breakdown": self.breakdown,
            "memory_gb": [
                {name: size / 1e9 for name, size in peak.parts.items()} | {"peak": peak.total / 1e9}
                for peak in self.memory
            ],
            "exposed_comm": self.exposed_comm,
            "uncovered_shapes": self.uncovered,
            "wall_seconds": self.wall_seconds,
        }

    def to_json(self) -> str:
        """`as_json` as text."""
        return json.dumps(self.as_json(), indent=1) + "\n"


def place(recipe: Recipe, sheet: Sheet) -> None:
    """Put the recipe's ranks on the nodes of a cluster. Raises `UserError` if there are too few."""
    layout = recipe.parallel
    if layout.world_size > sheet.gpus:
        raise UserError(
            f"cluster={sheet.name}: it has {sheet.gpus} GPUs; expected a layout of no more, not parallel.pipeline="
            f"{layout.pipeline} x data={layout.data} x context={layout.context} = {layout.world_size}"
        )
    if layout.node_size is None:
        layout.node_size = sheet.node_size
    if sheet.cores and recipe.fp8.backend == "auto":
        recipe.fp8.backend = "reference"  # the only one on a CPU


def simulate(
    recipe: Recipe,
    sheet: Sheet,
    program: Program | None = None,
    stages: dict[int, StageWork] | None = None,
    noise: Noise = QUIET,
) -> Result:
    """One step at the recipe's full batch. Raises `UserError` for a layout that the cluster has no room for.

    program, stages: the recipe's own, where they are known already. noise: how far ranks are from alike.
    """
    layout, began = recipe.parallel, time.perf_counter()
    place(recipe, sheet)
    if sheet.cores and (noise.skew or noise.jitter):
        raise UserError(f"cluster={sheet.name}: expected neither skew nor jitter where ranks share cores")
    batch = recipe.train.batch.end
    microbatches = layout.microbatches or recipe.microbatches(batch, "train.batch.end")
    program = program or schedule.build(layout.schedule, layout.pipeline, microbatches, layout.chunks)
    stages = stages or world.study_stages(recipe, program.placement)
    node = layout.node_size or sheet.node_size
    mesh = Mesh(layout.pipeline, layout.data, layout.context, layout.expert, rank=0, node_size=node)
    differ = unlike(noise, recipe, sheet, mesh, program, stages) if noise.skew or noise.jitter else None
    if sheet.cores:
        timeline = cores.run(program, stages, sheet, mesh.width)
    else:
        timeline = engine.run(program, stages, sheet, near=engine.neighbours(mesh), skew=differ)
    ending = update(program, stages, timeline, mesh, sheet, recipe.optim.moments)
    memory = peaks(program, stages, mesh, recipe.optim.moments, sheet.reserved)
    most = max(peak.parts["optimizer"] for peak in memory)
    stands = pause(most, recipe.checkpoint, timeline.seconds, sheet)
    seconds = timeline.seconds + ending.seconds + stands
    tokens = microbatches * layout.data * layout.microbatch_size * recipe.train.sequence_length
    spent = breakdown(timeline) | {"optimizer": ending.seconds, "checkpoint": stands}
    exposed = fmean(sum(slot.race.exposed for slot in row) for row in timeline.ranks)
    wall = time.perf_counter() - began
    missing = uncovered(stages, sheet)
    return Result(recipe, sheet, program, stages, timeline, tokens, seconds, spent, exposed, memory, wall, missing)


def breakdown(timeline: Timeline) -> dict[str, float]:
    """Seconds of a rank by kind of instruction, averaged over ranks; they add up to the pipeline's."""
    spent = dict.fromkeys(KINDS, 0.0)
    for row in timeline.ranks:
        busy = 0.0
        for slot in row:
            took, kind = slot.end - slot.begin, slot.instruction[0]
            busy += took
            weights = {"B": slot.race.weights, "W": took}.get(kind, 0.0)
            spent["backward_weight"] += weights
            spent[{"F": "forward", "FB": "overlapped"}.get(kind, "backward_input")] += took - weights
        spent["bubble"] += timeline.seconds - busy
    return {kind: total / len(timeline.ranks) for kind, total in spent.items()}


def flops_per_token(result: Result) -> dict[str, float]:
    """Operations of a step for each token: three times the forward's, recomputation and element-wise work aside.

    causal: attention's pairs that count. noncausal: all pairs, as some papers have it. causal_mtp: with MTP.
    """
    products = attention = mtp = 0
    for work in result.stages.values():
        main = True
        for event in work.passes["F"].events:
            if isinstance(event, Piece):
                main &= event.name != "join"  # the first piece of an MTP module
                in_core = sum(one.cost.flops for one in event.operators if one.cost.unit == "attention")
                in_products = sum(one.cost.flops for one in event.operators if one.cost.products)
                products, attention = products + main * in_products, attention + main * in_core
                mtp += (not main) * (in_products + in_core)
    tokens = result.recipe.parallel.microbatch_size * result.recipe.train.sequence_length
    counted = {"causal": products + attention, "noncausal": products + 2 * attention}
    counted["causal_mtp"] = counted["causal"] + mtp
    return {name: 3 * flops / tokens for name, flops in counted.items()}


def uncovered(stages: dict[int, StageWork], sheet: Sheet) -> list[str]:
    """Operators whose time is only a peak's, because the sheet has no curve for them."""
    different = {id(work): work for work in stages.values()}.values()
    operators = (one for work in different for each in work.passes.values() for one in each.operators)
    return sorted({f"{one.name} ({one.cost.unit})" for one in operators if not sheet.covers(one.cost, one.name)})


def text(result: Result) -> str:
    """A table for the terminal."""
    layout, sheet = result.recipe.parallel, result.sheet
    days = 1e12 / result.tokens_per_day
    rows = [
        ("step", f"{result.step_seconds:.3f} s", f"{result.tokens:,} tokens"),
        ("tokens a day", f"{result.tokens_per_day / 1e9:.2f} B", f"{days:.2f} days for 1 T"),
        (
            "GPU-hours for 1 T tokens",
            f"{result.gpu_hours_per_trillion_tokens / 1e3:.1f} K",
            f"{result.gpu_hours_per_trillion_tokens * sheet.price_per_hour / 1e3:,.0f} K of money",
        ),
        ("MFU", f"{result.mfu['causal']:.1%}", f"{result.mfu['noncausal']:.1%} with all pairs of attention"),
        *(
            (kind.replace("_", " "), f"{took:.3f} s", f"{took / result.step_seconds:.1%}")
            for kind, took in result.breakdown.items()
            if took or kind != "checkpoint"
        ),
        (
            "communication in the open",
            f"{result.exposed_comm:.3f} s",
            f"{result.exposed_comm / result.step_seconds:.1%}",
        ),
    ]
    rank, most = max(enumerate(result.memory), key=lambda item: item[1].total)
    room = sheet.memory_bytes - most.total
    fits = f"{room / 2**30:.1f} GiB free" if room >= 0 else f"{-room / 2**30:.1f} GiB too much"
    rows.append(
        ("most memory of a rank", f"{most.total / 2**30:.1f} GiB", f"{fits}: rank {rank}, {spell(most.instruction)}")
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = (
        f"{sheet.name}: {layout.world_size:,} of {sheet.gpus:,} GPUs, {layout.schedule} of {layout.pipeline} ranks, "
    )
    title += f"{result.program.microbatches} micro-batches of {layout.microbatch_size}"
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    if room < 0:
        largest = sorted(most.parts.items(), key=lambda item: -item[1])[:4]
        lines += ["", "it consists of " + ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in largest)]
        lines += ["to need less: " + "; ".join(remedies(most, result.recipe))]
    if result.uncovered:
        lines += ["", "without a curve, at the peak's rate: " + ", ".join(result.uncovered)]
    return "\n".join([title, "", *lines, "", f"simulated in {result.wall_seconds:.1f} s"])
