"""How much slower this machine's cores are when all of them are at work: memory, caches and clock are shared."""

import multiprocessing
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from threading import BrokenBarrierError
from typing import Any

import torch

from launch.calibrate import operators

SECONDS = 60


def measure(processes: int, tell: Callable[[str], None]) -> float:
    """Processor time of the same pass in as many processes at once, by that in one alone; at least 1."""
    began = time.perf_counter()
    alone, crowded = seconds(1), seconds(processes)
    tell(f"{processes} processes at once: {time.perf_counter() - began:.1f} s")
    return max(1.0, crowded / alone)


def seconds(processes: int) -> float:
    """Of a pass, the median over processes that run it at the same time."""
    spawn = multiprocessing.get_context("spawn")
    queue, barrier = spawn.SimpleQueue(), spawn.Barrier(processes)
    members = [spawn.Process(target=work, args=(queue, barrier), daemon=True) for _ in range(processes)]
    for member in members:
        member.start()
    for member in members:
        member.join(2 * SECONDS)
    if any(member.exitcode != 0 for member in members):
        raise RuntimeError("a process that measures the machine died")
    return median(queue.get() for _ in members)


def work(queue: Any, barrier: Any) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    model = operators.Model("bf16", operators.CPU[1], torch.device("cpu"))
    model.run(nullcontext())
    try:
        barrier.wait(SECONDS)
    except BrokenBarrierError:
        raise RuntimeError("processes that measure the machine lost each other") from None
    times = []
    for _ in range(8):
        begin = time.thread_time()
        model.run(nullcontext())
        times.append(time.thread_time() - begin)
    queue.put(median(times[1:-1]))
