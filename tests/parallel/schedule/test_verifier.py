"""What the verifier refuses, with which words, and that it refuses neither more nor less than it should."""

from collections.abc import Callable
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import Instruction, Program, ProgramError, build, lower, verify
from parallel.schedule.program import makes, needs, passes

Row = list[Instruction]
Edit = Callable[[Row], object]


def edited(program: Program, rank: int, edit: Edit) -> Program:
    """The program with `edit` applied to a copy of one rank's list."""
    rows = [list(instructions) for instructions in program.program]
    edit(rows[rank])
    return replace(program, program=tuple(map(tuple, rows)))


def swap(first: int, second: int) -> Edit:
    def edit(row: Row) -> None:
        row[first], row[second] = row[second], row[first]

    return edit


def put(at: int, ins: Instruction) -> Edit:
    return lambda row: row.__setitem__(at, ins)


# DualPipe of 4 ranks and 8 micro-batches, rank 0:
#  0 F(0,0)  1 F(0,1)  2 F(0,2)  3 F(3,4)  4 I(3,4)  5 W(3,4)  6 F(3,5)  7 FB(0,3,3,5)  8 FB(3,6,0,0)  9 B(3,6)
# 10 FB(3,7,0,1)  11 B(3,7)  12 I(0,2)  13 W(0,2)  14 I(0,3)  15 W(0,3)
@pytest.mark.parametrize(
    ("rank", "edit", "words"),
    [
        (0, put(2, ("X", 0, 2)), "rank 0, position 2: unknown instruction ['X', 0, 2]"),
        (0, put(2, ("F", 0)), "rank 0, position 2: unknown instruction ['F', 0]"),
        (0, put(2, ("F", 0, "2")), "rank 0, position 2: unknown instruction ['F', 0, '2']"),
        (0, put(2, ()), "rank 0, position 2: unknown instruction []"),
        (0, put(2, ("F", 0, 8)), "rank 0, position 2, F(0, 8): micro-batches are 0 to 7"),
        (0, put(2, ("F", 1, 2)), "rank 0, position 2, F(1, 2): this rank holds stages 0, 3, not 1"),
        (0, put(2, ("F", 0, 1)), "rank 0, position 2, F(0, 1): the second forward of stage 0, micro-batch 1"),
        (3, lambda row: row.append(("F", 0, 1)), "rank 3, position 16, F(0, 1): rank 0 runs this forward too"),
        (0, swap(3, 4), "rank 0, position 3, I(3, 4): before the forward of stage 3, micro-batch 4"),
        (0, put(9, ("B", 3, 5)), "rank 0, position 9, B(3, 5): the second backward of stage 3, micro-batch 5"),
        (3, lambda row: row.append(("B", 0, 1)), "rank 3, position 16, B(0, 1): the forward of stage 0, micro-batch 1"),
        (0, swap(4, 5), "rank 0, position 4, W(3, 4): no weight gradient is deferred here"),
        (1, swap(13, 14), "rank 1, position 13, W(1, 3): the oldest deferred weight gradient is W(2, 7)"),
        (0, list.pop, "rank 0, position 15, the end: the deferred weight gradient W(0, 3) has not run"),
        (0, lambda row: row.pop(9), "rank 0, position 15, the end: the backward of F(3, 6) has not run"),
        (0, lambda row: row.clear(), "rank 0, position 0 or rank 3, position 16, the end: F(0, 0) has not run"),
        (0, swap(0, 3), "circle: rank 0, position 0, F(3, 4) for what F(2, 4) makes; rank 1, position 0, F(1, 0)"),
    ],
)  # fmt: skip
def test_a_broken_program_is_refused_with_place_and_cause(rank: int, edit: Edit, words: str) -> None:
    program = edited(build("dualpipe", 4, 8), rank, edit)
    with pytest.raises(ProgramError) as refusal:
        verify(program)
    assert words in str(refusal.value)


def test_placement_and_kind_are_checked() -> None:
    program = build("1f1b", 3, 4)
    for broken, words in [
        (replace(program, kind="test"), "kind='test': expected one of train, eval"),
        (replace(program, kind="eval"), "rank 0, position 3: unknown instruction ['B', 0, 0]; expected F,"),
        (replace(program, ranks=4), "ranks=4: expected as many rows"),
        (replace(program, placement=((0,), (1,), (3,))), "placement: holds other stages than 0 to 2"),
        (replace(program, microbatches=5), "rank 0, position 8, the end: F(0, 4) has not run"),
    ]:
        with pytest.raises(ProgramError) as refusal:
            verify(broken)
        assert words in str(refusal.value)


