"""All ranks of a small cluster, each for itself, give the step that one pipeline stands for, or wait for the slow."""

from dataclasses import replace

import pytest

from kernels.ops import Cost
from launch.simulate import result
from launch.simulate.cluster import sheet
from launch.simulate.cluster.sheet import Link
from launch.simulate.stages.work import Exchange, Operator, PassWork, Piece, Read, StageWork
from launch.simulate.step import engine, skew
from launch.simulate.step.everyone import Cluster, step_seconds
from launch.simulate.step.update import update
from parallel import schedule
from parallel.mesh import Mesh
from parallel.schedule import SCHEDULES
from tests.launch.simulate.step.test_engine import UNIT
from train.compose import compose

SHEET = replace(
    UNIT,
    across=Link(7.0, 0.1),
    inside=Link(11.0, 0.01),
    exchange=Link(3.0, 0.05),
    exchange_alone=Link(5.0, 0.04),
    node_size=4,
    gap=0.02,
    read=0.03,
)
MESH = Mesh(4, 4, 1, 2, rank=0, node_size=4)


def piece(seconds, name="mlp"):
    return Piece(name, 0, [Operator("copy", Cost(0, seconds))])


def stage(number):
    """Its passes differ from those of the other stages; every one exchanges twice."""
    more = 0.1 * number

    def one(seconds, afterwards=None):
        out, back = Exchange("dispatch", 2, 3), Exchange("combine", 1, 2)
        return PassWork([piece(seconds), out, Read("counts"), piece(seconds + more), back, piece(0.5)], afterwards)

    weights = piece(0.75, "weights.W")
    passes = {"F": one(1), "B": one(1.5, weights), "I": one(1.25), "W": PassWork([weights])}
    return StageWork(passes, [], 0, 0, 2, 40, 0, 60, 2, 4)


def shortcut(program, stages, mesh=MESH, cluster=SHEET, differ=None):
    """One pipeline for all, with its gradients, as `result.simulate` has it."""
    timeline = engine.run(program, stages, cluster, near=engine.neighbours(mesh), skew=differ)
    return timeline, timeline.seconds + update(program, stages, timeline, mesh, cluster, "bf16").seconds


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_that_are_alike_do_what_one_pipeline_does(name):
    program = schedule.build(name, 4, 8)
    stages = {number: stage(number) for number in range(program.stages)}
    one, seconds = shortcut(program, stages)
    everyone = Cluster(program, stages, SHEET, MESH)
    for column in everyone.run():
        for mine, its in zip(column.ranks, one.ranks, strict=True):
            assert [slot.instruction for slot in mine] == [slot.instruction for slot in its]
            assert [t for slot in mine for t in (slot.begin, slot.end)] == pytest.approx(
                [t for slot in its for t in (slot.begin, slot.end)], rel=1e-12
            )
            for name in ("exposed", "weights", "compute", "ready"):
                assert [getattr(slot.race, name) for slot in mine] == pytest.approx(
                    [getattr(slot.race, name) for slot in its], abs=1e-9
                )
        assert sorted(message for message, *_ in column.messages) == sorted(message for message, *_ in one.messages)
    assert step_seconds(everyone, "bf16") == pytest.approx(seconds, rel=1e-12)


def test_the_recipes_own_stages_with_experts_on_two_nodes():
    words = ["recipe=tiny", "parallel.pipeline=2", "parallel.data=4", "parallel.expert=4", "parallel.node_size=2"]
    recipe, h800 = compose([*words, "parallel.schedule=dualpipe"]), sheet.read("h800x2048")
    found = result.simulate(recipe, h800)
    mesh = Mesh(2, 4, 1, 4, rank=0, node_size=2)
    cluster = Cluster(found.program, found.stages, h800, mesh)
    assert [each.seconds for each in cluster.run()] == pytest.approx([found.timeline.seconds] * 4, rel=1e-12)


def test_a_slow_rank_holds_up_its_expert_group_and_at_the_end_everybody():
    program = schedule.build("dualpipe", 4, 8)
    stages = {number: stage(number) for number in range(4)}
    alike = Cluster(program, stages, SHEET, MESH)
    slow = Cluster(program, stages, SHEET, MESH, slower=lambda rank: 1.5 if rank == 4 else 1.0)
    near, mate, far, farther = (column.seconds for column in slow.run())
    quick = alike.run()[0].seconds
    assert near > 1.1 * quick and mate > 1.1 * quick, "pipelines 0 and 1 share expert groups"
    assert far == farther == pytest.approx(quick), "2 and 3 have their own"
    assert step_seconds(slow, "bf16") >= max(near, mate), "but the gradients of all are summed together"


def test_drawn_ranks_are_between_none_and_all_waiting_at_every_instruction():
    program = schedule.build("dualpipe", 4, 8)
    stages = {number: stage(number) for number in range(4)}
    drawn = skew.Skew(skew.Noise(jitter=0.1, seed=3), SHEET, 2, 2, False, stages, {})
    mesh = replace(MESH, data=2)
    plain, bound = shortcut(program, stages, mesh)[0], shortcut(program, stages, mesh, differ=drawn)[0]
    both = Cluster(program, stages, SHEET, mesh, unlike=lambda group: drawn).run()
    for column in both:
        assert 0.9 * plain.seconds < column.seconds <= bound.seconds * (1 + 1e-12)
    assert max(column.seconds for column in both) > plain.seconds


def test_ranks_that_wait_for_each_other_are_refused():
    program = schedule.build("1f1b", 4, 8)
    stages = {number: stage(number) for number in range(4)}
    first, second, *others = program.program
    broken = replace(program, program=(first[::-1], second, *others))
    with pytest.raises(schedule.ProgramError, match="circle"):
        Cluster(broken, stages, SHEET, MESH).run()
