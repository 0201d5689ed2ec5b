"""What the generators write, against the report's figure, its closed forms, and a plain count of the work."""

from collections import Counter
from functools import cache
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

F, B, W, FB = (UNIT_COSTS[kind] for kind in ("F", "B", "W", "FB"))
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
    assert program.idle() == [(ranks // 2 - 1) * (FB + B - 3 * W)] * ranks
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
    assert_short_but_sound("dualpipe", ranks, 2 * data.draw(st.integers(1, max(1, ranks - 1))))


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 16), data=st.data())
def test_short_dualpipev_steps_are_whole_and_hold_no_more(ranks: int, data: st.DataObject) -> None:
    assert_short_but_sound("dualpipev", ranks, data.draw(st.integers(1, 2 * ranks - 1)))


def assert_short_but_sound(name: str, ranks: int, microbatches: int) -> None:
    program = build(name, ranks, microbatches)
    assert_whole_and_in_place(program)
    assert max(program.peak_tapes()) <= program.stages + 1
    for instructions in program.program:
        assert max(accumulate((ins[0] == "I") - (ins[0] == "W") for ins in instructions)) <= program.stages // 2
    assert max(ends[-1] for ends in program.ends()) <= shortest_full_step(name, ranks)


@cache
def shortest_full_step(name: str, ranks: int) -> float:
    return max(ends[-1] for ends in build(name, ranks, 2 * ranks).ends())


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 8), extra=st.integers(0, 12))
def test_dualpipev_is_the_upper_half_of_a_dualpipe_of_twice_the_ranks(ranks: int, extra: int) -> None:
    n = 2 * ranks + extra
    folded, whole = build("dualpipev", ranks, n), build("dualpipe", 2 * ranks, 2 * n)
    assert_whole_and_in_place(folded)
    for mine, upper in zip(folded.program, whole.program, strict=False):
        # there the second direction numbers its micro-batches from n, and meets its stages in the opposite order
        assert list(mine) == [(ins[0], *(x % n if i % 2 else x for i, x in enumerate(ins[1:]))) for ins in upper]
    assert folded.idle() == [(ranks - 1) * (FB + B - 3 * W)] * ranks
    assert folded.peak_tapes() == [2 * ranks + 1] * ranks


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 16), microbatches=st.integers(1, 40))
def test_gpipe_idles_like_1f1b_and_holds_everything(ranks: int, microbatches: int) -> None:
    program = build("gpipe", ranks, microbatches)
    assert_whole_and_in_place(program)
    assert program.idle() == [(ranks - 1) * (F + B)] * ranks
    assert program.peak_tapes() == [microbatches] * ranks


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 16), microbatches=st.integers(1, 40))
def test_1f1b_idles_and_holds_what_the_report_says(ranks: int, microbatches: int) -> None:
    program = build("1f1b", ranks, microbatches)
    assert_whole_and_in_place(program)
    assert program.idle() == [(ranks - 1) * (F + B)] * ranks
    assert program.peak_tapes() == [min(ranks - rank, microbatches) for rank in range(ranks)]


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 16), microbatches=st.integers(1, 40), chunks=st.integers(1, 5))
def test_interleaved_idles_for_chunks_where_1f1b_does_for_stages(ranks: int, microbatches: int, chunks: int) -> None:
    program = build("interleaved", ranks, microbatches, chunks)
    assert_whole_and_in_place(program)
    assert program.placement == tuple(tuple(range(rank, ranks * chunks, ranks)) for rank in range(ranks))
    if microbatches >= ranks:
        assert program.idle() == [(ranks - 1) * (F + B)] * ranks  # of chunks, which cost 1/chunks of a rank's layers
    if microbatches % ranks == 0:
        held = [(chunks - 1) * ranks + 2 * (ranks - 1 - rank) + 1 for rank in range(ranks)]
        assert program.peak_tapes() == [min(each, chunks * microbatches) for each in held]


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 16), microbatches=st.integers(1, 40))
def test_zb_h1_idles_what_the_report_says_in_the_memory_of_1f1b(ranks: int, microbatches: int) -> None:
    program = build("zb-h1", ranks, microbatches)
    assert_whole_and_in_place(program)
    if microbatches >= ranks:
        assert program.idle() == [(ranks - 1) * (F + B - 2 * W)] * ranks
    assert program.peak_tapes() == [min(ranks - rank, microbatches) for rank in range(ranks)]
    assert peak_until_weights(program) == [min(ranks, microbatches)] * ranks


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 16), microbatches=st.integers(1, 40))
def test_zbv_idles_only_until_its_first_and_after_its_last_pass(ranks: int, microbatches: int) -> None:
    program = build("zbv", ranks, microbatches)
    assert_whole_and_in_place(program)
    assert max(peak_until_weights(program)) <= 2 * ranks
    if microbatches >= 2 * ranks - 1:
        starts = [ends[0] - F for ends in program.ends()]
        work = 2 * microbatches * (F + B)
        assert [ends[-1] - start for ends, start in zip(program.ends(), starts, strict=True)] == [work] * ranks
        assert program.idle() == [ranks - 1] * ranks
        assert program.peak_tapes() == [2 * ranks] * ranks


def peak_until_weights(program: Program) -> list[int]:
    """Most activations a rank holds, if those of a split backward are held until its weight half."""
    return [
        max(accumulate((p[0] == "F") - (p[0] in "BW") for ins in row for p in passes(ins))) for row in program.program
    ]


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    ranks=st.integers(1, 16),
    microbatches=st.integers(1, 64),
    chunks=st.integers(1, 4),
)
def test_every_number_of_micro_batches_that_a_schedule_divides_is_served(
    name: str, ranks: int, microbatches: int, chunks: int
) -> None:
    """A batch ramp changes it between steps. `build` runs the verifier."""
    multiple = SCHEDULES[name].multiple
    ranks += ranks % 2 if name == "dualpipe" else 0
    program = build(name, ranks, microbatches * multiple, chunks)
    assert_whole_and_in_place(program)
    assert (program.placement, program.stages) == (build(name, ranks, multiple, chunks).placement, program.stages)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 4, 8), ("dualpipe", 4, 6), ("zbv", 3, 5)])
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
        ("dualpipe", 4, 7, ["parallel.microbatches=7", "even"]),
        *((name, 0, 8, ["parallel.pipeline=0", "at least 1"]) for name in SCHEDULES),
        *((name, 4, 0, ["parallel.microbatches=0", "at least 1"]) for name in SCHEDULES),
        ("dualpip", 4, 8, ["parallel.schedule=dualpip", "did you mean 'dualpipe'", *SCHEDULES]),
        ("zigzag", 4, 8, ["parallel.schedule=zigzag", *SCHEDULES]),
    ],
)
def test_numbers_that_a_schedule_cannot_serve_are_refused(
    name: str, ranks: int, microbatches: int, words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        build(name, ranks, microbatches)
    assert all(word in str(refusal.value) for word in words)


def test_a_rank_without_chunks_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.chunks=0: expected at least 1"):
        build("interleaved", 4, 8, 0)
