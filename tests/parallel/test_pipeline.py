"""The executor: each schedule's program gives the one-process result, and memory comes back when the program says."""

import weakref

import pytest
import torch
import torch.distributed as dist

from kernels.linear import Numerics, attach_main_grads, linear
from parallel.experts.local import Nothing
from parallel.mesh import Mesh
from parallel.passes import Comm, Local, Microbatch
from parallel.pipeline import Pipeline
from parallel.schedule import SCHEDULES, Program, build, lower
from parallel.trace import Trace

WIDTH = 8


class Block(torch.nn.Module):
    """Stage `index` of `count`: y = tanh(x W^T); the last scores, the first reads token numbers. Inputs are counted."""

    def __init__(self, index: int, count: int, numerics: Numerics) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == count - 1
        self.numerics, self.live = numerics, weakref.WeakSet()
        generator = torch.Generator().manual_seed(index)
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.segments = [
            Local("block", index, self.run, () if self.is_first else ("hidden",), ("hidden",)),
            Turn(),
            *([Local("score", index, self.score, ("hidden",), ("hidden",), ("loss",))] if self.is_last else []),
        ]

    def run(self, batch, hidden=None):
        if hidden is None:
            hidden = batch.tokens.unsqueeze(-1) / torch.arange(1.0, WIDTH + 1, dtype=torch.float64)
        kept = Kept.apply(hidden.requires_grad_() if batch.training else hidden, self.live)
        return (linear(kept, [self.weight], self.numerics)[0].tanh(),)

    def score(self, batch, hidden):
        return hidden, (hidden * batch.tokens.unsqueeze(-1)).square().sum()


class Turn:
    """Segment: a communication of nothing, at which the passes of a pair take turns."""

    name, layer, reads, writes = "turn", 0, (), ()

    def forward(self, values, batch, stage):
        yield Comm("turn", Nothing(), 0, 0, None)

    def backward(self, record, grads, batch, stage):
        yield Comm("turn.B", Nothing(), 0, 0, None)


class Kept(torch.autograd.Function):
    """The identity; something that lives exactly as long as what the graph saves here is in `live`."""

    @staticmethod
    def forward(ctx, x, live):
        y = x.clone()
        ctx.save_for_backward(y)
        ctx.activation = Activation()
        live.add(ctx.activation)
        return y

    @staticmethod
    def backward(ctx, dy):
        del ctx.activation
        return dy, None


class Activation:
    """What a stage holds of one micro-batch from forward to backward."""


class Counter(Trace):
    """Most activations that were alive at a time, seen whenever something begins to be computed or has been."""

    def __init__(self):
        self.blocks, self.most = [], 0

    def span(self, lane, name, **details):
        self.count()
        return super().span(lane, name)

    def count(self):
        self.most = max(self.most, sum(len(block.live) for block in self.blocks))


def batches_of(sizes, lengths, training=True):
    """Micro-batches of so many sequences and tokens."""
    made = {}
    for mb, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        tokens = torch.randn(size, length, generator=torch.Generator().manual_seed(mb), dtype=torch.float64)
        made[mb] = Microbatch(mb, tokens, (size, length, WIDTH), {"loss": 0.5}, training=training)
    return made


def one_rank(name, ranks, sizes, lengths, chunks=2):
    """A step and an evaluation of this rank: losses, gradients, and what was held."""
    program = build(name, ranks, len(sizes), chunks)
    mesh = Mesh(ranks, 1, 1, 1, dist.get_rank(), ranks)
    mesh.connect()
    return run_program(program, mesh, sizes, lengths)


