"""A state whose every element is known, cut over however many ranks there are; and processes that may be killed."""

import multiprocessing as mp
import os
import signal
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.flat_shard import FlatShard
from train.behind import Behind
from train.checkpoint import Checkpoints, disk
from train.checkpoint.shards import parts_of

SHAPES = {"embed.weight": (7, 5), "left.weight": (37, 19), "norm.weight": (3,), "experts.weight": (4, 3, 5)}
DTYPES = {"master": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}


def whole(key: str, name: str, step: int) -> torch.Tensor:
    """The tensor of that name at that step, flat."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {name} {step}".encode()))
    return torch.randn(torch.Size(SHAPES[name]).numel(), generator=generator).to(DTYPES[key])


def state_at(step: int) -> dict[str, Any]:
    """This rank's part of the state at a step: of three elements, one of four ranks gets none."""
    rank, size = dist.get_rank(), dist.get_world_size()
    state: dict[str, Any] = {"applied_steps": torch.tensor(step)}
    state["router_bias"] = {f"layers.{layer}": torch.full((3,), step + layer / 8) for layer in (0, 1 + rank % 2)}
    if size == 1:
        state["router_bias"]["layers.2"] = torch.full((3,), step + 2 / 8)
    for key in DTYPES:
        for name, shape in SHAPES.items():
            values = whole(key, name, step)
            begin, end = len(values) * rank // size, len(values) * (rank + 1) // size
            if begin < end:
                state.setdefault(key, {})[name] = FlatShard(values[begin:end], begin, shape)
    return state


def blank() -> dict[str, Any]:
    """The same, to be loaded into: nothing in it is right."""
    state = state_at(0)
    for part in parts_of(state):
        part.local.fill_(-7)
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states are equal to the bit."""
    ours, theirs = list(parts_of(one)), list(parts_of(other))
    return len(ours) == len(theirs) and all(
        (a.name, a.start, a.shape, a.local.dtype) == (b.name, b.start, b.shape, b.local.dtype)
        and torch.equal(a.local, b.local)
        for a, b in zip(ours, theirs, strict=True)
    )


def checkpoints(directory: Path, **options: Any) -> Checkpoints:
    return Checkpoints(directory, Behind(torch.device("cpu")), **{"keep_last": 9, **options})


def save(directory: Path, *steps: int, **options: Any) -> None:
    """Save these steps, one after the other."""
    ours = checkpoints(directory, **options)
    for step in steps:
        ours.save(step, state_at(step), {"tokens": 10 * step})
    ours.finish()


def resumes(directory: Path, resume: str | int = "auto") -> int | None:
    """The step that a run would go on from, having made sure that all of its state is that step's."""
    ours = checkpoints(directory)
    saved = ours.find(resume)
    if saved is None:
        return None
    state = blank()
    ours.load(saved, state)
    assert same(state, state_at(saved.step)), f"step {saved.step} is not what was saved"
    assert saved.meta == {"tokens": 10 * saved.step}
    return saved.step


# ---------------------------------------------------------------- processes of one call each
def world(size: int, function: Callable, *args: Any) -> list[int]:
    """Run `function` on so many ranks in processes of their own; their exit codes (negative: the signal).

    There are many, so they are forked: from a server that has imported what they need and has no threads.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])  # counts in the first call
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [context.Process(target=_rank, args=(rank, size, store.port, function, args)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in ranks]


def _rank(rank: int, size: int, port: int, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    function(*args)
    dist.barrier()
    os._exit(0)


def killed_at(rank: int, boundary: int) -> list[str]:
    """Kill this process, if it is that rank, at its so-manieth step on the disk from now on; the list of its steps."""
    seen: list[str] = []

    def observer(operation: str, path: Path) -> None:
        seen.append(f"{operation} {path.name}")
        if dist.get_rank() == rank and len(seen) == boundary:
            os.kill(os.getpid(), signal.SIGKILL)

    disk.observer = observer
    return seen
