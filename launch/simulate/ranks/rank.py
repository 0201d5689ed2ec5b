"""The trainer's own step as any rank of the cluster: its groups, its communication, its memory, on fake tensors.

`Trainer.fit` runs one step in a world of fake process groups (`world`): the sampler's rows, the program, the passes,
ZeRO-1 with DeepSpeed's optimizer, the router biases. All micro-batches go through a stage by the same operators, so
each kind of pass is run once for each stage, and from then on it is repeated by what was seen: its effects, its
communication, its bytes. All around the passes is the trainer's. `communication` says whether ranks fit together.
"""

import gc
import multiprocessing
import os
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.ranks.communication import Call, Communicator, disagreements, heard, spans
from launch.simulate.result import place
from launch.simulate.stages.storage import Memory
from launch.simulate.stages.world import balanced, fake_world
from parallel import zero
from parallel.errors import UserError
from parallel.experts import lockstep
from parallel.experts.dispatch import Tag
from parallel.experts.local import Nothing
from parallel.mesh import Mesh
from parallel.passes import Comm, Effect, HostSync, Microbatch, Pass, Tape, backward, forward
from parallel.pipeline import Pipeline
from parallel.schedule.program import Program
from train import engine, optim, trainer
from train.engine import Engine
from train.recipe import Recipe
from train.trainer import Trainer

ROWS = 1 << 32  # of a text that nobody reads
PIECE = 1 << 24  # elements that norm and optimizer take at a time: fewer pieces, and no other result


# ---------------------------------------------------------------- what is seen
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


class Ledger(Memory):
    """Memory of which a part is only said to be there: what passes would hold if they ran again."""

    def __init__(self) -> None:
        super().__init__()
        self._said = 0

    def alive(self) -> int:
        """Bytes that somebody holds, or would hold."""
        super().alive()
        self._held += self._said
        return self._held

    def say(self, peak: int, left: int) -> None:
        """At most `peak` bytes more were held for a while, and `left` more from now on."""
        if self._held + peak > self.peak:
            self.peak = max(self.peak, self.alive() + peak)
        self._said += left
        self._held += left

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is made or let go in here has been accounted for elsewhere."""
        before = self.alive()
        yield
        self._said += before - self.alive()
        self._held = before


class Witness(TorchDispatchMode):
    """Hears every communication, keeps the ledger, and says one to a host that reads a value of a fake tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.memory = Ledger()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(heard(func, args))
        elif func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else dtype is torch.bool or 1
        result = func(*args, **(kwargs or {}))
        self.memory.see((args, kwargs), result)
        return result


# ---------------------------------------------------------------- passes, seen once and repeated
@dataclass
class Turn:
    """What a pass does until its next effect. peak: most bytes above those before it. left: bytes more after it."""

    calls: list[Call] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    inside: Counter[str] = field(default_factory=Counter)
    across: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    left: int = 0
    effect: Effect | None = None


@dataclass
class Seen:
    """A pass from turn to turn; then its result, its losses, and the weight gradients that it leaves."""

    turns: list[Turn]
    result: tuple[int, ...] | None
    losses: list[tuple[str, int]]
    weights: Turn | None


