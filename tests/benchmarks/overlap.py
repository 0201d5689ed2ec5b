"""What overlapping pays, over a link that is slow but takes no CPU: `python -m tests.benchmarks.overlap`.

Two processes, one pinned core each, run DualPipe with P=2 and N=48 on MoE layers like recipe `tiny`'s. All experts are
here, but every dispatch and combine takes as long as a link would that carries to an expert group what it sends, one
communication at a time; its bandwidth follows from the compute of the step before each pair. In the serial order `F&B`
is `B` then `F`, and every communication is waited for when it is posted. A model of the executor (its own `merge`, with
measured durations and a clock for which nobody waits) tells what the program allows, and larger P and N. Last, what is
gained by summing gradients as early as `R` says.
"""

import argparse
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

# Before torch is imported, and inherited by the workers: threads that spin would time each other.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.experts import LocalExperts, Tag
from parallel.passes import Comm, Pass, merge
from parallel.schedule import Program, build, verify
from parallel.schedule.program import Message, makes, needs, passes
from parallel.trace import Trace
from tests.workers import Pool
from train.compose import compose
from train.engine import Engine
from train.recipe import Recipe

EXPERT_RANKS = 8  # the expert group whose traffic the link carries: 7 of 8 rows leave a rank
SHARE = 0.8  # communication of a step over its compute
LATENCY = 100e-6

MODEL = (
    "precision=bf16",
    "train.sequence_length=128",
    "model.num_hidden_layers=4",
    "model.first_k_dense_replace=0",
    "model.num_nextn_predict_layers=0",
    "model.vocab_size=1024",
)


def recipe_of(microbatches: int, *overrides: str) -> Recipe:
    """Recipe `tiny` as one pipeline, one sequence a micro-batch, with MoE layers only and no MTP."""
    layout = ("parallel.pipeline=2", "parallel.data=1", "parallel.expert=1", f"train.batch.start={microbatches}")
    return compose(["recipe=tiny", *layout, *MODEL, *overrides])


# ---------------------------------------------------------------- the link
@dataclass
class Link:
    """Carries one communication at a time, in the order in which they are posted, and takes no CPU.

    seconds_per_byte: 0 while it is free of charge. serial: `post` stands still until the communication has arrived.
    """

    seconds_per_byte: float = 0.0
    serial: bool = False
    busy_until: float = 0.0
    posted: float = 0.0  # seconds that the link has carried

    def post(self, size: int) -> "Carried":
        now, takes = time.perf_counter(), (LATENCY + size * self.seconds_per_byte) * (self.seconds_per_byte > 0)
        self.busy_until = max(now, self.busy_until) + takes
        self.posted += takes
        carried = Carried(self.busy_until)
        if self.serial:
            carried.wait()
        return carried


@dataclass(frozen=True)
class Carried:
    """A communication on the link."""

    arrives: float

    def wait(self) -> None:
        left = self.arrives - time.perf_counter()
        if left > 0:
            time.sleep(left)


class FarExperts(LocalExperts):
    """All experts are here, but their rows take the time of a link: T tokens, K rows each, of D values in 16 bits."""

    def __init__(self, recipe: Recipe, link: Link) -> None:
        super().__init__(recipe.model.n_routed_experts)
        rows = recipe.train.sequence_length * recipe.model.num_experts_per_tok
        self.link, self.row_bytes = link, 2 * recipe.model.hidden_size
        self.leaving = rows * (EXPERT_RANKS - 1) // EXPERT_RANKS

    def _turn(self, tag: Tag) -> Comm:
        routing = 4 if tag.operation.startswith("dispatch") else 0  # a weight, or its gradient, travels with the row
        size = self.leaving * (self.row_bytes + routing)
        return Comm(tag.operation, self.link.post(size), size, 0, None)


# ---------------------------------------------------------------- what the run says about itself
Key = tuple[str, int, str]  # "F" | "B" | "W", stage, the communication that ends the turn ("" for none)


