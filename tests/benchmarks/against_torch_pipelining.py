"""The pipeline beside PyTorch's own: `python -m tests.benchmarks.against_torch_pipelining`.

Four gloo processes of one thread each hold the same transformer blocks (no experts, no embedding) from the same weights
and run the same schedule on the same micro-batches under weft's executor and under `torch.distributed.pipelining`;
gradients must agree before anything is timed. Whole steps alternate, and the median of the pairs' ratios counts, for a
machine with other work to do slows both of a pair alike. Then stages of next to no work, one linear each: the CPU time
of a pass on the host, and what of it is the stages' own. weft splits backward by linears of its own, which are slower
to call than torch's; a schedule that splits nothing (`1f1b`) has torch's on both sides.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import truediv
from typing import Any, cast

# Before torch is imported, and inherited by the workers: threads that spin would time each other.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn import functional as F

from kernels.linear import Numerics, attach_main_grads, linear
from parallel.mesh import Mesh
from parallel.passes import Local, Microbatch, Segment
from parallel.pipeline import Pipeline
from parallel.schedule import Program, build
from parallel.schedule.program import passes
from tests.workers import Pool

THEIRS = {
    "1f1b": pipelining.Schedule1F1B,
    "zbv": pipelining.ScheduleZBVZeroBubble,
    "dualpipev": pipelining.ScheduleDualPipeV,
}
CPU = torch.device("cpu")
MANY = 64  # micro-batches of a step whose host time is taken


@dataclass(frozen=True)
class Size:
    """What is computed: blocks are shared out over the stages, so that every schedule does the same work."""

    blocks: int = 8
    width: int = 256
    tokens: int = 256
    microbatches: int = 16


# ---------------------------------------------------------------- what both compute
class Block(nn.Module):
    """Attention and a feed-forward network; `times(linear, x)` multiplies, in weft's way or in torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, times: Callable[[nn.Linear, Tensor], Tensor]) -> Tensor:
        width = x.shape[-1:]
        q, k, v = times(self.qkv, F.layer_norm(x, width)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + times(self.out, mixed.transpose(1, 2).flatten(2))
        return x + times(self.down, F.gelu(times(self.up, F.layer_norm(x, width))))


class Thin(nn.Module):
    """Next to no work: what is left is the host's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.only = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, times: Callable[[nn.Linear, Tensor], Tensor]) -> Tensor:
        return times(self.only, x)


def blocks(make: Callable[[int], nn.Module], size: Size, stages: int, stage: int) -> list[nn.Module]:
    """Those of one stage; a block's weights follow from its number in the whole model."""
    each = size.blocks // stages
    made = []
    for number in range(stage * each, (stage + 1) * each):
        torch.manual_seed(number)
        made.append(make(size.width))
    return made


# ---------------------------------------------------------------- the two sides
class WeftStage(nn.Module):
    """A segment for each block, as a layer has one; the last of all also scores."""

    def __init__(self, made: list[nn.Module], numerics: Numerics, program: Program, index: int) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == program.stages - 1
        self.blocks = nn.ModuleList(made)
        self.numerics = numerics
        self.splits = any(ins[0] == "W" for row in program.program for ins in row)
        self.segments: list[Segment] = []
        for layer, block in enumerate(made):
            reads = () if self.is_first and layer == 0 else ("hidden",)
            ends = self.is_last and layer == len(made) - 1
            names: tuple[tuple[str, ...], ...] = ((), ("loss",)) if ends else (("hidden",), ())
            self.segments.append(Local("block", layer, partial(self._run, block, ends), reads, *names))

    def _run(self, block: nn.Module, scores: bool, batch: Microbatch, *hidden: Tensor) -> tuple[Tensor]:
        assert batch.tokens is not None
        y = block(*(hidden or batch.tokens[:1]), self._times)
        return (F.mse_loss(y, batch.tokens[1]) if scores else y,)

    def _times(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if not self.splits:
            return layer(x)
        return linear(x, [cast(nn.Parameter, layer.weight)], self.numerics)[0]


class Weft:
    """weft's side of a comparison: a step of `program` with gradients in `main_grad`."""

    def __init__(self, mesh: Mesh, program: Program, make: Callable[[int], nn.Module], size: Size) -> None:
        numerics = Numerics("fp32")
        self.program, self.size = program, size
        held = program.placement[mesh.pipeline_rank]
        self.stages = {s: WeftStage(blocks(make, size, program.stages, s), numerics, program, s) for s in held}
        for stage in self.stages.values():
            attach_main_grads(stage, numerics.main_grad_dtype)
        self.parameters: list[Any] = [p for stage in self.stages.values() for p in stage.parameters()]
        stages: Mapping[int, Any] = self.stages
        self.pipeline = Pipeline(mesh, stages, numerics.weight_grads, numerics.dtype, CPU)

    def step(self, x: Tensor, target: Tensor) -> None:
        """x, target: [micro-batches, T, D]."""
        for parameter in self.parameters:
            parameter.main_grad.zero_()
        seeds = {"loss": 1 / len(x)}
        pairs = torch.stack([x, target], 1).unsqueeze(2)
        shape = (1, *x.shape[1:])
        self.pipeline.step(self.program, {mb: Microbatch(mb, pair, shape, seeds) for mb, pair in enumerate(pairs)})

    def gradients(self) -> list[Tensor]:
        return [parameter.main_grad for parameter in self.parameters]

    def alone(self, x: Tensor) -> None:
        """The arithmetic of the stages held here, with no pipeline around it."""
        for stage in self.stages.values():
            alone(stage.blocks, stage._times, x)
            self.pipeline.weights.run()


class TorchStage(nn.Module):
    def __init__(self, made: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, nn.Linear.__call__)
        return x


class Torch:
    """The other side: the same stages under torch's schedule, with gradients in `grad`."""

    def __init__(self, mesh: Mesh, program: Program, name: str, make: Callable[[int], nn.Module], size: Size) -> None:
        self.held, count = program.placement[mesh.pipeline_rank], program.stages
        self.modules = [TorchStage(blocks(make, size, count, s)) for s in self.held]
        self.parameters = [p for module in self.modules for p in module.parameters()]
        self.first, self.last = 0 in self.held, count - 1 in self.held
        stages = [pipelining.PipelineStage(m, s, count, CPU) for s, m in zip(self.held, self.modules, strict=True)]
        loss = partial(_mean_over, size.microbatches)
        whole = stages if len(stages) > 1 else stages[0]
        self.schedule: Any = THEIRS[name](whole, size.microbatches, loss_fn=loss, scale_grads=False)

    def step(self, x: Tensor, target: Tensor) -> None:
        """x, target: [micro-batches, T, D]."""
        for parameter in self.parameters:
            parameter.grad = None
        inputs = (x,) if self.first else ()
        scored = {"target": target, "losses": []} if self.last else {}
        self.schedule.step(*inputs, **scored, return_outputs=False)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def alone(self, x: Tensor) -> None:
        """As weft's."""
        for module in self.modules:
            alone(module.blocks, nn.Linear.__call__, x)


def alone(made: Any, times: Callable[[nn.Linear, Tensor], Tensor], x: Tensor) -> None:
    """Forward and backward of each micro-batch."""
    for row in x.split(1):
        y = row.detach().requires_grad_()
        for block in made:
            y = block(y, times)
        y.backward(torch.ones_like(y))


def _mean_over(microbatches: int, hidden: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(hidden, target) / microbatches


# ---------------------------------------------------------------- measuring, on every rank
def inputs(size: Size) -> tuple[Tensor, Tensor]:
    """What goes in and what should come out: [micro-batches, T, D] each."""
    torch.manual_seed(-1)
    x, target = torch.randn(2, size.microbatches, size.tokens, size.width)
    return x, target


def sides(name: str, make: Callable[[int], nn.Module], size: Size) -> tuple[Program, dict[str, Any]]:
    """The program, and both sides, which have been shown to give the same gradients."""
    ranks = dist.get_world_size()
    mesh = Mesh(ranks, 1, 1, 1, rank=dist.get_rank(), node_size=ranks)
    mesh.connect()
    program = build(name, ranks, size.microbatches)
    weft, theirs = Weft(mesh, program, make, size), Torch(mesh, program, name, make, size)
    for side in (weft, theirs):
        side.step(*inputs(size))
    for ours, other in zip(weft.gradients(), theirs.gradients(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
    return program, {"weft": weft, "torch": theirs}


def step_times(name: str, size: Size, pairs: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of alternating steps, and this process's CPU seconds; the order within a pair alternates too."""
    _, both = sides(name, Block, size)
    x, target = inputs(size)
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in both}
    for side in both.values():
        side.step(x, target)
    for pair in range(pairs):
        for side in sorted(both, reverse=pair % 2 == 1):
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            both[side].step(x, target)
            cpu = time.process_time() - cpu
            dist.barrier()
            found[side].append((time.perf_counter() - start, cpu))
    return found


def host_times(name: str, rounds: int) -> dict[str, tuple[float, ...]]:
    """For each side the CPU seconds of one pass: of the main thread, of all threads, of the stages by themselves."""
    stages = build(name, dist.get_world_size(), MANY).stages
    program, pair = sides(name, Thin, Size(stages, 8, 1, MANY))
    count = sum(len(passes(ins)) for ins in program.program[dist.get_rank()])
    x, target = inputs(Size(stages, 8, 1, MANY))
    found: dict[str, list[tuple[float, ...]]] = {side: [] for side in pair}
    for _ in range(rounds):
        for name, side in pair.items():
            dist.barrier()
            main, whole = time.thread_time(), time.process_time()
            side.step(x, target)
            main, whole, start = time.thread_time() - main, time.process_time() - whole, time.thread_time()
            side.alone(x)
            found[name].append((main / count, whole / count, (time.thread_time() - start) / count))
    return {side: tuple(map(statistics.median, zip(*each, strict=True))) for side, each in found.items()}


# ---------------------------------------------------------------- tables
def compare_steps(pool: Pool, names: list[str], size: Size, pairs: int) -> None:
    print("| schedule | ratio of step times (middle half) | weft | torch | ratio of CPU times |\n|---|---|---|---|---|")
    for name in names:
        found = pool.run(step_times, name, size, pairs, timeout=1200)
        steps = {side: [one for one, _ in found[0][side]] for side in ("weft", "torch")}
        cpus = {
            side: [sum(cpu for _, cpu in ranks) for ranks in zip(*(one[side] for one in found), strict=True)]
            for side in steps
        }
        low, middle, high = statistics.quantiles(map(truediv, steps["weft"], steps["torch"]), n=4)
        ours, other = (1e3 * statistics.median(steps[side]) for side in steps)
        cpu = statistics.median(map(truediv, cpus["weft"], cpus["torch"]))
        print(
            f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) | {ours:.0f} ms | {other:.0f} ms | {cpu:.3f} |",
            flush=True,
        )


def compare_hosts(pool: Pool, names: list[str], rounds: int) -> None:
    print(
        "| schedule | weft: main thread | all threads | stages alone | torch: main thread | all | stages alone |",
        end="",
    )
    print(" ratio, main thread | without the stages |\n|" + "---|" * 9)
    for name in names:
        found = pool.run(host_times, name, rounds, timeout=600)
        (ours, *more), (other, *others) = (
            [1e6 * statistics.fmean(one[side][which] for one in found) for which in range(3)]
            for side in ("weft", "torch")
        )
        micro = " | ".join(f"{value:.0f} us" for value in (ours, *more, other, *others))
        bare = (ours - more[1]) / (other - others[1])
        print(f"| {name} | {micro} | {ours / other:.2f} | {bare:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="weft's pipeline beside torch.distributed.pipelining")
    parser.add_argument("--schedules", nargs="+", default=list(THEIRS), choices=THEIRS)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15, help="alternating pairs behind each ratio")
    parser.add_argument("--rounds", type=int, default=15, help="steps behind each host time")
    parser.add_argument("--only", choices=("steps", "hosts"))
    options = parser.parse_args()
    pool = Pool(options.ranks)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if options.only != "hosts":
        compare_steps(pool, options.schedules, Size(), options.pairs)
    if options.only != "steps":
        print("\nCPU time of one pass (F, B, I or W), median of steps, mean of ranks\n")
        compare_hosts(pool, options.schedules, options.rounds)
    pool.close()


if __name__ == "__main__":
    main()
