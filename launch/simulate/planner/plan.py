"""Which layout of a recipe costs least on a cluster, and why the others cost more or do not fit.

`layouts` says what may be chosen, the recipe itself which of it is legal, `result` what it costs. First all layouts are
priced with the recipe's own recomputation and dispatch; then the best are tried with others. Nothing is dropped in
silence: each `Plan` that is no choice has its reason.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from tqdm import tqdm

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.memory import stays
from launch.simulate.planner.layers import Studies
from launch.simulate.planner.layouts import Layout, distance, layouts, variants, world_size
from launch.simulate.result import Result, place, simulate
from launch.simulate.stages.work import StageWork
from parallel import schedule
from parallel.errors import UserError
from parallel.mesh import Mesh
from parallel.schedule import Program, ProgramError
from train.recipe import Recipe

GIB = 2**30
REFINED = 3  # of the layouts that fit, and of those that do not: tried with other recomputation and dispatch


@dataclass
class Plan:
    """A layout and what became of it. kind: of the reason, to count by; "" for one on the front."""

    layout: Layout
    seconds: float | None = None  # of a step
    memory: float | None = None  # most bytes of a rank
    gpu_hours: float | None = None  # for a trillion tokens
    kind: str = ""
    reason: str = ""


@dataclass
class Planning:
    """The outcome. front: what fits and is not beaten in both time and memory, fastest first; own: the recipe's."""

    recipe: Recipe
    sheet: Sheet
    gpus: int
    front: list[Plan]
    rejected: list[Plan]
    own: Result | None
    winner: Result | None
    own_reason: str = ""

    @property
    def better(self) -> bool:
        """Whether the winner needs fewer GPU-hours than the recipe's own layout, or that does not fit."""
        if self.winner is None or self.own is None or _peak(self.own) > self.sheet.memory_bytes:
            return self.winner is not None
        return self.winner.gpu_hours_per_trillion_tokens < self.own.gpu_hours_per_trillion_tokens

    def as_json(self) -> dict[str, Any]:
        """Everything: the front, the rejected with their reasons, the winner's figures and the explanation."""
        return {
            "cluster": self.sheet.name,
            "gpus": self.gpus,
            "front": [asdict(plan) for plan in self.front],
            "rejected": [asdict(plan) for plan in self.rejected],
            "own": self.own.as_json() if self.own else None,
            "winner": self.winner.as_json() if self.winner else None,
            "better": self.better,
            "explanation": explain(self),
        }

    def to_json(self) -> str:
        """`as_json` as text."""
        return json.dumps(self.as_json(), indent=1) + "\n"


