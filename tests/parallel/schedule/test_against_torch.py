"""weft's programs equal those of `torch.distributed.pipelining`, action by action.

torch's schedules work a step out when they are constructed, from no more than the number and place of their stages, so
stand-ins for stages are enough. `Schedule1F1B` alone lists something else than it runs (in torch 2.13 the last rank's
forwards are numbered from 1): there, what it asks of its stage is written down as it goes.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from parallel.schedule import Instruction, Program, generate

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def stand_ins(ranks: int, chunks: int) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            num_stages=ranks * chunks, group_size=ranks, group_rank=0, stage_index=chunk * ranks, submod=None
        )
        for chunk in range(chunks)
    ]


def listed(schedule: Any) -> tuple[tuple[Instruction, ...], ...]:
    """What a schedule of torch's lists for each rank, without its waits and reductions, in weft's words."""

    def one(action: Any) -> Instruction:
        return (KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)

    def translate(action: Any) -> Instruction:
        if action.computation_type.name == "OVERLAP_F_B":
            forward, backward = map(one, action.sub_actions)
            assert (forward[0], backward[0]) == ("F", "B")
            return ("FB", *forward[1:], *backward[1:])
        return one(action)

    order = schedule.pipeline_order
    return tuple(
        tuple(translate(each) for each in order[rank] if each and each.computation_type.name != "REDUCE_GRAD")
        for rank in sorted(order)
    )


class Recorder:
    """A stage that exchanges nothing, computes nothing, and writes down what it is asked to run."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.stage_index, self.num_stages = rank, ranks
        self.is_first, self.is_last = rank == 0, rank == ranks - 1
        self.ran: list[Instruction] = []

    def forward_one_chunk(self, mb: int, *args: Any, **kwargs: Any) -> None:
        self.ran.append(("F", self.stage_index, mb))

    def backward_one_chunk(self, mb: int, *args: Any, **kwargs: Any) -> None:
        self.ran.append(("B", self.stage_index, mb))

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        return lambda *args, **kwargs: []  # get_fwd_recv_ops and so on


def run(schedule: type, ranks: int, microbatches: int) -> tuple[tuple[Instruction, ...], ...]:
    rows = []
    for rank in range(ranks):
        stage = Recorder(rank, ranks)
        step = schedule(stage, microbatches)
        step._initialize_stage = lambda *args: None
        step._step_microbatches()
        rows.append(tuple(stage.ran))
    return tuple(rows)


def sizes(least: Callable[[int], int] = lambda ranks: 1) -> list[tuple[int, int]]:
    """Every number of ranks up to 6 with every number of micro-batches up to 3P+3, and some larger ones."""
    small = [(ranks, n) for ranks in range(1, 7) for n in range(1, 3 * ranks + 4)]
    large = [(8, 5), (8, 8), (8, 16), (8, 20), (12, 30), (16, 15), (16, 32), (16, 120)]
    return [(ranks, n) for ranks, n in small + large if n >= least(ranks)]


def assert_equal(program: Program, rows: tuple[tuple[Instruction, ...], ...]) -> None:
    for rank, (mine, theirs) in enumerate(zip(program.program, rows, strict=True)):
        assert mine == theirs, f"{program.ranks} ranks, {program.microbatches} micro-batches, rank {rank}"


def test_gpipe() -> None:
    for ranks, n in sizes():
        assert_equal(generate("gpipe", ranks, n), run(torch_schedules.ScheduleGPipe, ranks, n))


def test_1f1b() -> None:
    for ranks, n in sizes(least=lambda ranks: ranks):  # torch refuses fewer
        program = generate("1f1b", ranks, n)
        assert_equal(program, run(torch_schedules.Schedule1F1B, ranks, n))
        assert program.program[:-1] == listed(torch_schedules.Schedule1F1B(stand_ins(ranks, 1)[0], n))[:-1]


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_interleaved(chunks: int) -> None:
    for ranks, n in sizes():
        if n % max(1, n // ranks) == 0:  # torch's rounds are all equal
            theirs = torch_schedules.ScheduleInterleaved1F1B(stand_ins(ranks, chunks), n)
            assert_equal(generate("interleaved", ranks, n, chunks), listed(theirs))


def test_zb_h1() -> None:
    for ranks, n in sizes():
        if n % max(1, n // ranks) == 0:
            theirs = torch_schedules.ScheduleInterleavedZeroBubble(stand_ins(ranks, 1), n)
            assert_equal(generate("zb-h1", ranks, n), listed(theirs))


def test_zbv() -> None:
    for ranks, n in sizes():
        theirs = torch_schedules.ScheduleZBVZeroBubble(stand_ins(ranks, 2), n)
        assert_equal(generate("zbv", ranks, n), listed(theirs))


def test_dualpipev() -> None:
    for ranks, n in sizes(least=lambda ranks: 2 * ranks):  # torch refuses fewer
        theirs = torch_schedules.ScheduleDualPipeV(stand_ins(ranks, 2), n)
        assert_equal(generate("dualpipev", ranks, n), listed(theirs))
