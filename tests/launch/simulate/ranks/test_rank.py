"""A rank of a fake world against ranks of a real one: what it says, and what it holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.simulate import result
from launch.simulate.cluster import sheet
from launch.simulate.memory import stays
from launch.simulate.ranks import rank as simulated
from launch.simulate.ranks.communication import Call, disagreements
from launch.simulate.ranks.witness import Witness
from launch.simulate.stages.world import study_stages
from parallel import schedule
from parallel.errors import UserError
from parallel.mesh import Mesh
from train.compose import CommandLine, recipe_of
from train.recipe import Recipe
from train.trainer import Trainer

SMALL = ["recipe=tiny", "train.sequence_length=64", "train.batch.start=16", "train.force_balanced=true"]


def recipe(*words: str) -> Recipe:
    line = CommandLine.read([*SMALL, *words], sweep=False)
    return recipe_of(line.compose(), line.name).validate(data=False)


def real_step() -> tuple[list[Call], dict[str, simulated.Buffers]]:
    """The same trainer on a rank of gloo."""
    one, witness = simulated.one_step(recipe("parallel.node_size=4")), Witness()
    with witness, simulated.without_files(one):
        trainer = Trainer(one, torch.device("cpu"))
        trainer.fit()
    return witness.calls, simulated.buffers(trainer.engine)


def test_a_fake_rank_says_and_holds_what_a_real_one_does(workers):
    real = workers(4).run(real_step, timeout=400)
    fake = {rank: simulated.step(recipe("parallel.node_size=4"), rank) for rank in (0, 3)}
    for rank, one in fake.items():
        assert one.calls == real[rank][0]
        assert one.buffers == real[rank][1]
    assert disagreements({rank: calls for rank, (calls, _) in enumerate(real)}) == []


@pytest.mark.slow
def test_the_memory_plan_counts_the_buffers_that_are_there():
    found = recipe("parallel.node_size=4")
    layout = found.parallel
    program = schedule.build(layout.schedule, layout.pipeline, 8)
    stages = study_stages(found, program.placement)
    mesh = Mesh(layout.pipeline, layout.data, layout.context, layout.expert, 0, 4)
    for rank in (0, 2):
        one = simulated.step(found, rank)
        planned = stays({*one.stages}, stages, program, mesh, found.optim.moments)
        assert planned["parameters"] == pytest.approx(one.buffers["parameters"].bytes, rel=1e-4)  # there is padding
        assert planned["gradients"] == pytest.approx(one.buffers["gradients"].bytes, rel=1e-4)
        share = one.buffers["masters"].bytes + one.buffers["moments"].bytes
        assert planned["optimizer"] == pytest.approx(share, rel=1e-4)


@pytest.mark.slow
def test_passes_that_are_repeated_say_and_hold_what_passes_say_and_hold():
    found = recipe("parallel.node_size=4", "train.recompute=[norms,swiglu]")
    repeated, run = (simulated.step(found, 0, repeat) for repeat in (True, False))
    assert repeated.calls == run.calls
    assert repeated.peak == pytest.approx(run.peak, rel=0.01)


# ---------------------------------------------------------------- the command
def test_the_command_tells_of_a_rank(capsys):
    assert main(["simulate", *SMALL, "rank=3", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    [one] = found["ranks"]
    assert (one["rank"], one["pipeline"], one["stages"]) == (3, 1, [0, 1])
    assert {each["use"] for each in one["communication"]} >= {"world", "all-to-all", "dense", "experts"}
    assert found["disagreements"] == []


@pytest.mark.slow
def test_the_console_gets_the_tables_and_nothing_else():
    words = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())", "simulate", *SMALL]
    done = subprocess.run([*words, "rank=0"], cwd=Path(__file__).parents[4], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("h800x2048: rank 0 of 4: ")


def test_ranks_are_chosen_by_number_list_span_or_all():
    found = recipe()
    assert simulated.chosen("3", found) == [3]
    assert simulated.chosen("0,2-3", found) == [0, 2, 3]
    assert simulated.chosen("all", found) == [0, 2]


@pytest.mark.parametrize("word", ["4", "-1", "x", "3-1", ""])
def test_a_rank_that_the_layout_lacks_is_named(word):
    with pytest.raises(UserError, match=rf"rank={word}: expected a rank of 0 .. 3"):
        simulated.chosen(word, recipe())


@pytest.mark.slow
def test_v3_is_looked_at_at_any_rank_of_2048():
    line = CommandLine.read(["recipe=v3"], sweep=False)
    found = recipe_of(line.compose(), line.name).validate(data=False)
    result.place(found, sheet.read("h800x2048"))
    one = simulated.step(found, 300)
    assert (one.stages, one.microbatches) == ([2, 13], 120)
    groups = {(group.use, len(group.ranks)) for group, _, _ in one.spoken()}
    assert groups >= {("world", 2048), ("dense", 256), ("experts", 4), ("across nodes", 8), ("in node", 8)}
    rows = 4096 * 7168 * 2  # a message: the hidden states of a micro-batch in BF16
    assert {call.bytes for call in one.calls if call.peer is not None} == {rows}
    assert {call.peer for call in one.calls if call.peer is not None} == {300 - 128, 300 + 128}
