"""Lowered programs: what was added and where, and that no rank can ever wait for ever."""

from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import Instruction, Message, Program, ProgramError, build, lower, verify
from parallel.schedule.program import makes, passes, route
from tests.parallel.schedule.oracle import rendezvous
from tests.parallel.schedule.programs import of_every_schedule
from tests.parallel.schedule.queues import DISCIPLINES, finishes

ADDED = ("SEND", "RECV", "R")
PRICE = st.floats(0.1, 9)
PROGRAMS = of_every_schedule((2, 4), (3, 5), (4, 8), (4, 2), (6, 4), (8, 20))


@cache
def all_lowered() -> list[tuple[Program, list[list[Instruction]]]]:
    """Of every schedule and size, some evaluations, and one long step of 16 ranks."""
    programs = [*PROGRAMS, build("dualpipe", 16, 32), *(program.evaluation() for program in PROGRAMS[::4])]
    return [(program, lower(program)) for program in programs]


def last_weight_gradients(program: Program, ends: list[list[float]]) -> dict[int, list[float]]:
    """{stage: when its last weight gradient ends on each rank that runs any}."""
    last: dict[int, list[float]] = {stage: [] for stage in range(program.stages)}
    for row, times in zip(program.program, ends, strict=True):
        mine = {p[1]: end for ins, end in zip(row, times, strict=True) for p in passes(ins) if p[0] in ("B", "W")}
        for stage, end in mine.items():
            last[stage].append(end)
    return last


def test_lowering_adds_each_transfer_and_reduction_once_and_changes_no_order() -> None:
    for program in PROGRAMS:
        lowered = lower(program)
        assert [tuple(i for i in each if i[0] not in ADDED) for each in lowered] == list(program.program)
        expected: Counter[tuple] = Counter()
        for msg in (msg for each in program.program for ins in each for msg in makes(program, ins)):
            source, target = route(program, msg)
            if source != target:
                expected.update([(source, "SEND", *msg, target), (target, "RECV", *msg, source)])
        expected.update((rank, "R", stage) for rank, stages in enumerate(program.placement) for stage in stages)
        assert Counter((rank, *i) for rank, each in enumerate(lowered) for i in each if i[0] in ADDED) == expected


def test_a_stage_is_reduced_as_soon_as_its_last_holder_has_run_its_last_weight_gradient() -> None:
    for program in PROGRAMS:
        ends = program.ends(delay=0.01)
        last = last_weight_gradients(program, ends)
        for rank, lowered in enumerate(lower(program)):
            computed = 0
            for ins in lowered:
                if ins[0] == "R":  # what ends until then stands before, everything else after
                    assert computed == sum(end <= max(last[ins[1]]) for end in ends[rank])
                computed += ins[0] not in ADDED


def test_dualpipe_reduces_the_far_stage_while_the_pipeline_still_runs() -> None:
    first = lower(build("dualpipe", 8, 20))[0]
    after = [ins[0] for ins in first[first.index(("R", 7)) :] if ins[0] not in ADDED]
    assert after == ["I", "W"] * 4
    assert first[-1] == ("R", 0)


@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 8), microbatches=st.integers(1, 40))
def test_mirrored_ranks_reduce_their_stages_in_the_same_order(half: int, microbatches: int) -> None:
    lowered = lower(build("dualpipe", 2 * half, 2 * microbatches))  # the greedy ones too
    reductions = [[ins[1] for ins in each if ins[0] == "R"] for each in lowered]
    assert reductions == reductions[::-1]
    assert all(sorted(each) == [min(each), 2 * half - 1 - min(each)] for each in reductions)


def test_a_rank_that_holds_a_stage_without_running_it_reduces_it_too() -> None:
    program = Program("train", 1, 2, 1, ((0,), (0,)), ((("F", 0, 0), ("B", 0, 0)), ()))
    assert lower(program) == [[("F", 0, 0), ("B", 0, 0), ("R", 0)], [("R", 0)]]
    verify(program)
    rendezvous(program, lower(program))


