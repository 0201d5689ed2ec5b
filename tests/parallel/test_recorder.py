"""What the recorder says of steps whose times are known: made by hand, or by peers that come late on purpose."""

import time

import pytest
import torch
import torch.distributed as dist

from parallel.recorder import Recorder, Times, offset_to_rank_0, shares
from parallel.schedule import build
from parallel.timeline import Flight, Span, Step
from parallel.trace import OFF

PROGRAM = build("1f1b", 1, 2)


def step_by_hand() -> Step:
    """Ten seconds: a pair, a lone backward with weight gradients after it, and waits of every kind."""
    step = Step(1, PROGRAM, 0.0, 10.0)

    def span(lane, name, begin, end, parent=None, **details):
        step.spans.append(Span(lane, name, details, parent, begin, end))
        return step.spans[-1]

    pair = span("instruction", "FB(0, 1, 0, 0)", 1.0, 5.0)
    span("wait", "receive", 1.0, 1.5, pair, on="pipeline")
    segment = span("compute", "attention", 2.0, 3.0, pair)
    span("wait", "counts", 2.5, 2.75, segment, on="experts")
    span("wait", "dispatch", 4.0, 4.5, pair, on="experts")
    span("wait", "send", 5.0, 5.25, None, on="pipeline")
    alone = span("instruction", "B(0, 1)", 5.5, 7.0)
    span("wait", "combine.B", 6.0, 7.0, alone, on="experts")
    span("compute", "weights.W", 7.0, 8.0)
    span(
        "wait", "send", 8.0, 9.0, None, on="pipeline"
    )  # after the last instruction: part of nobody's bubble but the tail
    span("wait", "gradients", 9.0, 9.5, None, on="gradients")
    step.flights = [
        Flight("experts", "dispatch", 8, 3.0, 4.25),
        Flight("experts", "combine.B", 8, 3.5, 7.0),
        Flight("pipeline", "send F(0, 1)", 8, 5.0, 9.0),
    ]
    return step


def test_times_add_up_what_a_rank_did():
    times = Times.of(step_by_hand())
    assert times == Times(
        begin=1.0,
        end=8.0,
        compute=4.0 + 1.5 + 1.0 - (0.5 + 0.25 + 0.5 + 1.0),
        exposed=0.25 + 0.5 + 1.0,
        exposed_in_pairs=0.25 + 0.5,
        pairs=4.0,
        messages=0.5 + 0.25,
        in_flight=1.25 + 3.5,
        step=10.0,
    )


def test_shares_are_means_over_ranks_each_of_its_own_pipeline():
    def rank(end, exposed, messages, begin=0.0):
        return Times(begin, end, 0.0, exposed, exposed / 2, exposed, messages, 0.0, 20.0)

    # Pipeline 0 has ranks 0 and 2, pipeline 1 ranks 1 and 3: the slowest end at 10 and 20.
    ranks = [rank(10, 1, 2), rank(20, 0, 0), rank(7, 3, 1), rank(16, 4, 1, begin=4)]
    assert shares(ranks, 2) == {
        "bubble": pytest.approx((2 / 10 + 0 + (1 + 3) / 10 + (1 + 4) / 16) / 4),
        "exposed_comm": pytest.approx((1 / 10 + 0 + 3 / 10 + 4 / 16) / 4),
        "exposed_comm_pairs": pytest.approx(0.5),
    }


def test_what_cannot_be_measured_is_absent():
    nothing = Times(*[0.0] * 9)
    assert shares([nothing], 1) == {}
    assert set(shares([Times(0, 1, 1, 0, 0, 0, 0, 0, 1)], 1)) == {"bubble", "exposed_comm"}, "no pairs, no key"
    assert OFF.end() == {}


def late_peer(late: float, busy: float) -> tuple[Times, list[Flight], dict[str, float]]:
    """An exchange to which rank 1 comes `late`, while rank 0 has `busy` seconds to do; then the ranks part."""
    recorder = Recorder(torch.device("cpu"), 1)
    recorder.begin(1, PROGRAM)
    dist.barrier()
    with recorder.span("instruction", "FB(0, 1, 0, 0)"):
        rank, give, take = dist.get_rank(), torch.ones(1000), torch.empty(1000)
        with recorder.span("compute", "attention", layer=0):
            time.sleep(late * rank)
        work = dist.all_to_all_single(take, give, async_op=True)
        recorder.post("experts", "dispatch", work, give.nbytes)
        with recorder.span("compute", "experts", layer=0):
            time.sleep(busy * (1 - rank))
        recorder.wait("experts", "dispatch", work)
    measured = recorder.end()
    with recorder.span("compute", "between steps"):
        recorder.wait("experts", "dispatch", dist.all_reduce(torch.ones(1), async_op=True))
    assert len([span for span in recorder.step.spans if span.parent is None]) == 1
    return recorder.times, recorder.step.flights, measured


def test_a_wait_is_exposed_only_as_far_as_nothing_was_computed_meanwhile(workers):
    (alone, _, measured), _ = workers(2).run(late_peer, 0.6, 0.1)
    assert 0.3 < alone.exposed == alone.exposed_in_pairs
    assert measured["exposed_comm"] > 0.1
    (hidden, (flight,), _), (_, _, same) = workers(2).run(late_peer, 0.1, 0.6)
    assert hidden.exposed < 0.3 and hidden.compute > 0.59
    assert set(same) == {"bubble", "exposed_comm", "exposed_comm_pairs"} and 0 <= same["bubble"] < 1
    if flight.seen:  # gloo said so, before anybody waited
        assert flight.arrived - flight.posted < 0.59
    assert hidden.in_flight == flight.arrived - flight.posted > 0


def skewed(seconds: float) -> tuple[float, float]:
    """Rank 1 on a machine of its own, whose clock is ahead; then on this one."""
    ahead = seconds * dist.get_rank()
    elsewhere = offset_to_rank_0(lambda: time.perf_counter() + ahead, f"machine {dist.get_rank()}")
    return elsewhere, offset_to_rank_0()


def test_clocks_of_other_machines_are_compared_with_rank_0(workers):
    (first, _), (second, same_machine) = workers(2).run(skewed, 1000.0)
    assert (first, same_machine) == (0.0, 0.0)
    assert second == pytest.approx(-1000, abs=0.05)
