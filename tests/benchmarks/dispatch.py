"""What node-limited dispatch saves where links are unlike: `python -m tests.benchmarks.dispatch`.

Eight processes stand for 4 nodes of 2 ranks. Their exchanges really happen, and besides take the time of two links of
each rank, a fast one inside the node and a slow one across, which carry one exchange at a time and take no CPU. Timed
are a MoE layer's dispatch and combine and their backwards, for tokens that the router sends to 4 experts in 2 of the 4
nodes: without any compute, and with the experts' own. Beside the second stands what the first predicts: nothing
overlaps in a layer that is alone, so its time is that of communication and compute together.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

# Before torch is imported, and inherited by the workers: threads that spin would time each other.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.linear import Numerics, attach_main_grads
from parallel.experts import Dispatcher, Tag, build
from parallel.mesh import Mesh
from parallel.passes import Pass, merge
from tests.benchmarks.slow_link import Carried, Link
from tests.workers import Pool
from train.model.config import ModelConfig
from train.model.moe import Experts
from train.model.router import Router

RANKS, NODE = 8, 2
RATIO = 3.2  # bandwidth inside a node over that across (report, section 3.2.2: NVLink 160 GB/s, InfiniBand 50 GB/s)
MODEL = ModelConfig(hidden_size=256, n_routed_experts=64, n_group=4, topk_group=2, num_experts_per_tok=4)


# ---------------------------------------------------------------- the links
class Links:
    """Inside `throttled`, a rank's exchanges take the time of its link inside the node and of that across."""

    def __init__(self, across_seconds_per_byte: float) -> None:
        self.across = Link(seconds_per_byte=across_seconds_per_byte)
        self.inside = Link(seconds_per_byte=across_seconds_per_byte / RATIO)
        self.real = dist.all_to_all_single

    @contextmanager
    def throttled(self) -> Iterator[None]:
        dist.all_to_all_single = self.post  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.all_to_all_single = self.real

    def post(self, output: Tensor, rows: Tensor, takes: list[int], gives: list[int], **options: Any) -> "Slow":
        """Both directions of a link are as fast; the fuller one counts."""
        work = self.real(output, rows, takes, gives, **options)
        here, ranks = dist.get_rank(), dist.get_process_group_ranks(options["group"])
        row = rows[:1].nbytes if len(rows) else output[:1].nbytes
        sizes = {}
        for near in (True, False):
            others = [i for i, rank in enumerate(ranks) if rank != here and (rank // NODE == here // NODE) == near]
            sizes[near] = row * max(sum(numbers[i] for i in others) for numbers in (gives, takes))
        return Slow(
            work,
            [
                link.post(sizes[link is self.inside])
                for link in (self.inside, self.across)
                if sizes[link is self.inside]
            ],
        )


@dataclass(frozen=True)
class Slow:
    """An exchange that also travels on links."""

    work: Any
    carried: list[Carried]

    def wait(self) -> None:
        self.work.wait()
        for each in self.carried:
            each.wait()


# ---------------------------------------------------------------- the layer
class NoExperts:
    """Experts that compute nothing."""

    def forward(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        self.weights = weights
        return rows

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        return dout, self.weights


class Computing:
    """A rank's experts, with their weight gradients."""

    def __init__(self, first: int, local: int, inner: int) -> None:
        self.numerics = Numerics("bf16")
        self.experts = Experts(replace(MODEL, moe_intermediate_size=inner), self.numerics, first, local)
        for parameter in self.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        attach_main_grads(self.experts, torch.float32)

    def forward(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        self.inputs = rows.detach().requires_grad_(), weights.detach().requires_grad_()
        self.out = self.experts(*self.inputs, counts)
        return self.out.detach()

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        self.out.backward(dout)
        self.numerics.weight_grads.run()
        rows, weights = (each.grad for each in self.inputs)
        assert rows is not None and weights is not None
        return rows, weights


def layer(dispatcher: Dispatcher, x: Tensor, weights: Tensor, chosen: Tensor, experts: "NoExperts | Computing") -> Pass:
    """Forward and backward of a MoE layer."""
    rows, row_weights, layout = yield from dispatcher.dispatch(x, weights, chosen, Tag("dispatch", 0, 0, 0))
    out = experts.forward(rows, row_weights, layout.counts)
    y = yield from dispatcher.combine(layout, out, Tag("combine", 0, 0, 0))
    dout = yield from dispatcher.combine_backward(layout, y, Tag("combine.B", 0, 0, 0))
    yield from dispatcher.dispatch_backward(layout, *experts.backward(dout), Tag("dispatch.B", 0, 0, 0))


def timed(run: Callable[[], Any]) -> float:
    """Seconds until all ranks have ended."""
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


@dataclass
class Found:
    """Seconds of a layer over the links and without them, and bytes sent inside nodes and across, of one rank.

    whole, free_whole: with the experts' compute.
    """

    times: list[float]
    free: float
    sent: list[int]
    whole: list[float]
    free_whole: float

    @property
    def communication(self) -> float:
        """Without compute."""
        return statistics.median(self.times)


def measure(tokens: int, chunks: int, seconds: float, rounds: int, inner: int) -> dict[str, Found]:
    """By dispatcher. seconds: of one exchange of a flat dispatch on the link across. inner: width of an expert."""
    mesh = Mesh(1, RANKS, 1, RANKS, dist.get_rank(), NODE)
    mesh.connect()
    generator = torch.Generator().manual_seed(mesh.rank)
    router = Router(MODEL, Numerics("fp32"))
    torch.nn.init.normal_(router.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = torch.randn(tokens, MODEL.hidden_size, generator=generator)
        weights, _, chosen = router(x)
    local = MODEL.n_routed_experts // RANKS
    computing = Computing(mesh.rank * local, local, inner)
    away = MODEL.num_experts_per_tok * (1 - NODE / RANKS)  # experts of a token that are on other nodes, on average
    links = Links(seconds / (tokens * away * 2 * MODEL.hidden_size))
    found: dict[str, Found] = {}
    for name, choice, parts, fp8 in (
        ("all_to_all", "all_to_all", 1, False),
        ("hierarchical", "hierarchical", 1, False),
        ("hierarchical, chunks", "hierarchical", chunks, False),
        ("all_to_all, FP8", "all_to_all", 1, True),
        ("hierarchical, chunks, FP8", "hierarchical", chunks, True),
    ):
        dispatcher = build(choice, mesh, MODEL.n_routed_experts, fp8, parts)

        def run(experts: NoExperts | Computing, dispatcher: Dispatcher = dispatcher) -> None:
            merge(layer(dispatcher, x.bfloat16(), weights, chosen, experts))

        moving, whole = partial(run, NoExperts()), partial(run, computing)
        for each in (moving, whole):
            each()
        dispatcher.traffic.clear()
        free = timed(moving)
        sent = [sum(kind.values()) for kind in (dispatcher.traffic.inside, dispatcher.traffic.across)]
        free_whole = statistics.median(timed(whole) for _ in range(rounds))
        with links.throttled():
            times = [[timed(each) for each in (moving, whole)] for _ in range(rounds)]
        found[name] = Found([each[0] for each in times], free, sent, [each[1] for each in times], free_whole)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="node-limited against flat dispatch over unlike links")
    parser.add_argument("--tokens", type=int, default=256, help="of each rank")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one flat exchange on the slow link")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner", type=int, default=512, help="width of an expert")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    pool = Pool(RANKS)
    arguments = options.tokens, options.chunks, options.seconds, options.rounds, options.inner
    ranks = pool.run(measure, *arguments, timeout=600)
    pool.close()
    flat = ranks[0]["all_to_all"]
    print("| dispatcher | communication of a layer | over flat | without links | MB inside nodes | MB across |")
    print("|---|---|---|---|---|---|")
    for name, found in ranks[0].items():
        inside, across = (sum(rank[name].sent[i] for rank in ranks) / 1e6 for i in (0, 1))
        times = f"{found.communication:.2f} s | {found.communication / flat.communication:.3f} | {found.free:.2f} s"
        print(f"| {name} | {times} | {inside:.2f} | {across:.2f} |")
    compute = statistics.median(found.free_whole - found.free for found in ranks[0].values())
    print(f"\nThe experts' compute takes {compute:.2f} s of a layer.\n")
    print("| dispatcher | layer, forward and backward | over flat | predicted |")
    print("|---|---|---|---|")
    for name, found in ranks[0].items():
        whole, whole_flat = statistics.median(found.whole), statistics.median(flat.whole)
        predicted = (found.communication + compute) / (flat.communication + compute)
        print(f"| {name} | {whole:.2f} s | {whole / whole_flat:.3f} | {predicted:.3f} |")


if __name__ == "__main__":
    main()
