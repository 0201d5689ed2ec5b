"""What the verifier refuses and with which words, and what it counts. (`test_mutations`: neither more nor less.)"""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from parallel.experts.lockstep import predict
from parallel.mesh import Mesh
from parallel.schedule import Instruction, Program, ProgramError, build, lower, verify
from tests.parallel.schedule.oracle import rendezvous
from tests.parallel.schedule.programs import of_every_schedule

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
        (0, swap(4, 5), "rank 0, position 4, W(3, 4): no weight gradient of stage 3 is deferred here"),
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
        (replace(program, ranks=4), "ranks=4: expected as many rows, found 3 of placement and 3 of program"),
        (replace(program, ranks=0, placement=(), program=()), "ranks=0: expected as many rows, found 0 of placement"),
        (replace(program, stages=0), "stages=0, microbatches=4: expected at least 1 of each"),
        (replace(program, microbatches=0), "stages=3, microbatches=0: expected at least 1 of each"),
        (replace(program, placement=((0,), (1,), (3,))), "placement, rank 2: holds 3; stages are 0 to 2"),
        (replace(program, placement=((0,), (1,), ("2",))), "placement, rank 2: holds '2'; stages are 0 to 2"),
        (replace(program, placement=((0,), (1, 1), (2,))), "placement, rank 1: holds stage 1 twice"),
        (replace(program, placement=((0,), (1,), (1,))), "placement: no rank holds stage 2"),
        (replace(program, placement=((0,), (1, 2), ())), "rank 2, position 0, F(2, 0): this rank holds stages none"),
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
        (0, swap(0, 2), "rank 0, position 0, F(0, 1): the program has F(0, 0) here"),
        (0, lambda row: row.pop(5), "rank 0, position 6, B(0, 1): the program has B(0, 0) here"),
        (0, lambda row: row.pop(1), "rank 0, position 8, the end: SEND(F, 0, 0, 1) is missing"),
        (0, lambda row: row.pop(7), "rank 0, position 7, R(0): before this rank's last weight gradient of the stage"),
        (0, lambda row: row.insert(1, row[1]), "rank 0, position 2, SEND(F, 0, 0, 1): stands here a second time"),
        (0, put(1, ("SEND", "F", 0, 0, 2)), "rank 0, position 1, SEND(F, 0, 0, 2): no such transfer or reduction"),
        (1, put(0, ("SEND", "F", 0, 0, 1)), "rank 1, position 0, SEND(F, 0, 0, 1): no such transfer or reduction"),
        (0, swap(3, 4), "waits for its other sides to come to it: rank 0, position 3, RECV(B, 1, 0, 1); rank 1, pos"),
        (1, list.pop, "rank 1, position 8, the end: R(1) is missing"),
        (1, swap(6, 8), "rank 1, position 6, R(1): before this rank's last weight gradient of the stage"),
        (1, lambda row: row.append(("R", 1)), "rank 1, position 9, R(1): stands here a second time"),
        (1, lambda row: row.append(("R", 0)), "rank 1, position 9, R(0): no such transfer or reduction belongs"),
        (1, lambda row: row.append(("R",)), "rank 1, position 9, R(): no such transfer or reduction belongs"),
        (1, lambda row: row.append(("B", 1, 1)), "rank 1, position 9, B(1, 1): the program has ended here"),
        (1, lambda row: row.append(("Z", 3)), "rank 1, position 9: unknown instruction ['Z', 3]"),
        (1, lambda row: row.append(()), "rank 1, position 9: unknown instruction []"),
    ],
)  # fmt: skip
def test_a_broken_lowering_is_refused_with_place_and_cause(rank: int, edit: Edit, words: str) -> None:
    program = build("1f1b", 2, 2)
    lowered = lower(program)
    edit(lowered[rank])
    with pytest.raises(ProgramError) as refusal:
        verify(program, lowered)
    assert words in str(refusal.value)


