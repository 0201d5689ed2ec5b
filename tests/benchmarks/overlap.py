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
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

# Before torch is imported, and inherited by the workers: threads that spin would time each other.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.schedule import Program, build, verify
from parallel.schedule.program import passes
from parallel.trace import Trace
from tests.benchmarks.executor_model import Costs, model
from tests.benchmarks.slow_link import LATENCY, Carried, FarExperts, Link
from tests.benchmarks.turns import Turns
from tests.workers import Pool
from train.compose import compose
from train.engine import Engine
from train.recipe import Recipe

SHARE = 0.8  # communication of a step over its compute

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
