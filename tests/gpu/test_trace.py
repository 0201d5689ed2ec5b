"""The lanes of a pair really overlap on a GPU: with a stand-in for the all-to-all on a stream of its own.

One process and one rank, whose program has a pair. The stand-in keeps its stream busy for a while, without using what
computation needs. Needs a GPU: `make test-gpu`.
"""

import pytest
import torch
import torch.distributed as dist

from parallel.experts.local import LocalExperts
from parallel.passes import Comm
from parallel.recorder import Recorder
from parallel.schedule import Program
from tests.train.layouts import batch_of, small_recipe
from train.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CYCLES = 40_000_000  # of the stand-in: some 20 ms, longer than the host takes to launch a block
PAIR = "FB(0, 1, 0, 0)"


class OnAStream:
    """A communication that ends when its stream has got there."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            self.done = torch.cuda.Event()
            self.done.record(stream)

    def wait(self) -> None:
        self.done.wait()


class StandIn(LocalExperts):
    """All experts are here, and yet each exchange takes its time."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self.stream = torch.cuda.Stream()

    def _turn(self, tag) -> Comm:
        super()._turn(tag)
        return Comm(tag.operation, OnAStream(self.stream), 1, 0, None)


class WithAPair(Engine):
    """One rank, one stage, two micro-batches, of which one goes back while the other comes."""

    def _dispatcher(self) -> StandIn:
        return StandIn(self.recipe.model.n_routed_experts)

    def _program(self, batch: int) -> Program:
        return Program("train", 1, 1, 2, ((0,),), ((("F", 0, 0), ("FB", 0, 1, 0, 0), ("B", 0, 1)),))


@pytest.fixture(scope="module")
def recorded():
    """The recorder after a step; the one before was for compilers and caches."""
    device = torch.device("cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        recipe = small_recipe({}, "bf16", num_nextn_predict_layers=0)
        recorder = Recorder(device, 1)
        engine = WithAPair(recipe, device, recorder)
        size = recipe.train.batch.start
        for number in range(2):
            rows = batch_of(number, recipe).to(device)
            tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
            recorder.begin(number + 1, engine.program(size))
            totals = engine.forward_backward(tokens, size, 0.3)
            engine.update(1e-3, 1e-3, totals)
            shares = recorder.end()
        yield recorder, shares
    finally:
        dist.destroy_process_group()


def inside(span, flight) -> bool:
    """Whether a computation ran, on the device's own time, while a communication was in flight."""
    return flight.posted <= span.begin and span.end <= flight.arrived and span.end > span.begin


def test_computations_of_a_pair_run_while_communication_is_in_flight(recorded):
    recorder, _ = recorded
    pair = next(span for span in recorder.step.spans if span.name == PAIR)
    flights = [each for each in recorder.step.flights if pair.begin <= each.posted < pair.end]
    computed = [span for span in recorder.step.spans if span.parent is pair and span.lane == "compute"]
    assert all(each.seen and each.arrived > each.posted for each in flights)
    covered = [each for each in flights if any(inside(span, each) for span in computed)]
    assert len(covered) > len(flights) / 2


def test_a_pair_runs_in_the_order_of_the_report(recorded):
    """Figure 4: combine(B), dispatch(F), dispatch(B), combine(F), again and again; for each layer that has experts."""
    recorder, _ = recorded
    pair = next(span for span in recorder.step.spans if span.name == PAIR)
    posted = [each.name for each in recorder.step.flights if pair.begin <= each.posted < pair.end]
    assert posted == ["combine.B", "dispatch", "dispatch.B", "combine"] * (len(posted) // 4)
    assert posted
    begins = [each.posted for each in recorder.step.flights]
    assert begins == sorted(begins)


def test_spans_nest_and_shares_are_shares(recorded):
    recorder, shares = recorded
    for span in recorder.step.spans:
        assert recorder.step.begin <= span.begin <= span.end <= recorder.step.end
        if span.parent:
            assert span.parent.begin <= span.begin and span.end <= span.parent.end
    assert set(shares) == {"bubble", "exposed_comm", "exposed_comm_pairs"}
    assert all(0 <= share <= 1 for share in shares.values())
    assert recorder.times.in_flight > recorder.times.exposed