# Lowered 1F1B of 2 ranks and 2 micro-batches:
#   rank 0: F(0,0) SEND(F,0,0,1) F(0,1) SEND(F,0,1,1) RECV(B,1,0,1) B(0,0) RECV(B,1,1,1) B(0,1) R(0)
#   rank 1: RECV(F,0,0,0) RECV(F,0,1,0) F(1,0) B(1,0) SEND(B,1,0,0) F(1,1) B(1,1) SEND(B,1,1,0) R(1)
@pytest.mark.parametrize(
    ("rank", "edit", "words"),
    [
        (0, swap(0, 1), "rank 0, position 0, SEND(F, 0, 0, 1): the message has not been made yet"),
        (1, swap(0, 2), "rank 1, position 0, F(1, 0): its input from F(0, 0) has not been received yet"),
        (0, swap(0, 2), "rank 0, position 0, F(0, 1): the program has ('F', 0, 0) here"),
        (0, lambda row: row.pop(5), "rank 0, position 6, B(0, 1): the program has ('B', 0, 0) here"),
        (0, lambda row: row.pop(1), "rank 0, position 8, the end: ('SEND', 'F', 0, 0, 1) is missing"),
        (0, lambda row: row.insert(1, row[1]), "SEND(F, 0, 0, 1): no such transfer belongs here, or it"),
        (0, put(1, ("SEND", "F", 0, 0, 2)), "rank 0, position 1, SEND(F, 0, 0, 2): no such transfer belongs here"),
        (0, swap(3, 4), "waits for its other side to come to it: rank 0, position 3, RECV(B, 1, 0, 1)"),
        (1, list.pop, "rank 1, position 8, the end: ('R', 1) is missing"),
        (1, swap(6, 8), "rank 1, position 6, R(1): not once and after the last weight gradient of the stage"),
        (1, lambda row: row.append(("R", 1)), "rank 1, position 9, R(1): not once"),
        (1, lambda row: row.append(("Z",)), "rank 1, position 9, Z(): the program has ended here"),
    ],
)  # fmt: skip
def test_a_broken_lowering_is_refused_with_place_and_cause(rank: int, edit: Edit, words: str) -> None:
    program = build("1f1b", 2, 2)
    lowered = lower(program)
    edit(lowered[rank])
    with pytest.raises(ProgramError) as refusal:
        verify(program, lowered)
    assert words in str(refusal.value)


def is_sound(program: Program) -> bool:
    """The oracle, by other means: the history of each (stage, micro-batch), and a graph of all waits with no cycle."""
    history: dict[tuple[int, int], list[tuple[int, str]]] = {}
    order: TopologicalSorter[tuple] = TopologicalSorter()
    at_work = [(rank, at, ins) for rank, row in enumerate(program.program) for at, ins in enumerate(row)]
    makers = {msg: (rank, at) for rank, at, ins in at_work for msg in makes(program, ins)}
    for rank, at, ins in at_work:
        order.add((rank, at), (rank, at - 1), *(makers.get(msg, ()) for msg in needs(program, ins)))
        for kind, stage, mb in passes(ins):
            history.setdefault((stage, mb), []).append((rank, kind))
    for row in program.program:
        inputs, weights = ([p[1:] for ins in row for p in passes(ins) if p[0] == kind] for kind in "IW")
        if inputs != weights:
            return False
    whole = [[(rank, kind) for kind in kinds] for rank in range(program.ranks) for kinds in ("FB", "FIW")]
    everything = {(stage, mb) for stage in range(program.stages) for mb in range(program.microbatches)}
    if set(history) != everything or not all(each in whole for each in history.values()):
        return False
    if any(stage not in program.placement[each[0][0]] for (stage, _), each in history.items()):
        return False
    try:
        order.prepare()
    except CycleError:
        return False
    return True


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_verifier_agrees_with_the_oracle_on_random_corruptions(data: st.DataObject) -> None:
    name, ranks, microbatches = data.draw(st.sampled_from([("dualpipe", 4, 8), ("dualpipe", 4, 4), ("1f1b", 3, 5)]))
    program = build(name, ranks, microbatches)
    rank = data.draw(st.integers(0, ranks - 1))
    row = program.program[rank]
    at = data.draw(st.integers(0, len(row) - 2))
    match data.draw(st.sampled_from(["swap", "swap", "swap", "drop", "duplicate", "move"])):
        case "swap":
            broken = edited(program, rank, swap(at, min(at + data.draw(st.integers(1, 3)), len(row) - 1)))
        case "drop":
            broken = edited(program, rank, lambda row: row.pop(at))
        case "duplicate":
            broken = edited(program, rank, lambda row: row.insert(data.draw(st.integers(0, len(row))), row[at]))
        case _:
            other = data.draw(st.integers(0, ranks - 1))
            place = data.draw(st.integers(0, len(program.program[other]) - 1))
            broken = edited(edited(program, rank, lambda row: row.pop(at)), other, lambda r: r.insert(place, row[at]))
    try:
        verify(broken)
        accepted = True
    except ProgramError:
        accepted = False
    assert accepted == is_sound(broken)