class Turns(Trace):
    """Takes the CPU time of each turn of each pass, weight gradients apart, and the waits by kind of instruction.

    CPU time is what a turn takes on a core of its own, whatever else the machine has to do.
    """

    def __init__(self) -> None:
        self.link = Link()
        self.clear()

    def clear(self) -> None:
        """Forget."""
        self.turns: dict[Key, list[float]] = defaultdict(list)
        self.compute, self.size, self.count, self.link.posted = 0.0, 0, 0, 0.0
        self.posted: dict[str, float] = defaultdict(float)  # by "FB", "F", "B", "I": seconds on the link
        self.waited: dict[str, float] = defaultdict(float)  # and of standing still for it
        self.inside, self.weights, self.mark = "", 0.0, 0.0
        self.stages: dict[str, int] = {}

    @contextmanager
    def span(self, lane: str, name: str, **details: Any) -> Iterator[None]:
        start = time.thread_time()
        if lane == "instruction":
            kind, *numbers = re.findall(r"\w+", name)
            halves = passes((kind, *map(int, numbers)))
            self.inside, self.mark, self.weights = kind, start, 0.0
            self.stages = {"F" if half == "F" else "B": stage for half, stage, _ in halves}
            carried = self.link.posted
        yield
        took = time.thread_time() - start
        if lane == "instruction":
            self._turn("")
            self.posted[kind] += self.link.posted - carried
            self.compute += took
            self.inside = ""
        elif name == "weights.W":
            self.weights += took
            if not self.inside:
                self.compute += took
                self.turns["W", self.stages["B"], ""].append(took)

    def post(self, lane: str, name: str, work: Any, size: int) -> None:
        if lane == "experts":
            self.size, self.count = self.size + size, self.count + 1
            self._turn(name)

    def wait(self, lane: str, name: str, work: Any) -> None:
        start = time.perf_counter()
        super().wait(lane, name, work)
        self.mark = time.thread_time()
        if lane == "experts":
            self.waited[self.inside] += time.perf_counter() - start

    def _turn(self, name: str) -> None:
        now = time.thread_time()
        solo = len(self.stages) == 1
        if name or solo:
            way = "B" if name.endswith(".B") or (not name and "B" in self.stages) else "F"
            if self.inside != "W":
                self.turns[way, self.stages[way], name].append(now - self.mark - self.weights)
            if name.endswith(".B") and self.inside != "I":
                self.turns["W", self.stages[way], name].append(self.weights)
        self.mark, self.weights = now, 0.0


# ---------------------------------------------------------------- the executor without work: a model of it
@dataclass
class Clock:
    """A rank of the model: its time, its link's, and the weight gradients that it has yet to run."""

    carries: float
    serial: bool
    now: float = 0.0
    busy_until: float = 0.0
    left: float = 0.0
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    inside: str = ""

    def post(self, name: str) -> Comm:
        self.busy_until = max(self.now, self.busy_until) + self.carries
        work = Arrives(self, self.busy_until)
        if self.serial:
            work.wait()
        return Comm(name, work, 0, 0, None)


@dataclass(frozen=True)
class Arrives:
    clock: Clock
    at: float

    def wait(self) -> None:
        self.clock.waited[self.clock.inside] += max(0.0, self.at - self.clock.now)
        self.clock.now = max(self.clock.now, self.at)


@dataclass(frozen=True)
class Costs:
    """Mean seconds of the turns of a pass through each stage of `layers` MoE layers, and of one communication."""

    turns: Mapping[Key, float]
    layers: int
    carries: float

    def of(self, way: str, stage: int, name: str) -> float:
        return self.turns.get((way, stage, name), 0.0)

    def every_stage_alike(self, stages: int) -> "Costs":
        """The mean stage, `stages` times."""
        means: dict[tuple[str, str], list[float]] = defaultdict(list)
        for (way, _, name), value in self.turns.items():
            means[way, name].append(value)
        found = {(way, s, name): statistics.fmean(v) for (way, name), v in means.items() for s in range(stages)}
        return replace(self, turns=found)

    def forward(self, stage: int, clock: Clock) -> Pass:
        for _ in range(self.layers):
            for name in ("dispatch", "combine"):
                clock.now += self.of("F", stage, name)
                yield clock.post(name)
        clock.now += self.of("F", stage, "")

    def backward(self, stage: int, clock: Clock, split: bool) -> Pass:
        for _ in range(self.layers):
            for name in ("combine.B", "dispatch.B"):
                clock.now += self.of("B", stage, name)
                comm = clock.post(name)
                clock.now += 0 if split else self.of("W", stage, name)
                yield comm
        clock.now += self.of("B", stage, "")
        clock.left += 0 if split else self.of("W", stage, "")

    def weights(self, stage: int) -> float:
        each = self.of("W", stage, "combine.B") + self.of("W", stage, "dispatch.B")
        return self.layers * each + self.of("W", stage, "")


