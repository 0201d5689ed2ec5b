"""What the generators write, against the report's figure, its closed forms, and a plain count of the work."""

from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import UserError
from parallel.schedule import SCHEDULES, Program, build
from parallel.schedule.program import UNIT_COSTS, passes
from tests.parallel.schedule.notation import mirrored, shorthand

# Derived by hand from the authors' dualpipe.py; the second is the report's Figure 5. The other ranks mirror these.
GOLDEN = {
    (4, 8): [
        "Fa0 Fa1 Fa2 Fb0 Ib0 Wb0 Fb1 [Fa3+Bb1] [Fb2+Ba0] Bb2 [Fb3+Ba1] Bb3 Ia2 Wa2 Ia3 Wa3",
        "Fa0 Fb0 Fa1 Fb1 Fa2 Bb0 [Fb2+Ba0] [Fa3+Bb1] [Fb3+Ba1] Bb2 Ba2 Ib3 Ia3 Wb3 Wa3",
    ],
    (8, 20): [
        "Fa0 Fa1 Fa2 Fa3 Fa4 Fa5 Fa6 Fb0 Ib0 Wb0 Fb1 Ib1 Wb1 Fb2 Ib2 Wb2 Fb3 [Fa7+Bb3] [Fb4+Ba0] [Fa8+Bb4] [Fb5+Ba1] "
        "[Fa9+Bb5] [Fb6+Ba2] Bb6 [Fb7+Ba3] Bb7 [Fb8+Ba4] Bb8 [Fb9+Ba5] Bb9 Ia6 Wa6 Ia7 Wa7 Ia8 Wa8 Ia9 Wa9",
        "Fa0 Fa1 Fa2 Fa3 Fa4 Fb0 Fa5 Fb1 Ib0 Wb0 Fb2 Ib1 Wb1 Fb3 [Fa6+Bb2] [Fb4+Ba0] [Fa7+Bb3] [Fb5+Ba1] [Fa8+Bb4] "
        "[Fb6+Ba2] [Fa9+Bb5] [Fb7+Ba3] Bb6 [Fb8+Ba4] Bb7 [Fb9+Ba5] Bb8 Ba6 Ib9 Ia7 Wb9 Ia8 Wa7 Ia9 Wa8 Wa9",
        "Fa0 Fa1 Fa2 Fb0 Fa3 Fb1 Fa4 Fb2 Ib0 Wb0 Fb3 [Fa5+Bb1] [Fb4+Ba0] [Fa6+Bb2] [Fb5+Ba1] [Fa7+Bb3] [Fb6+Ba2] "
        "[Fa8+Bb4] [Fb7+Ba3] [Fa9+Bb5] [Fb8+Ba4] Bb6 [Fb9+Ba5] Bb7 Ba6 Bb8 Ia7 Ib9 Ia8 Wa7 Ia9 Wb9 Wa8 Wa9",
        "Fa0 Fb0 Fa1 Fb1 Fa2 Fb2 Fa3 Fb3 Fa4 Bb0 [Fb4+Ba0] [Fa5+Bb1] [Fb5+Ba1] [Fa6+Bb2] [Fb6+Ba2] [Fa7+Bb3] [Fb7+Ba3] "
        "[Fa8+Bb4] [Fb8+Ba4] [Fa9+Bb5] [Fb9+Ba5] Bb6 Ba6 Bb7 Ba7 Ib8 Ia8 Ib9 Ia9 Wb8 Wa8 Wb9 Wa9",
    ],
}

even_ranks = st.integers(1, 8).map(lambda half: 2 * half)


def assert_whole_and_in_place(program: Program) -> None:
    """Counted without the verifier: every stage and micro-batch once forward, once back, on one rank that holds it."""
    forwards: Counter[tuple[int, int, int]] = Counter()
    inputs: Counter[tuple[int, int, int]] = Counter()
    weights: Counter[tuple[int, int, int]] = Counter()
    for rank, instructions in enumerate(program.program):
        for kind, stage, mb in (each for ins in instructions for each in passes(ins)):
            assert stage in program.placement[rank]
            forwards[rank, stage, mb] += kind == "F"
            inputs[rank, stage, mb] += kind in ("B", "I")
            weights[rank, stage, mb] += kind in ("B", "W")
    assert forwards == inputs == weights
    assert set(forwards.values()) == {1}
    done = Counter((stage, mb) for _, stage, mb in forwards)
    assert done == Counter({(s, m): 1 for s in range(program.stages) for m in range(program.microbatches)})


