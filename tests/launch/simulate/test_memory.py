"""What a simulated rank holds, instruction by instruction, against what lives on a rank that trains."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from launch.simulate import memory, result
from launch.simulate.cluster.sheet import read
from launch.simulate.memory import Peak
from launch.simulate.ranks import rank
from launch.simulate.ranks.witness import Witness
from launch.simulate.stages import world
from launch.simulate.stages.storage import Parts
from parallel import schedule
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.schedule.program import Program, passes
from train.compose import CommandLine, recipe_of
from train.recipe import Recipe
from train.trainer import Trainer

SMALL = ("recipe=tiny", "train.sequence_length=128", "train.force_balanced=true", "model.num_hidden_layers=4")


def recipe(*words: str) -> Recipe:
    line = CommandLine.read([*SMALL, *words], sweep=False)
    return rank.one_step(recipe_of(line.compose(), line.name).validate(data=False))


def simulated(*words: str) -> tuple[list[Peak], Program]:
    """Peaks without an allowance for fragments, and the program."""
    one = recipe(*words)
    result.place(one, read("h800x2048"))
    layout, moments = one.parallel, one.optim.moments
    program = schedule.build(layout.schedule, layout.pipeline, one.microbatches(8, "train.batch.start"), layout.chunks)
    stages = world.study_stages(one, program.placement)
    mesh = Mesh(layout.pipeline, layout.data, layout.context, layout.expert, rank=0, node_size=8)
    with patch.object(memory, "FRAGMENTED", 0.0):
        return memory.peaks(program, stages, mesh, moments), program


# ---------------------------------------------------------------- against ranks that train
class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Parts("working")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.memory.see((args, kwargs), made)
        return made


def really_held(*words: str) -> list[int]:
    """Most bytes of this process's tensors from the beginning of each instruction of a step to that of the next."""
    one, alive, found = recipe(*words), Alive(), list[int]()
    compute = Pipeline._compute

    def watched(self: Pipeline, *instruction: Any) -> None:
        found.append(alive.memory.peak)
        alive.memory.begin()
        compute(self, *instruction)

    with alive, rank.without_files(one), patch.object(Pipeline, "_compute", watched):
        Trainer(one, torch.device("cpu")).fit()
    return found[1:]


def dreamt(*words: str) -> list[int]:
    """The same of rank 0 in a world of fake tensors."""
    found, witnesses = list[int](), list[Witness]()
    compute, init = Pipeline._compute, Witness.__init__

    def made(self: Witness) -> None:
        init(self)
        witnesses.append(self)

    def watched(self: Pipeline, *instruction: Any) -> None:
        ledger = witnesses[-1].memory
        found.append(ledger.peak)
        ledger.peak = ledger.alive()
        compute(self, *instruction)

    with patch.object(Witness, "__init__", made), patch.object(Pipeline, "_compute", watched):
        rank.step(recipe(*words), 0, repeat=False)
    return found[1:]


def check(there: list[int], words: tuple[str, ...]) -> None:
    """No instruction is more than 2 % off, and the peak not more than 1 %, and it is where it really is."""
    peaks, program = simulated(*words)
    here = [most for most, _ in peaks[0].curve][: len(there)]
    assert here == pytest.approx(there, rel=0.02)
    assert max(here) == pytest.approx(max(there), rel=0.01)
    assert there[program.program[0].index(peaks[0].instruction)] > 0.998 * max(there)


@pytest.mark.parametrize("words", [("precision=bf16",), ("precision=bf16", "parallel.schedule=zb-h1")], ids=str)
def test_every_instruction_holds_what_the_trainer_holds_on_fake_tensors(words):
    check(dreamt(*words), words)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("precision=bf16",)], ids=str)
def test_every_instruction_holds_what_a_rank_really_holds(workers, words):
    check(workers(4).run(really_held, *words, timeout=400)[0], words)


def test_weights_are_kept_transposed_by_the_backends_that_read_them_so():
    """FP8 on GPUs: one byte an element more from the first backward on; everything else is as on fake tensors."""
    words = ("precision=fp8", "train.recompute=[norms,mla_up,swiglu]", "model.num_hidden_layers=3")
    peaks, program = simulated(*words)
    there, turned = dreamt(*words), 0
    stages = world.study_stages(recipe(*words), program.placement)
    done = set()
    for instruction, real, (mine, _) in zip(program.program[0], there, peaks[0].curve, strict=False):
        done |= {stage for kind, stage, _ in passes(instruction) if kind in "BI"}
        turned = sum(stages[stage].turned for stage in done)
        assert mine - turned == pytest.approx(real, rel=0.01), instruction
    assert turned > 0


def test_what_would_help_is_said_when_a_step_does_not_fit():
    one = recipe("precision=bf16", "optim.moments=fp32", "train.recompute=[norms]")
    small = replace(read("h800x2048"), memory_bytes=50_000_000)
    said = result.text(result.simulate(one, small))
    assert "MiB" not in said and "GiB too much: rank" in said and "it consists of " in said
    assert "to need less: train.recompute=[norms,swiglu,mla_up]; optim.moments=bf16" in said
