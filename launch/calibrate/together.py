"""How much slower this machine's cores are when all of them are at work, or have several processes each.

Memory, caches and clock are shared; and a core that turns from one process to the other finds the wrong things in its
caches.
"""

import multiprocessing
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from threading import BrokenBarrierError
from typing import Any

import torch

from launch.calibrate.model import Model

SIZES = 384, 320, 8, 2048  # width, tokens, experts, vocabulary of the pass
SECONDS, ROUNDS = 120, 9
MOST = 16  # processes; more would measure the machine's memory


def all_busy(cores: int, tell: Callable[[str], None]) -> tuple[float, float]:
    """How many times as much processor time a pass takes while all cores are busy, and while each has two processes."""
    busy = measure(min(cores, MOST), tell) if cores > 1 else 1.0
    return busy, max(busy, measure(2 * cores, tell)) if 2 * cores <= MOST else busy


def measure(processes: int, tell: Callable[[str], None]) -> float:
    """Processor time of a pass while as many processes run it at once, by that of one alone; at least 1.

    One process runs it alone and then together with the others, in turn, so that both meet the same pace.
    """
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    queue, barrier = spawn.SimpleQueue(), spawn.Barrier(processes)
    members = [spawn.Process(target=work, args=(rank, queue, barrier), daemon=True) for rank in range(processes)]
    for member in members:
        member.start()
    for member in members:
        member.join(SECONDS + 30)
    if any(member.exitcode != 0 for member in members):
        raise RuntimeError("a process that measures the machine died")
    tell(f"{processes} processes at once: {time.perf_counter() - began:.1f} s")
    return max(1.0, median(queue.get()))


def work(rank: int, queue: Any, barrier: Any) -> None:
    """One of the processes; the first puts its ratios, one of each round, into `queue`."""
    torch.set_num_threads(1)
    model, ratios = Model("bf16", SIZES, torch.device("cpu")), []
    model.run(nullcontext())

    def timed() -> float:
        begin = time.thread_time()
        model.run(nullcontext())
        return time.thread_time() - begin

    try:
        for _ in range(ROUNDS):
            barrier.wait(SECONDS)
            alone = timed() if rank == 0 else 0.0
            barrier.wait(SECONDS)
            crowded = timed()
            if rank == 0:
                ratios.append(crowded / alone)
    except BrokenBarrierError:
        raise RuntimeError("processes that measure the machine lost each other") from None
    if rank == 0:
        queue.put(ratios)
