"""The trainer's own step as any rank of the cluster: its groups, its communication, its memory, on fake tensors.

`Trainer.fit` runs one step in a world of fake process groups (`world`): the sampler's rows, the program, the passes,
ZeRO-1 with DeepSpeed's optimizer, the router biases. A `witness` hears and counts; passes run once and are `repeating`
from then on. All around the passes is the trainer's. `report` says what has been seen, and whether ranks fit together.
"""

import gc
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch import Tensor

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.ranks.communication import Call, Communicator
from launch.simulate.ranks.repeating import Repeating
from launch.simulate.ranks.witness import Witness
from launch.simulate.result import place
from launch.simulate.stages.world import balanced, fake_world
from parallel import zero
from parallel.errors import UserError
from parallel.experts import lockstep
from parallel.mesh import Mesh
from train import engine, optim, trainer
from train.engine import Engine
from train.recipe import Recipe
from train.trainer import Trainer

ROWS = 1 << 32  # of a text that nobody reads
PIECE = 1 << 24  # elements that norm and optimizer take at a time: fewer pieces, and no other result


# ---------------------------------------------------------------- what is known of it
@dataclass(frozen=True)
class Buffers:
    """Elements of parameters that buffers of one kind hold, and bytes, with what pads them."""

    elements: int
    bytes: int


@dataclass(frozen=True)
class RankStep:
    """A step of one rank. peak: most bytes that it held, `buffers` among them. seconds: what it took to look at it."""

    rank: int
    place: dict[str, int]
    stages: list[int]
    microbatches: int
    buffers: dict[str, Buffers]
    peak: int
    calls: list[Call]
    seconds: float

    def spoken(self) -> dict[tuple[Communicator, str, int | None], tuple[int, int]]:
        """(times, bytes) by communicator, operation and peer, in the order of their first calls."""
        found: dict[tuple[Communicator, str, int | None], tuple[int, int]] = {}
        for call in self.calls:
            key = call.group, call.operation, call.peer
            times, size = found.get(key, (0, 0))
            found[key] = times + 1, size + call.bytes
        return found

    def as_json(self) -> dict[str, Any]:
        """What `weft simulate rank=... --json FILE` writes of a rank."""
        return {
            "rank": self.rank,
            **self.place,
            "stages": self.stages,
            "microbatches": self.microbatches,
            "buffers": {name: {"elements": one.elements, "bytes": one.bytes} for name, one in self.buffers.items()},
            "peak_bytes": self.peak,
            "communication": [
                {"use": group.use, "ranks": group.ranks, "operation": what, "peer": peer, "times": times, "bytes": size}
                for (group, what, peer), (times, size) in self.spoken().items()
            ],
            "seconds": self.seconds,
        }


# ---------------------------------------------------------------- ranks, and a step of each
def chosen(word: str, recipe: Recipe) -> list[int]:
    """The ranks that `rank=` names: a number, a list (0,128,4-7), or `all` positions of the first pipeline.

    Raises `UserError`.
    """
    layout = recipe.parallel
    if word == "all":
        mesh = Mesh(layout.pipeline, layout.data, layout.context, layout.expert, 0, layout.world_size)
        return list(mesh.line(0))
    try:
        ends = [[int(end) for end in part.split("-")] for part in word.split(",")]
        ranks = [rank for first, *rest in ends for rank in range(first, (rest or [first])[-1] + 1)]
        if not ranks or not all(0 <= rank < layout.world_size and len(end) < 3 for rank in ranks for end in ends):
            raise ValueError
    except ValueError:
        raise UserError(
            f"rank={word}: expected a rank of 0 .. {layout.world_size - 1}, several (0,128 or 0-7), or all, which is "
            "each position of the first pipeline"
        ) from None
    return ranks


def look(recipe: Recipe, sheet: Sheet, ranks: Sequence[int]) -> list[RankStep]:
    """A step at the full batch as each of `ranks`, by several processes if there are several.

    Raises `UserError` for a layout that the cluster has no room for.
    """
    place(recipe, sheet)
    if len(ranks) == 1:
        return [step(recipe, ranks[0])]
    processes = min(len(ranks), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(partial(step, recipe), ranks))