# ---------------------------------------------------------------- pricing
@dataclass
class Pricer:
    """Prices layouts of one recipe on one cluster, and looks at no stage, and writes no program, twice."""

    recipe: Recipe
    sheet: Sheet
    studies: dict[tuple[Any, ...], Studies] = field(default_factory=dict)
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)
    stages: dict[tuple[Any, ...], dict[int, StageWork]] = field(default_factory=dict)
    computing: dict[int, float] = field(default_factory=dict)

    def checked(self, layout: Layout) -> Recipe:
        """The recipe in this layout, on the cluster's nodes. Raises `UserError` if it may not be."""
        recipe = layout.applied(self.recipe)
        recipe.parallel.node_size = None
        place(recipe, self.sheet)
        return recipe.validate(data=False)

    def program(self, recipe: Recipe) -> Program:
        p = recipe.parallel
        count = recipe.microbatches(recipe.train.batch.end, "train.batch.end")
        key = p.schedule, p.pipeline, count, p.chunks
        if key not in self.programs:
            self.programs[key] = schedule.generate(*key)
        return self.programs[key]

    def works(self, recipe: Recipe, layout: Layout, program: Program) -> dict[int, StageWork]:
        """The stages; what they consist of depends neither on the schedule nor on the width of data."""
        same = layout.expert, layout.microbatch_size, layout.dispatch, layout.recompute, layout.precision
        split = *same, program.stages, tuple(recipe.parallel.layers_per_stage or ())
        if split not in self.stages:
            self.stages[split] = self.studies.setdefault(same, Studies()).of(recipe, program.placement)
        return self.stages[split]

    def least_memory(self, recipe: Recipe, layout: Layout, program: Program) -> float | None:
        """Bytes that a rank holds all the time, from stages that were seen with experts spread otherwise, if any were.

        Copies of quantised weights are left out, so that there cannot be less.
        """
        for (expert, *_, precision, count, _), works in self.stages.items():
            if count == program.stages and precision == layout.precision:
                spread = {
                    number: replace(work, cached=0, experts=work.experts * expert // layout.expert)
                    for number, work in works.items()
                }
                mesh = _mesh(recipe)
                held = (stays({*each}, spread, program, mesh, recipe.optim.moments) for each in program.placement)
                return max(sum(parts.values()) for parts in held)
        return None

    def least_seconds(self, program: Program, works: dict[int, StageWork]) -> float:
        """What the busiest rank computes in a step, with all SMs and nothing to wait for."""
        copies = Counter(stage for held in program.placement for stage in held)
        return max(
            sum(program.microbatches / copies[stage] * self._computing(works[stage]) for stage in held)
            for held in program.placement
        )

    def _computing(self, work: StageWork) -> float:
        if id(work) not in self.computing:
            operators = [one for name in "FB" for one in work.passes[name].operators]
            self.computing[id(work)] = sum(self.sheet.seconds(one.cost, one.name) for one in operators)
        return self.computing[id(work)]

    def price(self, layout: Layout, bound: float | None = None) -> tuple[Plan, Result | None]:
        """What it costs. bound: seconds of a step that it must be able to beat."""
        plan = Plan(layout)
        try:
            recipe = self.checked(layout)
            program = self.program(recipe)
        except UserError as error:
            kind, _, _ = str(error).partition("=")
            plan.kind, plan.reason = f"the recipe's rules: {kind}", str(error)
            return plan, None
        least = self.least_memory(recipe, layout, program)
        if least is not None and least > self.sheet.memory_bytes:
            plan.kind = "memory: parameters, gradients and optimizer alone"
            plan.reason = (
                f"parameters, gradients and optimizer alone need {least / GIB:.1f} GiB of "
                f"{self.sheet.memory_bytes / GIB:.1f}; more ranks for experts or the pipeline would help"
            )
            return plan, None
        works = self.works(recipe, layout, program)
        if bound is not None and (alone := self.least_seconds(program, works)) > bound:
            plan.kind = "time: its busiest rank computes longer than the best plan takes"
            plan.reason = f"its busiest rank computes {alone:.2f} s, and the best plan takes {bound:.2f} s in all"
            return plan, None
        found = simulate(recipe, self.sheet, program, works)
        plan.seconds, plan.memory = found.step_seconds, _peak(found)
        plan.gpu_hours = found.gpu_hours_per_trillion_tokens
        if plan.memory > self.sheet.memory_bytes:
            plan.kind, plan.reason = "memory", too_much(found)
        return plan, found


def too_much(found: Result) -> str:
    """Why a priced plan does not fit."""
    rank, peak = max(enumerate(found.memory), key=lambda item: item[1].total)
    parts = sorted(peak.parts.items(), key=lambda item: -item[1])[:3]
    made = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return f"needs {peak.total / GIB:.1f} GiB of {found.sheet.memory_bytes / GIB:.1f} on pipeline rank {rank}: {made}"


def plan(
    recipe: Recipe, sheet: Sheet, precisions: Iterable[str] = (), gpus: int | None = None, quiet: bool = True
) -> Planning:
    """Search. precisions: those to choose from, the recipe's own unless given. gpus: at most so many, all unless given.

    The recipe's own layout is priced too, whether or not it has as many.
    """
    own = Layout.of(recipe)
    gpus = world_size(recipe, sheet, gpus)
    pricer = Pricer(recipe, sheet)
    results: dict[Layout, Result] = {}
    plans: dict[Layout, Plan] = {}
    best: float | None = None

    def priced(those: Iterable[Layout], stage: str) -> None:
        nonlocal best
        todo = [each for each in dict.fromkeys(those) if each not in plans]
        for layout in tqdm(todo, stage, disable=True if quiet else None, leave=False):
            plans[layout], found = pricer.price(layout, best)
            if found is not None:
                results[layout] = found
                if not plans[layout].kind and layout.gpus == gpus:
                    best = min(best or found.step_seconds, found.step_seconds)

    priced([own], "the recipe's own layout")
    own_plan, own_found = plans[own], results.get(own)
    chosen = sorted(layouts(recipe, gpus, list(precisions) or [recipe.precision]), key=lambda each: distance(each, own))
    priced(chosen, "layouts")
    ranked = sorted((each for each in results if each.gpus == gpus), key=lambda each: _seconds(plans, each))
    refined: Counter[bool] = Counter()
    for layout in ranked:
        fits = not plans[layout].kind
        slower = best is not None and _seconds(plans, layout) > best
        if refined[fits] == REFINED or (slower and not fits):
            continue  # not among the best of its sort, or slower than the best even if it fitted
        refined[fits] += 1
        others = variants(layout, min(sheet.node_size, gpus), fits)
        priced(others, "recomputation and dispatch")
        for other in others:
            saved = _saved(plans[layout], plans[other])
            if plans[layout].kind == "memory" and saved > 0:
                words = f"; recompute {'+'.join(other.recompute)} would save {saved / GIB:.1f}"
                if other.dispatch == layout.dispatch and "would save" not in plans[layout].reason:
                    plans[layout].reason += words
    front = _front([each for each in plans.values() if not each.kind and each.seconds is not None], gpus)
    winner = None
    while front:
        winner = results[front[0].layout]
        try:
            schedule.verify(winner.program)
            break
        except ProgramError as error:
            front[0].kind, front[0].reason, winner = "the program", str(error), None
            front = _front([each for each in plans.values() if not each.kind and each.seconds is not None], gpus)
    kept = {id(each) for each in front}
    rejected = [each for each in plans.values() if id(each) not in kept]
    for each in rejected:
        if not each.kind:
            each.kind, each.reason = _beaten(each, front, gpus)
    return Planning(recipe, sheet, gpus, front, rejected, own_found, winner, own_plan.reason)


def _front(fitting: list[Plan], gpus: int) -> list[Plan]:
    """Those that no other beats in both time and memory, fastest first."""
    found: list[Plan] = []
    same = [each for each in fitting if each.layout.gpus == gpus]
    for each in sorted(same, key=lambda plan: (plan.seconds, plan.memory, str(plan.layout))):
        if not found or (each.memory or 0) < (found[-1].memory or 0):
            found.append(each)
    return found


def _beaten(plan: Plan, front: list[Plan], gpus: int) -> tuple[str, str]:
    if plan.layout.gpus != gpus:
        return "another number of GPUs", f"uses {plan.layout.gpus:,} GPUs of {gpus:,}"
    better = next(e for e in front if (e.seconds or 0) <= (plan.seconds or 0) and (e.memory or 0) <= (plan.memory or 0))
    slower = (plan.seconds or 0) - (better.seconds or 0)
    more = (plan.memory or 0) - (better.memory or 0)
    return "beaten in time and memory", f"{slower:.2f} s slower, {more / GIB:.1f} GiB more than: {better.layout}"


# ---------------------------------------------------------------- telling
def explain(found: Planning) -> str:
    """One paragraph: what the winner gains where against the recipe's own layout, or that nothing is better."""
    own, winner, sheet = found.own, found.winner, found.sheet
    if winner is None:
        fewest = min((p for p in found.rejected if p.memory), key=lambda p: p.memory or 0, default=None)
        nearest = f" The nearest: {fewest.layout}; it {fewest.reason}." if fewest else ""
        return f"No plan of {found.gpus:,} GPUs fits into {sheet.memory_bytes / GIB:.1f} GiB.{nearest}"
    chosen = Layout.of(winner.recipe)
    if own is None:
        return (
            f"{chosen} takes {winner.step_seconds:.3f} s a step. The recipe's own layout has no price here: "
            f"{found.own_reason}"
        )
    mine = Layout.of(own.recipe)
    own_fits = _peak(own) <= sheet.memory_bytes
    if not found.better:
        if mine != chosen and mine.gpus != found.gpus:
            return (
                f"The best plan of {found.gpus:,} GPUs, {chosen}, takes {winner.step_seconds:.3f} s a step; the "
                f"recipe's own layout of {mine.gpus:,}, {mine}, takes {own.step_seconds:.3f} s and needs fewer "
                f"GPU-hours: {own.gpu_hours_per_trillion_tokens / 1e3:.1f} K for 1 T tokens, not "
                f"{winner.gpu_hours_per_trillion_tokens / 1e3:.1f} K. gpus={mine.gpus} plans for that many."
            )
        second = next((p for p in found.front if p.layout != mine), None)
        other = f" The next on the front, {second.layout}, takes {second.seconds:.3f} s." if second else ""
        return (
            f"Nothing is better than the recipe's own layout, {mine}: {own.step_seconds:.3f} s a step and "
            f"{_peak(own) / GIB:.1f} GiB.{other}"
        )
    before, after = parts(own), parts(winner)
    gains = sorted(after, key=lambda name: after[name] - before[name])
    changes = ", ".join(f"{n} {after[n] - before[n]:+.3f} s ({before[n]:.3f} -> {after[n]:.3f})" for n in gains)
    hours, old = winner.gpu_hours_per_trillion_tokens, own.gpu_hours_per_trillion_tokens
    memory = _peak(winner) - _peak(own)
    where = sorted(
        ((name, size - _largest(own).parts.get(name, 0.0)) for name, size in _largest(winner).parts.items()),
        key=lambda item: -abs(item[1]),
    )[:3]
    again = "recomputation is the same"
    if chosen.recompute != mine.recompute:
        again = (
            f"it recomputes {'+'.join(chosen.recompute) or 'nothing'} instead of "
            f"{'+'.join(mine.recompute) or 'nothing'}, which is part of computing"
        )
    return (
        f"{chosen} takes {winner.step_seconds:.3f} s a step, the recipe's own {mine} {own.step_seconds:.3f} s"
        f"{'' if own_fits else ' and does not fit'}: {(hours / old - 1):+.1%} GPU-hours "
        f"({hours / 1e3:.1f} K for 1 T tokens, was {old / 1e3:.1f} K). Seconds of a rank: {changes}; {again}. "
        f"Its fullest rank holds "
        f"{_peak(winner) / GIB:.1f} GiB, {memory / GIB:+.1f}: "
        + ", ".join(f"{name} {size / GIB:+.1f}" for name, size in where)
        + "."
    )


def parts(found: Result) -> dict[str, float]:
    """The step in four: a rank computes, waits for exchanges, waits for others, and for what follows the pipeline."""
    return {
        "computing": fmean(sum(slot.race.compute for slot in row) for row in found.timeline.ranks),
        "communication in the open": found.exposed_comm,
        "bubble": found.breakdown["bubble"],
        "end of the step": found.breakdown["optimizer"] + found.breakdown["checkpoint"],
    }


def text(found: Planning, top: int = 12) -> str:
    """The front as a table, the explanation, and why the others were rejected."""
    sheet = found.sheet
    lines = [f"{sheet.name}: plans for {found.gpus:,} of {sheet.gpus:,} GPUs", ""]
    own = Layout.of(found.recipe)
    rows = [("step", "peak", "GPU-hours/T", "money/T", "plan")]
    for each in found.front:
        hours = each.gpu_hours or 0.0
        rows.append(
            (
                f"{each.seconds:.3f} s",
                f"{(each.memory or 0) / GIB:.1f} GiB",
                f"{hours / 1e3:.1f} K",
                f"{hours * sheet.price_per_hour / 1e3:,.0f} K",
                f"{each.layout}{' (the recipe)' if each.layout == own else ''}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  ".join(cell.rjust(width) for cell, width in zip(r[:-1], widths, strict=False)) + f"  {r[-1]}" for r in rows
    ]
    lines += ["", explain(found), "", f"rejected: {len(found.rejected):,}"]
    for kind, count in Counter(each.kind for each in found.rejected).most_common():
        lines.append(f"{count:>7,}  {kind}")
    nearest = sorted((e for e in found.rejected if e.seconds), key=lambda e: (e.seconds or 0, str(e.layout)))[:top]
    if nearest:
        lines += ["", "the fastest of them:"]
        lines += [f"  {each.seconds:.3f} s  {each.layout}: {each.reason}" for each in nearest]
    return "\n".join(lines)


# ---------------------------------------------------------------- small things
def _largest(found: Result) -> Any:
    return max(found.memory, key=lambda peak: peak.total)


def _peak(found: Result) -> float:
    return float(_largest(found).total)


def _seconds(plans: dict[Layout, Plan], layout: Layout) -> float:
    return plans[layout].seconds or 0.0


def _saved(plan: Plan, other: Plan) -> float:
    return (plan.memory or 0.0) - other.memory if other.memory else 0.0


def _mesh(recipe: Recipe) -> Mesh:
    p = recipe.parallel
    return Mesh(p.pipeline, p.data, p.context, p.expert, rank=0, node_size=p.node_size or p.world_size)
