"""With unit costs the engine is the ideal step that the program itself knows; races and memory follow closed forms."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops import Cost
from launch.simulate.cluster.sheet import Link, Sheet
from launch.simulate.memory import peaks
from launch.simulate.stages.storage import Bytes
from launch.simulate.stages.work import Exchange, Operator, PassWork, Piece, Read, StageWork
from launch.simulate.step import engine
from launch.simulate.step.card import Card
from launch.simulate.step.race import Span, race
from launch.simulate.step.update import pause, shared, update
from parallel import schedule
from parallel.mesh import Mesh
from parallel.schedule import SCHEDULES
from train.recipe import CheckpointConfig

FREE = Link(float("inf"), 0.0)
UNIT = Sheet(
    name="unit",
    gpus=64,
    node_size=8,
    sms=10,
    memory_bytes=1,
    price_per_hour=0.0,
    peak={"bf16": 1.0},
    products={},
    attention={},
    memory=1.0,  # a byte takes a second
    launch=0.0,
    inside=FREE,
    across=FREE,
    exchange=Link(1.0, 0.0),
    exchange_alone=Link(1.0, 0.0),
    comm_sms=0,
    read=0.0,
)


def piece(seconds: float, name: str = "mlp", **left: int) -> Piece:
    grown = Bytes({part: size for part, size in left.items() if size > 0})
    return Piece(name, 0, [Operator("copy", Cost(0, seconds))], grown, Bytes(left))


def stage(kept: int = 1, deferred: int = 0) -> StageWork:
    """A backward that lets go of activations when a forward beside it has made its own."""
    passes = {
        "F": PassWork([piece(1, activations=kept)]),
        "B": PassWork([piece(1), Exchange("dispatch.B", 0, 0), piece(1, "weights.W", activations=-kept)]),
        "I": PassWork([piece(1, activations=-kept, deferred=deferred)]),
        "W": PassWork([piece(1, "weights.W", deferred=-deferred)]),
    }
    for one in passes.values():
        for event in one.pieces:
            for kind in (event.fullest, event.left):
                kind["deferred weights"] = kind.pop("deferred", 0)
    return StageWork(passes, [], 0, 0, 0, 0, 0, 0, 2, 4)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=15, deadline=None)
@given(half=st.integers(1, 4), more=st.integers(0, 6))
def test_with_unit_costs_a_step_is_the_programs_own(name, half, more):
    program = schedule.build(name, 2 * half, 4 * half + 2 * half * more)
    stages = {number: stage() for number in range(program.stages)}
    timeline = engine.run(program, stages, UNIT)
    ends = program.ends()
    assert [[slot.end for slot in row] for row in timeline.ranks] == ends
    assert timeline.seconds == max(row[-1] for row in ends)


def test_messages_take_their_time_and_leave_one_after_the_other():
    program = schedule.build("gpipe", 2, 1)
    far = dataclasses.replace(UNIT, across=Link(2.0, 0.5))
    sent = dataclasses.replace(stage(), message=3)
    timeline = engine.run(program, {0: sent, 1: sent}, far)
    (forward, backward), (first, second) = timeline.ranks
    assert (forward.begin, forward.end) == (0, 1)
    assert (first.begin, second.begin, second.end) == (1 + 0.5 + 3 / 2, 4, 6), "0.5 s, and 3 bytes at 2 a second"
    assert backward.begin == 6 + 2 and timeline.seconds == 10


def test_a_slow_rank_is_waited_for():
    program = schedule.build("1f1b", 4, 8)
    stages = {number: stage() for number in range(4)}
    plain = engine.run(program, stages, UNIT).seconds
    slow = engine.run(program, stages, UNIT, lambda rank: 1.5 if rank == 2 else 1.0).seconds
    assert slow >= max(plain, 2 + 1.5 * 24), "its first micro-batch comes after two units, its 24 take half again"


# ---------------------------------------------------------------- races
def exchange(seconds: int) -> Exchange:
    return Exchange("dispatch", 0, seconds)


def test_a_lone_pass_waits_for_its_exchanges():
    lone = race([PassWork([piece(1), exchange(3), piece(2), exchange(1), piece(1)])], UNIT)
    assert (lone.seconds, lone.compute, lone.exposed) == (8, 4, 4)


def test_a_pair_hides_what_fits_beside_the_other():
    backward = PassWork([exchange(3), piece(2), exchange(2), piece(2)])
    forward = PassWork([piece(3), exchange(2), piece(2), exchange(1)])
    # B posts (0-3), F computes (0-3) and posts (3-5); B computes (3-5), posts (5-7); F computes (5-7), posts (7-8);
    # B computes (7-9); F has ended, and what it posted last has arrived.
    both = race([backward, forward], UNIT)
    assert (both.seconds, both.compute, both.exposed) == (9, 9, 0)
    assert [(span.lane, span.begin, span.end) for span in both.spans if span.lane == "experts"] == [
        ("experts", 0, 3),
        ("experts", 3, 5),
        ("experts", 5, 7),
        ("experts", 7, 8),
    ]


def test_a_pass_that_ends_on_an_exchange_waits_for_it():
    assert race([PassWork([piece(1), exchange(2)])], UNIT).seconds == 3


def test_messages_and_exchanges_share_the_card_and_numbers_are_read_in_the_open():
    busy = dataclasses.replace(UNIT, across=Link(1.0, 0.0), read=0.25)
    late = race([PassWork([piece(1), Read("counts"), exchange(1), piece(1)])], busy, leaving=4)
    # 1.25 of 4 s of messages have left when the exchange is posted; from then on each has half of the card.
    assert late.seconds == 1.25 + 2 + 1 and late.exposed == pytest.approx(0.25 + 2)


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("name", SCHEDULES)
def test_most_activations_are_those_that_the_program_counts(name):
    program = schedule.build(name, 4, 12)
    mesh = Mesh(4, 2, 1, 1, rank=0, node_size=8)
    stages = {number: stage(kept=10) for number in range(program.stages)}
    found = peaks(program, stages, mesh, "bf16")
    assert [peak.parts["activations"] for peak in found] == [10 * count for count in program.peak_tapes()]


def test_deferred_weight_gradients_hold_their_operands_until_they_run():
    program = schedule.build("dualpipe", 8, 20)
    mesh = Mesh(8, 1, 1, 1, rank=0, node_size=8)
    stages = {number: stage(kept=0, deferred=7) for number in range(8)}
    found = peaks(program, stages, mesh, "bf16")
    assert [peak.parts["deferred weights"] for peak in found] == [7 * count for count in program.peak_deferred()]


# ---------------------------------------------------------------- links, gaps, the end of a step
def test_a_message_inside_a_node_takes_the_nodes_own_link():
    program = schedule.build("gpipe", 2, 1)
    links = dataclasses.replace(UNIT, across=Link(1.0, 0.0), inside=Link(3.0, 0.25))
    stages = dict.fromkeys((0, 1), dataclasses.replace(stage(), message=3))
    for node, took in {1: 3.0, 2: 0.25 + 1}.items():
        mesh = Mesh(2, 1, 1, 1, rank=0, node_size=node)
        timeline = engine.run(program, stages, links, near=engine.neighbours(mesh))
        assert timeline.ranks[1][0].begin == 1 + took
    assert not engine.neighbours(Mesh(2, 3, 1, 1, rank=0, node_size=4))(0, 1), "two of three pipelines do not"


def test_a_host_leaves_gaps_only_where_nothing_else_is_waited_for():
    program = schedule.build("gpipe", 2, 2)
    stages = dict.fromkeys((0, 1), stage())
    slow = engine.run(program, stages, dataclasses.replace(UNIT, gap=0.25))
    assert [slot.begin for slot in slow.ranks[0]] == [0, 1.25, 5.5, 7.75], "the backward that is awaited hides the gap"
    assert [slot.begin for slot in slow.ranks[1]] == [1, 2.25, 3.5, 5.75]


def test_messages_leave_before_the_weight_gradients_that_can_wait():
    program = schedule.build("gpipe", 2, 1)
    late = stage()
    late.passes["B"] = PassWork([piece(1)], piece(5, "weights.W"))
    timeline = engine.run(program, {0: late, 1: late}, UNIT)
    assert timeline.ranks[1][1].end == 8 and timeline.ranks[0][1].begin == 3 and timeline.ranks[0][1].end == 9


def test_a_card_gives_each_half_while_both_want_more():
    card = Card(4.0)
    assert card.exchange(1.0, 2.0, 1.0) == (1.0, 5.0) and card.messages == 1.0
    assert card.exchange(0.0, 2.0, 0.25) == pytest.approx((5.0, 7.0)), "a quarter leaves room for messages"
    assert card.exchange(8.0, 1.0, 1.0) == (8.0, 9.0) and card.messages == 0.0


def test_what_is_tied_is_summed_and_gathered_once():
    """Ranks 0 and 1 of DualPipe both hold the first and the last stage, which use one table."""
    program = schedule.build("dualpipe", 2, 4)
    wide = dataclasses.replace(UNIT, inside=Link(1.0, 0.0), across=Link(1.0, 0.0))
    found = {}
    for name, sizes in {"tied": (0, 80), "dense": (80, 0)}.items():
        stages = dict.fromkeys((0, 1), dataclasses.replace(stage(), dense=sizes[0], tied=sizes[1]))
        timeline = engine.run(program, stages, wide)
        found[name] = update(program, stages, timeline, Mesh(2, 1, 1, 1, 0, node_size=8), wide, "bf16")
    assert found["dense"].gather == 2 * found["tied"].gather == 2 * 2 * 80 / 2
    assert found["dense"].optimizer == 2 * found["tied"].optimizer


def test_a_sum_shares_the_card_with_exchanges():
    row = engine.run(schedule.build("gpipe", 1, 1), {0: stage()}, UNIT).ranks[0]
    row[1].race.spans = [Span("experts", "dispatch", -1, 1.0, 2.0)]  # from second 2 to 3 of the step
    assert shared(1.0, 0.5, row) == 1.5 and shared(1.0, 1.25, row) == 2.5
    assert shared(1.0, 2.0, row) == 1 + 2 + 0.5 and shared(7.0, 2.0, row) == 9


def test_checkpoints_are_waited_for_as_far_as_they_outlast_the_training():
    slow = dataclasses.replace(UNIT, copy_out=2.0, storage=1.0)
    kept = CheckpointConfig(every=10)
    assert pause(8, kept, 5.0, slow) == 0.0, "4 s of copying hide behind 5 s of the next step"
    assert pause(16, kept, 5.0, slow) == pytest.approx((16 / 2 - 5) / 10)
    assert pause(8, CheckpointConfig(every=10, background=False), 5.0, slow) == pytest.approx((4 + 8) / 10)
    assert pause(8, CheckpointConfig(), 5.0, slow) == pause(8, kept, 0.0, UNIT) == 0.0