@pytest.mark.parametrize(("ranks", "microbatches"), GOLDEN)
def test_dualpipe_equals_the_golden_sequences(ranks: int, microbatches: int) -> None:
    program = build("dualpipe", ranks, microbatches)
    first_half = GOLDEN[ranks, microbatches]
    assert [shorthand(program, rank) for rank in range(ranks)] == first_half + [mirrored(s) for s in first_half[::-1]]


def test_dualpipe_feeds_each_half_of_the_micro_batches_from_its_own_end() -> None:
    program = build("dualpipe", 8, 20)
    assert program.placement[2] == (2, 5)
    assert {program.host(0, mb) for mb in range(10)} == {0} and {program.host(0, mb) for mb in range(10, 20)} == {7}
    assert program.host(3, 4) == 3 and program.host(3, 14) == 4


@settings(max_examples=40, deadline=None)
@given(ranks=even_ranks, extra=st.integers(0, 12))
def test_dualpipe_idles_and_holds_what_the_report_says(ranks: int, extra: int) -> None:
    program = build("dualpipe", ranks, 2 * ranks + 2 * extra)
    assert_whole_and_in_place(program)
    bubble = (ranks // 2 - 1) * (UNIT_COSTS["FB"] + UNIT_COSTS["B"] - 3 * UNIT_COSTS["W"])
    assert program.idle() == [bubble] * ranks
    assert program.peak_tapes() == [ranks + 1] * ranks


def test_dualpipe_of_the_released_model_spends_the_step_as_derived() -> None:
    program = build("dualpipe", 16, 120)
    assert max(ends[-1] for ends in program.ends()) == 374
    kinds = [Counter(ins[0] for ins in instructions) for instructions in program.program]
    assert kinds[0] == Counter(F=23, I=15, W=15, FB=97, B=8) == kinds[15]
    assert kinds[6] == Counter(F=17, I=9, W=9, FB=103, B=8) == kinds[9]
    assert kinds[7] == Counter(F=17, I=8, W=8, FB=103, B=9) == kinds[8]


@settings(max_examples=40, deadline=None)
@given(ranks=even_ranks, data=st.data())
def test_short_dualpipe_steps_are_whole_and_hold_no_more(ranks: int, data: st.DataObject) -> None:
    microbatches = 2 * data.draw(st.integers(1, max(1, ranks - 1)))
    program = build("dualpipe", ranks, microbatches)
    assert_whole_and_in_place(program)
    assert max(program.peak_tapes()) <= ranks + 1
    for instructions in program.program:
        assert max(accumulate((ins[0] == "I") - (ins[0] == "W") for ins in instructions)) <= ranks // 2
    long_enough = build("dualpipe", ranks, 2 * ranks)
    assert max(ends[-1] for ends in program.ends()) <= max(ends[-1] for ends in long_enough.ends())


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 16), microbatches=st.integers(1, 40))
def test_1f1b_idles_and_holds_what_the_report_says(ranks: int, microbatches: int) -> None:
    program = build("1f1b", ranks, microbatches)
    assert_whole_and_in_place(program)
    assert program.idle() == [(ranks - 1) * (UNIT_COSTS["F"] + UNIT_COSTS["B"])] * ranks
    assert program.peak_tapes() == [min(ranks - rank, microbatches) for rank in range(ranks)]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 4, 8), ("dualpipe", 4, 6), ("1f1b", 3, 5)])
def test_an_evaluation_runs_the_same_forwards_in_the_same_order(name: str, ranks: int, microbatches: int) -> None:
    program = build(name, ranks, microbatches)
    evaluation = program.evaluation()
    assert evaluation.kind == "eval" and evaluation.placement == program.placement
    for each, train in zip(evaluation.program, program.program, strict=True):
        assert list(each) == [p for ins in train for p in passes(ins) if p[0] == "F"]


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "words"),
    [
        ("dualpipe", 3, 8, ["parallel.pipeline=3", "even"]),
        ("dualpipe", 0, 8, ["parallel.pipeline=0", "even"]),
        ("dualpipe", 4, 7, ["parallel.microbatches=7", "even"]),
        ("dualpipe", 4, 0, ["parallel.microbatches=0", "at least 2"]),
        ("1f1b", 0, 4, ["parallel.pipeline=0", "at least 1"]),
        ("1f1b", 4, 0, ["parallel.microbatches=0", "at least 1"]),
        ("dualpip", 4, 8, ["parallel.schedule=dualpip", "did you mean dualpipe", *SCHEDULES]),
        ("zigzag", 4, 8, ["parallel.schedule=zigzag", *SCHEDULES]),
    ],
)
def test_numbers_that_a_schedule_cannot_serve_are_refused(
    name: str, ranks: int, microbatches: int, words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        build(name, ranks, microbatches)
    assert all(word in str(refusal.value) for word in words)