def test_an_evaluation_is_lowered_without_reductions() -> None:
    for program in PROGRAMS:
        evaluation = program.evaluation()
        verify(evaluation)
        assert {ins[0] for each in lower(evaluation) for ins in each} <= {"F", "SEND", "RECV"}


def test_a_receive_is_posted_before_whatever_ends_after_its_message_is_made() -> None:
    program = build("dualpipe", 8, 20)
    ends = program.ends(delay=0.01)
    made: dict[Message, float] = {}
    for rank, instructions in enumerate(program.program):
        made |= {msg: end for ins, end in zip(instructions, ends[rank], strict=True) for msg in makes(program, ins)}
    for rank, lowered in enumerate(lower(program)):
        computed = 0
        for ins in lowered:
            if ins[0] == "RECV":
                assert computed == sum(end <= made[ins[1:4]] for end in ends[rank])
            computed += ins[0] not in ADDED


@settings(max_examples=25, deadline=None)
@given(half=st.integers(1, 4), microbatches=st.integers(1, 12), costs=st.lists(PRICE, min_size=5, max_size=5))
def test_any_costs_give_an_order_that_finishes(half: int, microbatches: int, costs: list[float]) -> None:
    prices = dict(zip(("F", "B", "I", "W", "FB"), costs, strict=True))
    for program in of_every_schedule((2 * half, 2 * microbatches)):
        lowered = lower(program, prices, delay=0.05)
        verify(program, lowered)
        rendezvous(program, lowered)


@pytest.mark.parametrize("discipline", DISCIPLINES)
def test_every_schedule_finishes_under(discipline: str) -> None:
    for program, lowered in all_lowered():
        assert finishes(program, lowered, **DISCIPLINES[discipline])


# Two ranks that both send first: what hangs depends on the queues. M(s, 0) stands for any message.
BOTH_SEND_FIRST = [
    [("SEND", "F", 0, 0, 1), ("RECV", "B", 1, 0, 1)],
    [("SEND", "B", 1, 0, 0), ("RECV", "F", 0, 0, 0)],
]
BOTH_SEND_TWO_FIRST = [
    [("SEND", "F", 0, 0, 1), ("SEND", "F", 0, 1, 1), ("RECV", "B", 1, 0, 1), ("RECV", "B", 1, 1, 1)],
    [("SEND", "B", 1, 0, 0), ("SEND", "B", 1, 1, 0), ("RECV", "F", 0, 0, 0), ("RECV", "F", 0, 1, 0)],
]
OTHER_NAMES = [
    [("SEND", "F", 0, 0, 1), ("SEND", "F", 0, 1, 1)],
    [("RECV", "F", 0, 1, 0), ("RECV", "F", 0, 0, 0)],
]
REDUCTIONS_CROSSED = [[("R", 0), ("R", 1)], [("R", 1), ("R", 0)]]


@pytest.mark.parametrize(
    ("lowered", "finishing"),
    [
        (BOTH_SEND_FIRST, ["direction", "launch", "one send", "four sends"]),
        (BOTH_SEND_TWO_FIRST, ["direction", "four sends"]),
        (OTHER_NAMES, []),
        (REDUCTIONS_CROSSED, []),
    ],
)
def test_the_disciplines_differ_in_what_hangs(lowered: list, finishing: list[str]) -> None:
    nothing = Program("train", 2, 2, 2, ((0, 1), (1, 0)), ((), ()))
    for discipline, how in DISCIPLINES.items():
        expected = any(word in discipline for word in finishing)
        assert finishes(nothing, lowered, **how) == expected, discipline


def test_ranks_that_wait_in_a_circle_cannot_be_lowered() -> None:
    rows = ((("F", 1, 0), ("F", 0, 1)), (("F", 1, 1), ("F", 0, 0)))
    with pytest.raises(ProgramError, match="circle"):
        lower(Program("eval", 2, 2, 2, ((0, 1), (0, 1)), rows))
