"""What a checkpoint costs beside the bare disk: `python -m tests.benchmarks.checkpoints [FOLDER] [MILLIONS]`.

The state of so many million parameters (FP32 masters, BF16 moments), one process, as many threads as torch has. Saving
is measured against writing, flushing and hashing the same bytes, loading against reading and hashing them; and how long
a training of one-second steps stands still for a save behind it. Four rounds of each, in turn; the best counts.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.flat_shard import FlatShard
from train.behind import Behind
from train.checkpoint import Checkpoints
from train.checkpoint import directory as names
from train.checkpoint.shards import files_of, parts_of, raw

DTYPES = {"master": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
WIDTH = 4096


def state_of(parameters: int) -> dict[str, dict[str, FlatShard]]:
    """A matrix for every 16 M parameters, as ZeRO-1 hands them over."""
    shape = (WIDTH, WIDTH)
    names = [f"model.layers.{layer}.weight" for layer in range(max(1, parameters // (WIDTH * WIDTH)))]
    return {
        key: {name: FlatShard(torch.empty(WIDTH * WIDTH, dtype=dtype).uniform_(), 0, shape) for name in names}
        for key, dtype in DTYPES.items()
    }


def plain_write(folder: Path, state: dict, threads: int) -> None:
    """The same bytes into as many files, hashed and flushed: what no checkpoint can do without."""
    folder.mkdir()

    def one(numbered: tuple[int, list]) -> None:
        number, parts = numbered
        digest = hashlib.sha256()
        with (folder / str(number)).open("wb", buffering=0) as file:
            for part in parts:
                data = raw(part.local)
                for begin in range(0, len(data), 1 << 22):
                    block = data[begin : begin + (1 << 22)]
                    file.write(block)
                    digest.update(block)
            os.fsync(file.fileno())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, enumerate(files_of(list(parts_of(state))))))


def plain_read(folder: Path, threads: int) -> None:
    """Read and hash every file."""

    def one(path: Path) -> None:
        buffer, digest = memoryview(bytearray(1 << 22)), hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, sorted(folder.iterdir())))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def step(length: float) -> None:
    """Compute for so long, as forward and backward do between two steps of the optimizer."""
    until, matrix = time.perf_counter() + length, torch.ones(512, 512)
    while time.perf_counter() < until:
        matrix @ matrix


def save_behind(checkpoints: Checkpoints, state: dict, length: float) -> tuple[float, float]:
    """(seconds that the training stood still, seconds until the save was committed), with steps of that length."""
    checkpoints.take()
    began = time.perf_counter()
    checkpoints.save(2, state, {})
    while checkpoints.writing and checkpoints.writing.is_alive():
        step(length)
        checkpoints.settle()
    whole = time.perf_counter() - began
    checkpoints.finish()
    return checkpoints.take()[0]["checkpoint_stall_seconds"], whole


def main(parent: Path, millions: int) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threads, behind = torch.get_num_threads(), Behind(torch.device("cpu"))
    state = state_of(millions * 10**6)
    size = sum(part.local.nbytes for part in parts_of(state))
    print(f"{size / 1e9:.2f} GB, {threads} threads, files of at most 0.5 GiB, in {parent}")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        directory, bare = Path(folder) / "checkpoints", Path(folder) / "bare"
        foreground = Checkpoints(directory, behind, keep_last=1, background=False)
        background = Checkpoints(directory, behind, keep_last=1)
        background.reserve(state)

        def load() -> None:
            saved = foreground.find(1)
            assert saved is not None
            foreground.load(saved, state)

        times: dict[str, list[float]] = {}

        def measure(name: str, taken: float) -> None:
            times.setdefault(name, []).append(taken)

        for _ in range(4):
            for each in names.committed(directory):
                shutil.rmtree(names.path_of(directory, each))
            measure("write", seconds(lambda: plain_write(bare, state, threads)))
            measure("save", seconds(lambda: foreground.save(1, state, {})))
            measure("read", seconds(lambda: plain_read(bare, threads)))
            measure("load", seconds(load))
            shutil.rmtree(bare)
            stall, whole = save_behind(background, state, length=1.0)
            measure("stall", stall)
            measure("behind", whole)
    best = {name: min(taken) for name, taken in times.items()}
    for name, what in (
        ("write", "write, flush, SHA-256"),
        ("save", "save in the foreground"),
        ("read", "read, SHA-256"),
        ("load", "verify and load"),
        ("behind", "save behind steps of 1 s"),
        ("stall", "of which training stood still"),
    ):
        rounds = ", ".join(f"{each:.2f}" for each in times[name])
        print(f"{what:32}{best[name]:8.2f} s  {size / best[name] / 1e9:8.2f} GB/s   ({rounds})")
    print(f"save against the bare disk {best['write'] / best['save']:.2f}, at least 0.8 is wanted")
    print(f"load against the bare disk {best['read'] / best['load']:.2f}, at least 0.8 is wanted")
    print(f"stall against a save in the foreground {best['stall'] / best['save']:.3f}, at most 0.1 is wanted")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 500)