# Lowered DualPipe of 2 ranks and 4 micro-batches, where both ranks hold both stages, ends with
#   rank 0: B(1,3) SEND(B,1,3,1) RECV(B,1,1,1) R(1) I(0,1) W(0,1) R(0)
#   rank 1: B(1,1) RECV(B,1,3,0) SEND(B,1,1,0) R(1) I(0,3) W(0,3) R(0)
@pytest.mark.parametrize(
    ("order", "words"),
    [
        (
            [-7, -6, -4, -5, -3, -2, -1],  # reduces before its peer can have sent
            "deadlock: each of these waits for its other sides to come to it: rank 0, position 13, R(1); "
            "rank 1, position 13, SEND(B, 1, 1, 0)",
        ),
        (
            [-7, -6, -5, -3, -2, -1, -4],  # reduces its stages in the other order
            "deadlock: each of these waits for its other sides to come to it: rank 0, position 16, R(0); "
            "rank 1, position 14, R(1)",
        ),
        ([-4, -7, -6, -5, -3, -2, -1], "position 11, R(1): before this rank's last weight gradient of the stage"),
        ([-7, -6, -5, -3, -2, -1], "rank 0, position 17, the end: R(1) is missing"),
        ([-7, -6, -5, -4, -4, -3, -2, -1], "rank 0, position 15, R(1): stands here a second time"),
    ],
)
def test_the_holders_of_a_stage_must_come_to_its_reduction_together(order: list[int], words: str) -> None:
    program = build("dualpipe", 2, 4)
    lowered = lower(program)
    lowered[0][-7:] = [lowered[0][at] for at in order]
    with pytest.raises(ProgramError, match=re.escape(words)):
        verify(program, lowered)


def test_a_deferred_weight_gradient_leaves_in_the_order_of_its_stage() -> None:
    late = edited(build("zb-h1", 2, 4), 1, swap(-1, -2))
    with pytest.raises(ProgramError, match=re.escape("rank 1, position 10, W(1, 3): ") + ".* oldest .* W.1, 2."):
        verify(late)
    other_stage = edited(build("dualpipe", 4, 8), 1, swap(-1, -2))  # W(2,7) W(1,3): each stage has its own queue
    verify(other_stage)


def test_a_pair_cannot_hold_a_backward_and_its_own_forward() -> None:
    program = Program("train", 1, 1, 1, ((0,),), ((("FB", 0, 0, 0, 0),),))
    words = "rank 0, position 0, FB(0, 0, 0, 0): a backward cannot run beside its own forward"
    with pytest.raises(ProgramError, match=re.escape(words)):
        verify(program)


def test_lowered_lists_are_one_for_each_rank() -> None:
    program = build("1f1b", 2, 2)
    with pytest.raises(ProgramError, match="lowered: 1 rows for 2 ranks"):
        verify(program, lower(program)[:1])


def test_live_activations_and_pending_weight_gradients_are_counted() -> None:
    for program in of_every_schedule((2, 4), (4, 8), (4, 6), (3, 7)):
        workers = rendezvous(program, lower(program))
        assert program.peak_tapes() == [worker.peak_tapes for worker in workers]
        assert program.peak_deferred() == [worker.peak_deferred for worker in workers]
    assert build("zb-h1", 4, 8).peak_deferred() == [1, 2, 3, 4]
    assert build("1f1b", 4, 8).peak_deferred() == [0, 0, 0, 0]


# Expert collectives: a group's ranks are at one position of the pipeline, so they run one row; and lowering, whatever
# the costs, leaves the row's order, from which alone the collectives' order follows.
@pytest.mark.parametrize(("pipeline", "data", "context", "expert"), [(2, 4, 1, 2), (4, 2, 2, 4), (3, 6, 1, 3)])
def test_an_expert_group_shares_one_row(pipeline: int, data: int, context: int, expert: int) -> None:
    for rank in range(pipeline * data * context):
        group = Mesh(pipeline, data, context, expert, rank, node_size=8).expert_ranks()
        positions = {Mesh(pipeline, data, context, expert, each, node_size=8).pipeline_rank for each in group}
        assert rank in group and len(positions) == 1


def test_expert_collectives_come_in_one_order_whatever_the_timing() -> None:
    for program in of_every_schedule((4, 8)):
        visits = {stage: [("dispatch", stage), ("combine", stage)] for stage in range(program.stages)}
        for factor in (0.2, 1, 7):
            lowered = lower(program, {"F": 1, "B": 2 * factor, "I": factor, "W": 1, "FB": 3}, delay=factor)
            verify(program, lowered)
            rows = tuple(tuple(ins for ins in row if ins[0] not in ("SEND", "RECV", "R")) for row in lowered)
            for rank in range(program.ranks):
                assert predict(replace(program, program=rows), rank, visits) == predict(program, rank, visits)


def test_lowered_lists_that_change_the_order_of_expert_collectives_are_refused() -> None:
    program = build("1f1b", 1, 2)  # alone on its pipeline, a rank could exchange these without harm to itself
    lowered = [[("F", 0, 1), ("B", 0, 1), ("F", 0, 0), ("B", 0, 0), ("R", 0)]]
    rendezvous(program, lowered)
    with pytest.raises(ProgramError, match=re.escape("rank 0, position 0, F(0, 1): the program has F(0, 0) here")):
        verify(program, lowered)
