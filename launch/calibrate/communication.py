"""What processes on this machine take to tell each other things, with gloo on a CPU and NCCL between GPUs.

Two ranks exchange and send buffers of growing size. A time is what an exchange takes when nothing else is to be done; a
process's processor time meanwhile is what it takes from whoever shares its core.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from launch.calibrate.pace import Pace

SIZES = 1 << 10, 1 << 14, 1 << 17, 1 << 19, 1 << 21, 1 << 23
SECONDS = 60  # that a rank may take to answer


@dataclass
class Talk:
    """Rows of (bytes, seconds): of exchanges, of sends, and of the processor time of either."""

    exchange: list[tuple[int, float]] = field(default_factory=list)
    send: list[tuple[int, float]] = field(default_factory=list)
    processor: list[tuple[int, float]] = field(default_factory=list)


def measure(device: str, repeats: int, usual: float, tell: Callable[[str], None]) -> Talk:
    """Let two processes, on a GPU each if there are GPUs, talk to each other; returns what the first one has seen.

    usual: the machine's pace (`Pace.usual`).
    """
    ranks = 2
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="weft-") as folder:
        queue = spawn.SimpleQueue()
        arguments = (ranks, device, repeats, usual, str(Path(folder) / "store"), queue)
        members = [spawn.Process(target=talk, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for member in members:
            member.start()
        for member in members:
            member.join(SECONDS + 30)
        if any(member.exitcode != 0 for member in members):
            raise RuntimeError("processes on this machine cannot talk to each other; weft doctor may know why")
        found: Talk = queue.get()
    tell(f"{ranks} processes exchange and send: {time.perf_counter() - began:.1f} s")
    return found


def talk(rank: int, ranks: int, device: str, repeats: int, usual: float, store: str, queue: Any) -> None:
    """One of the processes; the first puts what it has seen into `queue`."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    found, pace = Talk(), Pace(torch.device(device), usual)
    for size in SIZES:
        given = torch.zeros(size, dtype=torch.uint8, device=device)
        taken = torch.empty_like(given)
        before = pace.slower()
        seconds, busy = timed(partial(dist.all_to_all_single, taken, given), repeats, device)
        sent, _ = timed(partial(back_and_forth, rank, given, taken), repeats, device)
        slower = (before + pace.slower()) / 2
        leaving = size * (ranks - 1) // ranks
        found.exchange.append((leaving, seconds / slower))
        found.processor.append((leaving, busy / slower))
        found.send.append((size, sent / 2 / slower))
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def back_and_forth(rank: int, given: torch.Tensor, taken: torch.Tensor) -> None:
    """To the other of two ranks, and back."""
    for sender in (0, 1):
        if rank == sender:
            dist.send(given, 1 - rank)
        else:
            dist.recv(taken, 1 - rank)


def timed(call: Callable[[], None], repeats: int, device: str) -> tuple[float, float]:
    """Seconds of a call, the median of `repeats`, and the processor time that one takes in this process."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        call()
    wait()
    seconds, used = [], time.process_time()
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - begin)
    return median(seconds), max((time.process_time() - used) / repeats, 1e-7)