def model(program: Program, costs: Costs, *, serial: bool = False, perfect: bool = False) -> tuple[float, list[Clock]]:
    """Seconds of a step, and the ranks at its end. perfect: an `F&B` takes as long as its longer lane, no more."""
    clocks = [Clock(costs.carries, serial) for _ in program.program]
    arrives: dict[Message, float] = {}
    todo = [list(instructions) for instructions in program.program]
    while any(todo):
        for clock, mine in zip(clocks, todo, strict=True):
            while mine and all(message in arrives for message in needs(program, mine[0])):
                ins = mine.pop(0)
                clock.now, clock.left, clock.inside = clock.now + clock.left, 0.0, ins[0]
                clock.now = max([clock.now, *(arrives[message] for message in needs(program, ins))])
                _run(ins, costs, clock, perfect)
                arrives |= dict.fromkeys(makes(program, ins), clock.now)
    return max(clock.now + clock.left for clock in clocks), clocks


def _run(ins: tuple[Any, ...], costs: Costs, clock: Clock, perfect: bool) -> None:
    if ins[0] == "W":
        clock.now += costs.weights(ins[1])
        return
    start, before = clock.now, clock.waited["FB"]
    running = [
        costs.forward(stage, clock) if kind == "F" else costs.backward(stage, clock, kind == "I")
        for kind, stage, _ in passes(ins)[::-1]
    ]
    merge(*running)
    if perfect and ins[0] == "FB":
        stood = clock.waited["FB"] - before
        lanes = clock.now - start - stood, 4 * costs.layers * costs.carries
        clock.now, clock.waited["FB"] = start + max(lanes), before + max(0.0, lanes[1] - lanes[0])
        clock.busy_until = clock.now


# ---------------------------------------------------------------- the run, on every rank
def serial_order(program: Program) -> Program:
    """The same program with every pair taken apart: B, then F."""
    rows = tuple(tuple(half for ins in row for half in passes(ins)[::-1]) for row in program.program)
    apart = replace(program, program=rows)
    verify(apart)
    return apart


def pin() -> None:
    """This process, gloo's threads included, stays on one core."""
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), {dist.get_rank() % (os.cpu_count() or 1)})


class FarEngine(Engine):
    """An engine whose experts are far away."""

    def __init__(self, recipe: Recipe, link: Link, trace: Trace) -> None:
        self.link = link
        super().__init__(recipe, torch.device("cpu"), trace)

    def _dispatcher(self) -> FarExperts:
        return FarExperts(self.recipe, self.link)