class Repeating(Pipeline):
    """The pipeline of an engine, whose passes really run only the first time that a stage is asked for one."""

    def __init__(self, engine: Engine, witness: Witness) -> None:
        numerics, reduce = engine.numerics, engine.optimizer.reduce_stage
        super().__init__(engine.mesh, engine.stages, numerics.weight_grads, numerics.dtype, engine.device, reduce)
        self.dispatcher, self.witness, self.memory = engine.dispatcher, witness, witness.memory
        self.seen: dict[tuple[Any, ...], Seen] = {}

    def _start(self, program: Program, kind: str, number: int, batch: Microbatch) -> Pass:
        taken = super()._start(program, kind, number, batch)
        if (kind, number, batch.shape) not in self.seen:
            self.seen[kind, number, batch.shape] = self._look(kind, number, batch)
        with self.memory.unchanged():
            del taken  # it never began; what it starts from is let go by the turn that was seen to do so
        return self._repeat(self.seen[kind, number, batch.shape], batch)

    def _repeat(self, seen: Seen, batch: Microbatch) -> Pass:
        """The pass of another micro-batch."""
        *turns, last = seen.turns
        for turn in turns:
            self._take(turn, batch.index)
            assert turn.effect is not None
            yield turn.effect
        with self.memory.unchanged():
            batch.losses.update({key: torch.zeros((), dtype=torch.float64) for key in seen.losses})
            result = None if seen.result is None else torch.empty(seen.result, dtype=self.dtype)
        self._take(last, batch.index)
        if seen.weights:
            self.weights.now.append(partial(self._take, seen.weights, batch.index))
        return result

    def _take(self, turn: Turn, microbatch: int) -> None:
        """As if that turn were taken."""
        self.witness.calls += turn.calls
        self.dispatcher.log += [replace(tag, microbatch=microbatch) for tag in turn.tags]
        self.dispatcher.traffic.inside.update(turn.inside)
        self.dispatcher.traffic.across.update(turn.across)
        self.memory.say(turn.peak, turn.left)

    # -- seeing
    def _look(self, kind: str, number: int, batch: Microbatch) -> Seen:
        """Run a pass of this kind, and a forward before it: the first of a stage also quantises its weights."""
        stage, peak, like = self.stages[number], self.memory.peak, replace(batch, losses={})

        def message(needed: bool) -> Tensor | None:
            return torch.empty(batch.shape, dtype=self.dtype) if needed else None

        for _ in range(2 if kind == "F" else 1):
            tape: Tape = []
            turns, result = self._watch(forward(stage, message(not stage.is_first), like, tape))
        if kind != "F":
            like.losses.clear()
            split = kind == "I"
            turns, result = self._watch(backward(stage, message(not stage.is_last), like, tape, self.weights, split))
        weights: list[Turn] = []
        if self.weights.now:
            with self._turn(weights):
                self.weights.run()
        self.memory.peak = peak
        shape = None if result is None else tuple(result.shape)
        return Seen(turns, shape, list(like.losses), weights[0] if weights else None)

    def _watch(self, one: Pass) -> tuple[list[Turn], Any]:
        turns: list[Turn] = []
        effect: Effect | None = None
        result, ended = None, False
        while not ended:
            with self._turn(turns):
                if isinstance(effect, Comm | HostSync):
                    effect.work.wait()
                try:
                    effect = next(one)
                except StopIteration as end:
                    effect, result, ended = None, end.value, True
            turns[-1].effect = replace(effect, work=Nothing()) if isinstance(effect, Comm | HostSync) else effect
        return turns, result

    @contextmanager
    def _turn(self, turns: list[Turn]) -> Iterator[None]:
        """Note what happens meanwhile as one more turn, and make it unsaid."""
        calls, log, traffic, memory = self.witness.calls, self.dispatcher.log, self.dispatcher.traffic, self.memory
        before = len(calls), len(log), traffic.inside.copy(), traffic.across.copy()
        held = memory.peak = memory.alive()
        yield
        sent = traffic.inside - before[2], traffic.across - before[3]
        turns.append(Turn(calls[before[0] :], log[before[1] :], *sent, memory.peak - held, memory.alive() - held))
        del calls[before[0] :], log[before[1] :]
        traffic.inside, traffic.across = before[2:]


# ---------------------------------------------------------------- a step of a rank
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


# ---------------------------------------------------------------- for people
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


def as_json(steps: Sequence[RankStep]) -> dict[str, Any]:
    """What is known of the ranks, and in what they do not agree."""
    return {"ranks": [one.as_json() for one in steps], "disagreements": disagreements(logs(steps))}


def logs(steps: Sequence[RankStep]) -> dict[int, list[Call]]:
    """Of each rank what it said."""
    return {one.rank: one.calls for one in steps}


def text(steps: Sequence[RankStep], recipe: Recipe, sheet: Sheet) -> str:
    """Tables for the terminal: everything of a single rank; a line each, and whether they agree, of several."""
    return _alone(steps[0], recipe, sheet) if len(steps) == 1 else _together(steps)


def _alone(one: RankStep, recipe: Recipe, sheet: Sheet) -> str:
    where = ", ".join(f"{name} {number}" for name, number in one.place.items())
    title = f"{sheet.name}: rank {one.rank:,} of {recipe.parallel.world_size:,}: {where}"
    stages = " and ".join(map(str, one.stages))
    kept = [(name, f"{each.elements:,}", f"{each.bytes:,}") for name, each in one.buffers.items()]
    said = [
        (
            group.use,
            f"{len(group.ranks):,}: {spans(group.ranks)}",
            what if peer is None else f"{what} {'to' if what == 'send' else 'from'} {peer}",
            f"{times:,}",
            f"{size / 1e9:,.3f}",
        )
        for (group, what, peer), (times, size) in one.spoken().items()
    ]
    return "\n".join(
        [
            title,
            f"stages {stages}, {one.microbatches} micro-batches",
            "",
            *table([("buffers", "elements", "bytes"), *kept]),
            "",
            *table([("communicator", "ranks", "operation", "times", "GB"), *said], left=3),
            "",
            f"most memory at a time: {one.peak / 2**30:.2f} GiB, an allocator's waste not counted",
            f"one step on fake tensors: {one.seconds:.1f} s",
        ]
    )


def _together(steps: Sequence[RankStep]) -> str:
    head = "rank", "position", "stages", "parameters", "optimizer GiB", "most memory GiB", "calls", "GB", "seconds"
    rows = [
        (
            f"{one.rank}",
            f"{one.place['pipeline']}",
            " ".join(map(str, one.stages)),
            f"{one.buffers['parameters'].elements:,}",
            f"{(one.buffers['masters'].bytes + one.buffers['moments'].bytes) / 2**30:.2f}",
            f"{one.peak / 2**30:.2f}",
            f"{len(one.calls):,}",
            f"{sum(call.bytes for call in one.calls) / 1e9:,.1f}",
            f"{one.seconds:.1f}",
        )
        for one in steps
    ]
    found = disagreements(logs(steps))
    groups = {call.group for one in steps for call in one.calls}
    calls = sum(len(one.calls) for one in steps)
    verdict = [f"these ranks agree: {calls:,} calls on {len(groups):,} communicators"]
    return "\n".join([*table([head, *rows], left=0), "", *(found or verdict)])


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of aligned columns, so many of them at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