def run_program(program: Program, mesh: Mesh, sizes, lengths):
    numerics, counter, reduced = Numerics("fp64"), Counter(), []
    held = program.placement[mesh.pipeline_rank]
    blocks = {number: Block(number, program.stages, numerics) for number in held}
    counter.blocks = list(blocks.values())
    for block in blocks.values():
        attach_main_grads(block, torch.float64)
    where = torch.float64, torch.device("cpu")
    pipeline = Pipeline(mesh, blocks, numerics.weight_grads, *where, reduced.append, counter)
    batches = batches_of(sizes, lengths)
    pipeline.step(program, batches)
    assert counter.count() is None and not any(block.live for block in blocks.values())
    found = {
        "losses": {mb: float(*batch.losses.values()) for mb, batch in batches.items() if batch.losses},
        "gradients": {number: block.weight.main_grad.clone() for number, block in blocks.items()},
        "held": (counter.most, pipeline.peak_tapes, pipeline.peak_deferred),
        "promised": (program.peak_tapes()[mesh.pipeline_rank], program.peak_deferred()[mesh.pipeline_rank]),
        "reduced": reduced,
    }
    evaluated = batches_of(sizes, lengths, training=False)
    pipeline.step(program.evaluation(), evaluated)
    assert reduced == found["reduced"] and pipeline.peak_tapes <= 1, "an evaluation holds one micro-batch at a time"
    again = {mb: float(*batch.losses.values()) for mb, batch in evaluated.items() if batch.losses}
    assert again == found["losses"]
    return found


def expected(stages, sizes, lengths):
    """Losses and gradients of the whole model in plain autograd."""
    weights = [Block(number, stages, Numerics("fp64")).weight.detach().requires_grad_() for number in range(stages)]
    losses = {}
    for mb, batch in batches_of(sizes, lengths).items():
        hidden = batch.tokens.unsqueeze(-1) / torch.arange(1.0, WIDTH + 1, dtype=torch.float64)
        for weight in weights:
            hidden = (hidden @ weight.t()).tanh()
        losses[mb] = (hidden * batch.tokens.unsqueeze(-1)).square().sum()
    (0.5 * sum(losses.values())).backward()
    return {mb: loss.item() for mb, loss in losses.items()}, [weight.grad for weight in weights]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_gradients_of_the_whole_model(workers, name, ranks):
    """Also with micro-batches of unlike sizes and lengths, one of them empty."""
    sizes, lengths = [2, 2, 3, 1, 2, 0, 2, 1], [4, 4, 2, 5, 4, 4, 1, 4]
    parts = workers(ranks).run(one_rank, name, ranks, sizes, lengths)
    stages = 1 + max(number for part in parts for number in part["gradients"])
    losses, gradients = expected(stages, sizes, lengths)
    found, summed = {}, {number: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for number in range(stages)}
    for part in parts:
        assert not found.keys() & part["losses"].keys(), "each micro-batch is scored once"
        found |= part["losses"]
        for number, gradient in part["gradients"].items():
            summed[number] += gradient
    assert found == pytest.approx(losses, rel=1e-13)
    for number, gradient in summed.items():
        torch.testing.assert_close(gradient, gradients[number], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_held_at_most_is_what_the_program_says(workers, name, ranks):
    """Counted as objects that the graphs keep alive, and by the executor itself."""
    for part in workers(ranks).run(one_rank, name, ranks, [1] * 12, [2] * 12):
        (alive, tapes, deferred), (promised_tapes, promised_deferred) = part["held"], part["promised"]
        assert alive == tapes == promised_tapes
        assert deferred == promised_deferred


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_stage_is_reduced_once_and_in_one_order_on_all_ranks_that_hold_it(workers, name):
    parts = workers(4).run(one_rank, name, 4, [1] * 8, [2] * 8)
    program = build(name, 4, 8)
    for rank, part in enumerate(parts):
        assert sorted(part["reduced"]) == sorted(program.placement[rank])
        assert part["reduced"] == [ins[1] for ins in lower(program)[rank] if ins[0] == "R"]
    for one in parts:
        for other in parts:
            both = set(one["reduced"]) & set(other["reduced"])
            assert [s for s in one["reduced"] if s in both] == [s for s in other["reduced"] if s in both]