class Run:
    """An engine over a link, and one batch for all steps."""

    def __init__(self, recipe: Recipe) -> None:
        self.turns, self.size = Turns(), recipe.train.batch.start
        self.link = self.turns.link
        self.engine = FarEngine(recipe, self.link, self.turns)
        self.program = self.engine.program(self.size)
        self.engine.pipeline.reduce = _later
        shape = (self.size, recipe.train.sequence_length + 1)
        rows = torch.randint(recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self.tokens = {mb: rows[list(ids)] for mb, ids in self.engine.sequences(self.size).items()}

    def step(self, program: Program, *, serial: bool = False, reduce: bool = False) -> float:
        """Seconds of forward and backward (and with `reduce`, of the sums of gradients) until all ranks have ended."""
        self.link.serial = serial
        self.engine.program = lambda batch: program  # type: ignore[assignment]
        self.engine.optimizer.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        self.engine.forward_backward(self.tokens, self.size, mtp_weight=0.0)
        if reduce:
            self.engine.optimizer.reduce_gradients()
        dist.barrier()
        return time.perf_counter() - start

    def measured(self, steps: int) -> Turns:
        """What `steps` steps of the program say about themselves; the record starts anew."""
        self.turns.clear()
        for _ in range(steps):
            self.step(self.program)
        return self.turns

    def set_link(self, steps: int) -> float:
        """Measure the compute of a step, and let its communication take `SHARE` of it; returns that compute."""
        self.link.seconds_per_byte = 0.0
        free = self.measured(steps)
        sums = torch.tensor([free.compute, free.size, free.count], dtype=torch.float64)
        dist.all_reduce(sums)
        compute, size, count = (sums / steps / dist.get_world_size()).tolist()
        self.link.seconds_per_byte = (SHARE * compute - count * LATENCY) / size
        return compute

    def costs(self) -> Costs:
        """Mean durations of what was recorded last, over the ranks."""
        mine = {key: (sum(times), len(times)) for key, times in self.turns.turns.items()}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        keys = {key for each in everyone for key in each}
        found = {
            key: sum(each[key][0] for each in everyone if key in each)
            / sum(each[key][1] for each in everyone if key in each)
            for key in keys
        }
        layers = self.engine.recipe.model.num_hidden_layers // self.program.stages
        return Costs(found, layers, self.turns.link.posted / self.turns.count)


def dualpipe(microbatches: int, pairs: int, overrides: list[str]) -> dict[str, Any]:
    """The overlapped step beside the serial one, and what the model makes of it."""
    pin()
    run = Run(recipe_of(microbatches, *overrides))
    apart = serial_order(run.program)
    for program in (run.program, apart):
        run.step(program)
    run.set_link(1)
    run.step(apart, serial=True)
    times: dict[str, list[float]] = {"overlapped": [], "serial": []}
    for pair in range(pairs):
        free = run.set_link(1)  # each time, for a machine with other work to do changes its speed
        for order in sorted(times, reverse=pair % 2 == 1):
            times[order].append(run.step(apart if order == "serial" else run.program, serial=order == "serial"))
    seen = run.measured(3)
    return {
        **times,
        "free": free,
        "compute": seen.compute / 3,
        "posted": {kind: seconds / 3 for kind, seconds in seen.posted.items()},
        "waited": {kind: seconds / 3 for kind, seconds in seen.waited.items()},
        "costs": run.costs(),
        "program": run.program,
    }


def _later(stage: int) -> None:
    """What `R` is told where gradients are reduced after the step."""


class SlowSums:
    """Inside, `dist.reduce_scatter_tensor` also takes the time of a link."""

    def __init__(self, link: Link) -> None:
        self.link, self.real = link, dist.reduce_scatter_tensor

    def __enter__(self) -> None:
        dist.reduce_scatter_tensor = self.post  # type: ignore[assignment]

    def __exit__(self, *exception: object) -> None:
        dist.reduce_scatter_tensor = self.real

    def post(self, output: Tensor, whole: Tensor, **options: Any) -> "SlowSum":
        return SlowSum(self.real(output, whole, **options), self.link.post(whole.nbytes))


@dataclass(frozen=True)
class SlowSum:
    work: Any
    carried: Carried

    def wait(self) -> None:
        self.work.wait()
        self.carried.wait()


def reduction(layout: list[str], microbatches: int, pairs: int, share: float) -> dict[str, Any]:
    """Steps whose gradients are summed as early as the program says, beside all of them at the end."""
    pin()
    run = Run(recipe_of(microbatches, *layout))
    run.step(run.program, reduce=True)
    compute = run.set_link(2)
    run.link.seconds_per_byte = 0.0
    size = sum(gradients.nbytes for gradients in run.engine.optimizer.fp32_groups_gradients_flat)
    slow = Link(seconds_per_byte=share * compute / size)
    found: dict[str, Any] = {"early": [], "late": [], "compute": compute}
    with SlowSums(slow):
        for pair in range(pairs):
            for when in sorted(("early", "late"), reverse=pair % 2 == 1):
                run.engine.pipeline.reduce = run.engine.optimizer.reduce_stage if when == "early" else _later
                found[when].append(run.step(run.program, reduce=True))
    return found


# ---------------------------------------------------------------- tables
def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def report_dualpipe(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]
    ratios = [a / b for a, b in zip(first["overlapped"], first["serial"], strict=True)]
    costs, program = first["costs"], first["program"]
    one, apart, best = (
        model(program, costs)[0],
        model(serial_order(program), costs, serial=True)[0],
        model(program, costs, perfect=True)[0],
    )
    overlapped, serial = statistics.median(first["overlapped"]), statistics.median(first["serial"])
    print(f"overlapped / serial: {spread(ratios)}\n")
    print("| | measured | model | two full lanes |\n|---|---|---|---|")
    print(f"| overlapped step | {overlapped:.3f} s | {one:.3f} s | {best:.3f} s |")
    print(f"| serial step | {serial:.3f} s | {apart:.3f} s | |")
    print(f"| ratio | {overlapped / serial:.3f} | {one / apart:.3f} | {best / apart:.3f} |\n")
    print("| communication | posted | stood still | exposed |\n|---|---|---|---|")
    for kind in ("FB", "F", "B", "I"):
        posted, waited = (sum(rank[what].get(kind, 0.0) for rank in ranks) for what in ("posted", "waited"))
        print(f"| in {kind} | {posted:.3f} s | {waited:.3f} s | {waited / posted if posted else 0:.1%} |")
    posted, waited = (sum(sum(rank[what].values()) for rank in ranks) for what in ("posted", "waited"))
    ideal = sum(sum(clock.waited.values()) for clock in model(program, costs, perfect=True)[1])
    print(f"| in all | {posted:.3f} s | {waited:.3f} s | {waited / posted:.1%}; ideal {ideal / posted:.1%} |")
    compute = statistics.fmean(rank["compute"] for rank in ranks)
    free = f"{compute:.3f} s a rank; with the link free of charge {first['free']:.3f} s"
    print(f"\ncommunication / compute: {posted / len(ranks) / compute:.2f} (compute {free})")
    print(
        "\nmean turns, ms: "
        + ", ".join(f"{'/'.join(map(str, k))} {1e3 * v:.2f}" for k, v in sorted(costs.turns.items()))
    )
    print(f"one communication: {1e3 * costs.carries:.2f} ms")


def report_larger(costs: Costs) -> None:
    """The model of other sizes, from this run's mean stage."""
    print("\nother sizes, by the model\n")
    print(
        "| P | N | overlapped / serial | two full lanes / serial | exposed, in F&B | in all |\n"
        "|---|---|---|---|---|---|"
    )
    for ranks, microbatches in ((2, 8), (2, 48), (4, 16), (4, 64), (8, 32), (8, 128), (16, 64), (16, 120), (16, 480)):
        program = build("dualpipe", ranks, microbatches)
        each = costs.every_stage_alike(program.stages)
        one, clocks = model(program, each)
        apart, _ = model(serial_order(program), each, serial=True)
        best, _ = model(program, each, perfect=True)
        both_ways = 4 * each.layers * each.carries  # of a micro-batch through a stage
        pairs = sum(ins[0] == "FB" for row in program.program for ins in row)
        in_pairs = sum(clock.waited["FB"] for clock in clocks) / (both_ways * pairs)
        in_all = sum(sum(clock.waited.values()) for clock in clocks) / (both_ways * program.stages * microbatches)
        cells = [f"{one / apart:.3f}", f"{best / apart:.3f}", f"{in_pairs:.1%}", f"{in_all:.1%}"]
        print(f"| {ranks} | {microbatches} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="what overlapping communication with compute pays")
    parser.add_argument("--microbatches", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=15, help="alternating pairs behind the ratio")
    parser.add_argument("--only", choices=("dualpipe", "reduction"))
    parser.add_argument("overrides", nargs="*", help="of recipe tiny")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if options.only != "reduction":
        pool = Pool(2)
        ranks = pool.run(dualpipe, options.microbatches, options.pairs, options.overrides, timeout=1200)
        pool.close()
        report_dualpipe(ranks)
        report_larger(ranks[0]["costs"])
    if options.only != "dualpipe":
        print("\ngradients summed early, by R, over all at the end (sums take 0.2 of the compute)\n")
        print("| layout | ratio of step times | early | late |\n|---|---|---|---|")
        for name, processes, layout in REDUCTIONS:
            pool = Pool(processes)
            [found, *_] = pool.run(reduction, layout, 16, options.pairs, 0.2, timeout=1200)
            pool.close()
            ratios = [a / b for a, b in zip(found["early"], found["late"], strict=True)]
            early, late = (statistics.median(found[when]) for when in ("early", "late"))
            print(f"| {name} | {spread(ratios)} | {early:.3f} s | {late:.3f} s |", flush=True)


REDUCTIONS = (
    ("dualpipe, P=2", 2, ["parallel.schedule=dualpipe"]),
    ("interleaved, P=2, two pipelines", 4, ["parallel.schedule=interleaved", "parallel.data=2"]),
)


if __name__ == "__main__":
    main()