def step(recipe: Recipe, rank: int, repeat: bool = True) -> RankStep:
    """A step at the full batch as one rank. repeat: passes that have been seen do not run again."""
    began, recipe, witness, alike = time.perf_counter(), one_step(recipe), Witness(), Alike()
    layout = recipe.parallel
    backend = "triton" if recipe.precision == "fp8" else "reference"
    with (
        fake_world(layout.world_size, rank),
        witness,
        without_files(recipe),
        patch.object(engine, "initialise", lambda *_: None),
        patch.object(engine, "fp8_backend", lambda *_: backend),
        patch.object(lockstep, "_gather", alike),
        patch.object(zero, "PIECE", PIECE),
        patch.dict(optim.CHUNK, cpu=PIECE),
    ):
        running = Trainer(recipe, torch.device("cpu"))
        if repeat:
            running.engine.pipeline = Repeating(running.engine, witness)
        with balanced(running.engine.dispatcher, recipe):
            running.fit()
        predicted, issued = alike.said
        if predicted != issued:
            raise RuntimeError(f"rank {rank} has not issued the expert collectives that its program foretells")
        found = buffers(running.engine)
    mesh, program = running.engine.mesh, running.engine.program(recipe.train.batch.end)
    where = {"pipeline": mesh.pipeline_rank, "data": mesh.data_rank, "expert": mesh.expert_rank, "node": mesh.node}
    held, peak, calls = sorted(running.engine.stages), witness.memory.peak, witness.calls
    del running
    gc.collect()  # modules and their segments know each other
    return RankStep(rank, where, held, program.microbatches, found, peak, calls, time.perf_counter() - began)


def one_step(recipe: Recipe) -> Recipe:
    """The recipe of its first step at the full batch, and nothing beside it."""
    recipe = deepcopy(recipe)
    train, log = recipe.train, recipe.log
    train.steps, train.tokens, train.eval_every, train.eval_rows = 1, None, 0, 0
    train.batch.start, train.batch.ramp_tokens = train.batch.end, 0
    train.replica_check_every, train.spike.policy = 0, "none"
    recipe.checkpoint.every, recipe.checkpoint.resume, recipe.trace = 0, "never", False
    log.bias_every, log.health_every, log.load_every, log.starving_steps = 0, 0, 0, 0
    return recipe


@contextmanager
def without_files(recipe: Recipe) -> Iterator[None]:
    """A trainer finds rows of zeros to train on, and writes nothing."""

    class Rows:
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, numbers: Sequence[int]) -> Tensor:
            return torch.zeros(len(numbers), recipe.train.sequence_length + 1, dtype=torch.int64)

    text = SimpleNamespace(train=Rows())
    none = Mock(**{"find.return_value": None, "take.return_value": ({}, [])})
    with (
        patch.object(trainer, "open_data", lambda _: text),
        patch.object(trainer, "Metrics"),
        patch.object(trainer, "Checkpoints", return_value=none),
    ):
        yield


class Alike:
    """`lockstep` asks what the others have to say: the same. Two exchanges, as of any object: its size, and itself."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def __call__(self, group: dist.ProcessGroup, value: Any) -> list[Any]:
        self.said.append(value)
        for mine in (torch.empty(1, dtype=torch.int64), torch.empty(len(pickle.dumps(value)), dtype=torch.uint8)):
            dist.all_gather([torch.empty_like(mine) for _ in range(group.size())], mine, group=group)
        return [value] * group.size()


def buffers(engine: Engine) -> dict[str, Buffers]:
    """What stays on a rank, as the optimizer holds it."""
    optimizer = engine.optimizer
    elements = sum(parameter.numel() for bucket in engine.buckets for parameter in bucket.parameters.values())
    share = sum(fragment.hp_fragment.numel() for _, _, fragment in optimizer.fragments())
    moments = [moment for state in optimizer.optimizer.state.values() for moment in state.values()]
    kinds = {
        "parameters": (elements, optimizer.bf16_groups_flat),
        "gradients": (elements, optimizer.fp32_groups_gradients_flat),
        "masters": (share, optimizer.masters),
        "moments": (2 * share, moments),
    }
    return {kind: Buffers(count, sum(each.nbytes for each in tensors)) for kind, (count, tensors) in kinds.items()}
