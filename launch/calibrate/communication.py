"""What processes on this machine take to tell each other things, with gloo on a CPU and NCCL between GPUs.

Two ranks exchange and send buffers of growing size. A time is what that takes when nothing else is to be done. On a CPU
exchanges are timed where they run instead: in passes through small models whose experts the two have between them.
Processes that compute do not come to an exchange at once, for their cores and their experts' rows are not alike, and
one that sleeps must be woken. The processor time of gloo's threads meanwhile is taken from whoever shares the core.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from kernels.ops import Cost
from launch.calibrate.model import Model, Sizes
from launch.calibrate.operators import REPEATS, Stopwatch, usual
from launch.calibrate.pace import Pace

SHARED: tuple[tuple[str, Sizes], ...] = (  # models whose experts the two have between them: precision, sizes
    ("bf16", (128, 192, 8, 1024)),
    ("fp8", (384, 320, 8, 2048)),
    ("fp8", (256, 512, 16, 1024)),
    ("bf16", (512, 512, 16, 2048)),
)
SIZES = 1 << 10, 1 << 14, 1 << 17, 1 << 19, 1 << 21, 1 << 23
SECONDS = 300  # that all this may take


@dataclass
class Talk:
    """Rows of (bytes, seconds): of exchanges, of sends, and of the processor time that exchanges take.

    operators: those of passes with exchanges, by `operator_key`: what a call costs, and its seconds.
    """

    exchange: list[tuple[int, float]] = field(default_factory=list)
    send: list[tuple[int, float]] = field(default_factory=list)
    processor: list[tuple[int, float]] = field(default_factory=list)
    operators: dict[str, list[tuple[Cost, float]]] = field(default_factory=dict)

    @property
    def links(self) -> dict[str, list[tuple[int, float]]]:
        """The rows that there are, by what they are of."""
        return {name: rows for name in ("exchange", "send", "processor") if (rows := getattr(self, name))}


def measure(device: str, repeats: int, usual: float, tell: Callable[[str], None]) -> Talk:
    """Let two processes, on a GPU each if there are GPUs, talk to each other; returns what the first one has seen.

    usual: the machine's pace (`Pace.usual`).
    """
    ranks = 2
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="weft-") as folder:
        receiver, sender = spawn.Pipe(duplex=False)
        arguments = (ranks, device, repeats, usual, str(Path(folder) / "store"), sender)
        members = [spawn.Process(target=talk, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for member in members:
            member.start()
        sender.close()  # so that the pipe ends with the last of them
        try:
            found: Talk | None = receiver.recv() if receiver.poll(SECONDS) else None
        except EOFError:
            found = None
        for member in members:
            member.join(SECONDS if found else 0)
        if found is None or any(member.exitcode != 0 for member in members):
            raise RuntimeError("processes on this machine cannot talk to each other; weft doctor may know why")
    tell(f"{ranks} processes exchange and send: {time.perf_counter() - began:.1f} s")
    return found


def talk(rank: int, ranks: int, device: str, repeats: int, usual: float, store: str, sender: Connection) -> None:
    """One of the processes; the first sends what it has seen."""
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
        back = timed(partial(back_and_forth, rank, given, taken), repeats, device)
        found.send.append((size, back / 2 / ((before + pace.slower()) / 2)))
        if device == "cuda":
            seconds = timed(partial(dist.all_to_all_single, taken, given), repeats, device)
            found.exchange.append((size * (ranks - 1) // ranks, seconds))
    for precision, sizes in SHARED if device == "cpu" else ():
        in_passes(found, precision, sizes, pace, repeats // 2)
    if rank == 0:
        sender.send(found)
    dist.destroy_process_group()


def back_and_forth(rank: int, given: torch.Tensor, taken: torch.Tensor) -> None:
    """To the other of two ranks, and back."""
    for sender in (0, 1):
        if rank == sender:
            dist.send(given, 1 - rank)
        else:
            dist.recv(taken, 1 - rank)


def in_passes(found: Talk, precision: str, sizes: Sizes, pace: Pace, repeats: int) -> None:
    """Add what an exchange in passes through a shared model takes, on average, and the operators of such a pass.

    The processor time is that of gloo's threads; the seconds are these and what a pass takes beyond its processor time.
    """
    device = torch.device("cpu")
    model = Model(precision, sizes, device, dist.group.WORLD)
    model.run(nullcontext())
    model.dispatcher.log.clear()
    model.dispatcher.traffic.clear()
    idle, gloo, before = [], [], pace.slower()
    for _ in range(repeats):
        begin, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
        model.run(nullcontext())
        process = time.process_time() - process
        gloo.append(process - (time.thread_time() - thread))
        idle.append(time.perf_counter() - begin - process)
    slower, exchanges = (before + pace.slower()) / 2, len(model.dispatcher.log) // repeats
    sent = sum(model.dispatcher.traffic.inside.values()) // repeats // exchanges
    each = (seconds / slower / exchanges for seconds in (median(idle) + median(gloo), median(gloo)))
    for rows, seconds in zip((found.exchange, found.processor), each, strict=True):
        rows.append((sent, max(seconds, 1e-7)))
    watched = []
    for _ in range(REPEATS):
        watch, before = Stopwatch(device), pace.slower()
        model.run(watch)
        watched.append(watch.seconds((before + pace.slower()) / 2))
    for key, cost, seconds in usual(watched):
        found.operators.setdefault(key, []).append((cost, seconds))


def timed(call: Callable[[], None], repeats: int, device: str) -> float:
    """Seconds of a call, the median of `repeats`."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        call()
    wait()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)
