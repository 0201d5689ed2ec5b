"""Pools of gloo worker processes, started once per test session and reused by every distributed test.

`workers(4).run(function, *args)` calls an importable function on four ranks and returns their four results. Each call
finds a fresh world process group (gloo, one thread a process), so tests cannot disturb each other through the groups
they make. A failing rank brings its traceback back, a hanging one its stack; both cost the pool, which the next call
starts anew. `workers(1)` is a plain call in this process. The fixture of the same name is in `conftest.py`.
"""

import faulthandler
import gc
import importlib
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE_SECONDS = 2.0  # how long the other ranks may take to report once one has failed


class WorkerError(AssertionError):
    """A rank raised, died or hung; the message holds what each such rank has to say."""


def start_world(store: dist.Store, rank: int, size: int) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=600))


def resolve(function: str | Callable) -> Callable:
    if callable(function):
        return function
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def serve(jobs: Connection, rank: int, size: int, port: int, stack_file: str) -> None:
    """A worker's life: receive a call, make it inside a fresh world, answer, until the pool closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stacks = open(stack_file, "w")  # noqa: SIM115 - stays open for the handler
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            number, function, args, kwargs = pickle.loads(jobs.recv_bytes())
        except EOFError:
            return
        try:
            start_world(dist.PrefixStore(str(number), store), rank, size)
            answer = (True, resolve(function)(*args, **kwargs))
        except BaseException:  # the group is left as it is: ending one with work in flight may hang
            answer = (False, traceback.format_exc())
        jobs.send_bytes(pickle.dumps(answer))
        if answer[0]:
            dist.barrier()  # nobody leaves while others are still connecting
            dist.destroy_process_group()
            gc.collect()  # groups that a cycle keeps alive would go on polling their sockets


class Alone:
    """The pool of one: calls run here, in a world of one rank."""

    def run(self, function: str | Callable, *args: Any, timeout: float = 0, **kwargs: Any) -> list[Any]:
        start_world(dist.HashStore(), 0, 1)
        try:
            return [resolve(function)(*args, **kwargs)]
        finally:
            dist.destroy_process_group()
            gc.collect()

    def close(self) -> None:
        pass


class Pool:
    """`size` worker processes on this machine, started by the first call."""

    def __init__(self, size: int):
        self.size = size
        self.calls = 0
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def start(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.stacks = Path(tempfile.mkdtemp(prefix="weft-workers-"))
        context = mp.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.size, self.store.port, str(self.stacks / str(rank)))
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: str | Callable, *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """Calls `function` ("package.module:name", or an importable function) on every rank.

        Returns the results in the order of ranks. Raises WorkerError with the ranks' tracebacks if any of them raises
        or dies, and with the stacks of those still running if some have not answered after `timeout` seconds.
        """
        if not self.processes:
            self.start()
        self.calls += 1
        call = pickle.dumps((self.calls, function, args, kwargs))
        for pipe in self.pipes:
            pipe.send_bytes(call)

        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            for ready in wait(waiting, left):
                rank = self.pipes.index(ready)
                try:
                    answers[rank] = pickle.loads(self.pipes[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join()
                    answers[rank] = (False, f"died with exit code {self.processes[rank].exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)

        failed = {rank: answer for rank, (fine, answer) in answers.items() if not fine}
        if len(answers) == self.size and not failed:
            return [answers[rank][1] for rank in range(self.size)]
        hanging = {} if failed else self.dump([rank for rank in range(self.size) if rank not in answers])
        self.close()
        raise WorkerError("\n".join(f"rank {rank}: {what}" for rank, what in sorted({**failed, **hanging}.items())))

    def dump(self, ranks: list[int]) -> dict[int, str]:
        """The stacks of ranks that do not answer."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return {rank: "no answer; it was at\n" + (self.stacks / str(rank)).read_text() for rank in ranks}

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.pipes = [], []


class Workers:
    """What the fixture `workers` gives: `workers(n)` is the pool of n ranks."""

    def __init__(self) -> None:
        self.pools: dict[int, Alone | Pool] = {1: Alone()}

    def __call__(self, size: int) -> Alone | Pool:
        if size not in self.pools:
            self.pools[size] = Pool(size)
        return self.pools[size]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
