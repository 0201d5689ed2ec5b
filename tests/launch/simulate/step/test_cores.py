"""Ranks that share cores: a step takes longer by exactly what there are too few of them, and no more."""

import dataclasses

import pytest

from launch.simulate.cluster.sheet import Cores, Link, Sheet
from launch.simulate.step import cores, engine
from parallel import schedule
from tests.launch.simulate.step.test_engine import UNIT, stage

AT_ONCE = Link(float("inf"), 0.0)
SCHEDULES = [("1f1b", 4, 8), ("dualpipe", 4, 8), ("zbv", 2, 6), ("gpipe", 2, 4)]


def machine(count: int, together: float = 1.0, message: Link = AT_ONCE) -> Sheet:
    return dataclasses.replace(UNIT, cores=Cores(count, together, 0.0, message))


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SCHEDULES)
def test_with_a_core_for_each_rank_the_step_is_the_engines(name: str, ranks: int, microbatches: int) -> None:
    program = schedule.build(name, ranks, microbatches)
    stages = {number: stage() for number in range(program.stages)}
    expected = engine.run(program, stages, UNIT)
    found = cores.run(program, stages, machine(ranks), 1)
    assert found.seconds == pytest.approx(expected.seconds)
    for mine, theirs in zip(found.ranks, expected.ranks, strict=True):
        assert [slot.instruction for slot in mine] == [slot.instruction for slot in theirs]
        assert [slot.begin for slot in mine] == pytest.approx([slot.begin for slot in theirs], abs=1e-6)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SCHEDULES)
def test_on_one_core_a_step_takes_the_work_of_all_ranks(name: str, ranks: int, microbatches: int) -> None:
    program = schedule.build(name, ranks, microbatches)
    stages = {number: stage() for number in range(program.stages)}
    work = sum(slot.race.compute for row in engine.run(program, stages, UNIT).ranks for slot in row)
    assert cores.run(program, stages, machine(1), 1).seconds == pytest.approx(work)
    assert cores.run(program, stages, machine(1), 3).seconds == pytest.approx(3 * work)


def test_busy_cores_are_slower_together() -> None:
    assert cores.speed(Cores(4, 1.5, 0.0, AT_ONCE), 1) == 1
    assert cores.speed(Cores(4, 1.5, 0.0, AT_ONCE), 4) == pytest.approx(1 / 1.5)
    assert cores.speed(Cores(4, 1.5, 0.0, AT_ONCE), 8) == pytest.approx(0.5 / 1.5)
    assert cores.speed(Cores(4, 1.5, 0.0, AT_ONCE, crowded=2.0), 8) == pytest.approx(0.5 / 2.0)
    assert cores.speed(Cores(1, 1.0, 0.0, AT_ONCE), 2) == 0.5


def test_sending_and_receiving_take_a_cores_time() -> None:
    program = schedule.build("1f1b", 2, 4)
    stages = {number: dataclasses.replace(stage(), message=1) for number in range(2)}
    free = cores.run(program, stages, machine(1), 1).seconds
    paid = cores.run(program, stages, machine(1, message=Link(float("inf"), 0.25)), 1).seconds
    assert paid - free == pytest.approx(0.25 * 2 * 2 * 4)  # both sides, forwards and backwards, four micro-batches


def test_ranks_are_as_fast_as_the_cores_that_they_keep() -> None:
    program = schedule.build("1f1b", 2, 4)
    stages = {number: stage() for number in range(2)}
    alike = cores.run(program, stages, machine(2), 1)

    def paced(count: int, *paces: float) -> Sheet:
        return dataclasses.replace(UNIT, cores=Cores(count, 1.0, 0.0, AT_ONCE, paces=paces))

    both = cores.run(program, stages, paced(2, 1.5, 1.5), 1)
    assert both.seconds == pytest.approx(1.5 * alike.seconds)
    one = cores.run(program, stages, paced(2, 1.0, 1.5), 1)
    assert alike.seconds < one.seconds < both.seconds
    fast, slow = (sum(slot.end - slot.begin for slot in row) for row in one.ranks)
    assert slow == pytest.approx(1.5 * fast)


def test_replicas_wait_for_the_slowest_core_and_a_crowd_has_all_of_them() -> None:
    unlike = Cores(4, 1.0, 0.0, AT_ONCE, paces=(1.0, 2.0, 1.0, 4.0))
    assert cores.own_speed(unlike, 4, 1) == [1, 1 / 2, 1, 1 / 4]
    assert cores.own_speed(unlike, 2, 2) == [1 / 2, 1 / 4]
    assert cores.own_speed(unlike, 4, 2) == [(1 + 1 / 2 + 1 + 1 / 4) / 4] * 4
    assert cores.own_speed(Cores(2, 1.0, 0.0, AT_ONCE), 2, 1) == [1, 1]
