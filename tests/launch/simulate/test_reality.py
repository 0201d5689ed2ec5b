"""What a simulated rank holds against a real one: its state to the byte, its activations as autograd keeps them.

Where weft keeps something else than autograd would (FP8's forms, recomputation), `test_memory` counts live tensors.
"""

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from launch.simulate import memory
from launch.simulate.stages import world
from parallel import schedule
from parallel.mesh import Mesh
from parallel.passes import Microbatch, Tape, forward, merge
from train.compose import CommandLine, recipe_of
from train.engine import LOSSES, Engine
from train.recipe import Recipe

WORDS = "recipe=tiny", "train.sequence_length=128"
ALONE = "parallel.pipeline=1", "parallel.data=1", "parallel.expert=1", "parallel.schedule=1f1b"


def recipe(*words: str) -> Recipe:
    line = CommandLine.read([*WORDS, *words], sweep=False)
    return recipe_of(line.compose(), line.name).validate(data=False)


def really(*words: str) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer on this rank of a real engine."""
    optimizer = Engine(recipe(*words), torch.device("cpu")).optimizer
    parameters = {each.data_ptr(): each for bucket in optimizer.buckets for each in bucket.parameters.values()}
    moments = [moment for state in optimizer.optimizer.state.values() for moment in state.values()]
    return {
        "parameters": sum(each.nbytes for each in parameters.values()),
        "gradients": sum(cast(Any, each).main_grad.nbytes for each in parameters.values()),
        "optimizer": sum(each.nbytes for each in [*optimizer.masters, *moments]),
    }


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.data=1", "parallel.expert=1", "fp8.backend=reference"),
        ("parallel.pipeline=1", "parallel.schedule=1f1b", "precision=bf16", "optim.moments=fp32"),
        ("parallel.data=1", "parallel.expert=1", "parallel.schedule=zbv", "precision=fp32"),
    ],
    ids=str,
)
def test_parameters_gradients_and_optimizer_are_exact(workers, words):
    one = recipe(*words)
    layout = one.parallel
    program = schedule.build(layout.schedule, layout.pipeline, 8, layout.chunks)
    stages = world.study_stages(one, program.placement)
    mesh = Mesh(layout.pipeline, layout.data, layout.context, layout.expert, rank=0, node_size=2)
    for rank, real in enumerate(workers(2).run(really, *words)):
        held = {*program.placement[rank // mesh.width]}
        expected = memory.stays(held, stages, program, mesh, one.optim.moments)
        padding = 64 * mesh.world_size  # a share of a bucket is filled up to a whole number of elements
        assert {name: real[name] for name in ("parameters", "gradients")} == {
            name: expected[name] for name in ("parameters", "gradients")
        }
        assert real["optimizer"] == pytest.approx(expected["optimizer"], abs=padding)


def kept(engine: Engine) -> int:
    """Bytes that autograd keeps of a forward, and of nothing that outlasts it: storages counted once."""
    found: list[dict[int, int]] = []
    for _ in range(3):  # the first one quantises the weights
        seen: dict[int, int] = {}
        held: list[Tensor] = []

        def pack(tensor: Tensor, seen: dict[int, int] = seen, held: list[Tensor] = held) -> Tensor:
            held.append(tensor)
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        length, width = engine.recipe.train.sequence_length, engine.recipe.model.hidden_size
        ids = torch.randint(engine.recipe.model.vocab_size, (1, length + 1))
        tape: Tape = []
        batch = Microbatch(0, ids, (1, length, width), dict.fromkeys(LOSSES, 1.0))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            merge(forward(engine.stages[0], None, batch, tape))
        found.append(seen)
        tapes.append((tape, held))
    always = found[1].keys() & found[2].keys()
    return sum(size for key, size in found[2].items() if key not in always)


tapes: list[Any] = []  # alive, so that no two forwards can have the same memory


@pytest.mark.parametrize(
    "words",
    [
        ("precision=bf16",),
        ("precision=fp32", "model.num_nextn_predict_layers=0"),
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(words, workers):
    (real,) = workers(1).run(alone, *words)
    one = recipe(*ALONE, *words, "train.force_balanced=true")
    program = schedule.build("1f1b", 1, 8)
    left = world.study_stages(one, program.placement)[0].passes["F"].left
    assert left.total() == pytest.approx(real, rel=0.03)


def alone(*words: str) -> int:
    assert dist.get_world_size() == 1
    try:
        return kept(Engine(recipe(*ALONE, *words, "train.force_balanced=true"), torch.device("cpu")))
    finally:
        tapes.clear()
