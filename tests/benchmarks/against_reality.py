"""Simulated steps against measured ones on this machine: `python -m tests.benchmarks.against_reality`.

`weft calibrate` has measured operators and messages here, and no step. This trains two small models for a few steps in
several layouts and schedules, each rank with one thread, simulates the same recipes with `cluster=local`, and compares
the median measured step with the simulated one, and the orders of both. The learning rate is next to nothing, so that
experts get about equally many rows, as the simulation has it.

A machine is not equally fast from one second to the next, and neither are its cores. So before every step as many ranks
as there are cores read calibration's yardstick (`launch.calibrate.pace`) at once, while the others stand still. The
column `pace` says how many times slower the slowest core was than during the calibration; the last two columns are
steps simulated on cores of those paces, step by step, and how they compare.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.calibrate.pace import Pace
from launch.simulate.cluster.sheet import Cores, Sheet, read
from launch.simulate.result import Result, simulate
from train import trainer
from train.compose import CommandLine, recipe_of
from train.recipe import Recipe

MODELS = {
    "tiny": ("recipe=tiny",),
    "wider": ("recipe=tiny", "precision=bf16", "model.hidden_size=512", "model.num_attention_heads=8"),
}
LAYOUTS = {
    "1 process": (1, 1, "1f1b"),
    "dualpipe, 2": (2, 1, "dualpipe"),
    "dualpipe, 2 x experts 2": (2, 2, "dualpipe"),
    "zbv, 2": (2, 1, "zbv"),
    "1f1b, 4": (4, 1, "1f1b"),
    "experts 2": (1, 2, "1f1b"),
}
WARM_UP = 5  # steps in which kernels are compiled for the numbers of rows that experts get


@dataclass
class Measured:
    """Of each step after the first: seconds, and how many times slower each core was than during calibration."""

    seconds: list[float]
    paces: list[tuple[float, ...]]


def compose(model: str, layout: str, steps: int, folder: str) -> Recipe:
    """The recipe of one line of the table."""
    pipeline, data, schedule = LAYOUTS[layout]
    words = [*MODELS[model], f"parallel.pipeline={pipeline}", f"parallel.data={data}", f"parallel.expert={data}"]
    words += [f"parallel.schedule={schedule}", "train.threads=1", "train.eval_rows=0", "checkpoint.every=0"]
    words += ["optim.lr.peak=1e-9", "optim.lr.end=1e-9"]
    words += [f"train.steps={steps}", f"run.dir={folder}", "run.name=real", "parallel.timeout_seconds=120"]
    line = CommandLine.read(words, sweep=False)
    return recipe_of(line.compose(), line.name).validate()


class Paced(trainer.Trainer):
    """Reads the yardstick before every step on as many ranks as there are cores, while the other ranks wait."""

    pace: Pace | None = None
    away: list[float]  # seconds of each step that this took
    read: list[tuple[float, ...]]  # what every core said

    def load_batch(self, batch: int) -> dict[int, Tensor]:
        """The step's rows; the step has just begun."""
        begin = time.perf_counter()
        dist.barrier()
        mine = self.pace.slower() if self.pace else None
        said: list[float | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, mine)
        Paced.read.append(tuple(each for each in said if each is not None))
        Paced.away.append(time.perf_counter() - begin)
        return super().load_batch(batch)


def train(rank: int, port: int, recipe: Recipe, cores: Cores, queue: Any) -> None:
    """One rank; the first puts what it has seen into `queue`."""
    size = recipe.parallel.world_size
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    Paced.away, Paced.read = [], []
    if rank < cores.count:
        Paced.pace = Pace(torch.device("cpu"), cores.pace)
    if rank > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    trainer.Trainer = Paced  # type: ignore[misc]
    trainer.main(recipe)
    if rank == 0:
        queue.put((Paced.away, Paced.read))


def measured(model: str, layout: str, steps: int, cores: Cores) -> Measured:
    """The steps of a real run."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        recipe, queue = compose(model, layout, WARM_UP + steps, folder), spawn.SimpleQueue()
        ranks = range(recipe.parallel.world_size)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        members = [spawn.Process(target=train, args=(rank, port, recipe, cores, queue)) for rank in ranks]
        for member in members:
            member.start()
        for member in members:
            member.join()
        if any(member.exitcode for member in members):
            raise SystemExit(f"training failed: {model}, {layout}")
        away, read = queue.get()
        lines = (Path(folder) / "real" / "metrics.jsonl").read_text().splitlines()
    took = [record["step_seconds"] for record in map(json.loads, lines) if "step_seconds" in record]
    seconds = [one - gone for one, gone in zip(took, away, strict=True)]
    paces = [tuple(map(fmean, zip(*both, strict=True))) for both in pairwise(read)]
    return Measured(seconds[WARM_UP:-1], paces[WARM_UP:])


def at_paces(guess: Result, paces: tuple[float, ...]) -> float:
    """Seconds of the step with cores so many times slower than its sheet's; those not told of are as the last."""
    cores, slowest = guess.sheet.cores, max(paces)
    assert cores is not None
    each = (paces + paces[-1:] * cores.count)[: cores.count]
    alike = {"together": 1.0, "crowded": max(1.0, cores.crowded / cores.together)}  # read while all cores are busy
    unlike = replace(guess.sheet, cores=replace(cores, paces=tuple(pace / slowest for pace in each), **alike))
    return slowest * simulate(guess.recipe, unlike, guess.program, guess.stages).step_seconds


def compare(model: str, layouts: list[str], sheet: Sheet, steps: int) -> None:
    """The lines of one model."""
    assert sheet.cores is not None
    pairs = []
    for layout in layouts:
        guess = simulate(compose(model, layout, steps, "runs"), sheet)
        found = measured(model, layout, steps + 1, sheet.cores)
        real = statistics.median(found.seconds)
        paced = statistics.median(at_paces(guess, each) for each in found.paces)
        slowest = statistics.median(map(max, found.paces))
        print(
            f"{model:<8}{layout:<26}{guess.step_seconds:>12.3f}{real:>12.3f}{guess.step_seconds / real:>8.2f}"
            f"{slowest:>8.2f}{paced:>15.3f}{paced / real:>8.2f}   {min(found.seconds):.3f} to {max(found.seconds):.3f}",
            flush=True,
        )
        pairs.append((paced, real))
    right = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in combinations(pairs, 2))
    worst = max((abs(guess / real - 1) for guess, real in pairs), default=0.0)
    print(
        f"{model}: worst {worst:.0%} at the cores' paces; {right} of {len(pairs) * (len(pairs) - 1) // 2} pairs in the"
        " right order"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default="local", help="sheet of this machine (local)")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each run (12)")
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--layouts", nargs="*", default=[*LAYOUTS], choices=[*LAYOUTS])
    flags = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sheet = read(flags.cluster)
    if sheet.cores is None or not sheet.cores.pace:
        raise SystemExit(f"{flags.cluster}: expected the sheet of a machine with cores, with its pace: weft calibrate")
    titles = f"{'simulated, s':>12}{'measured, s':>12}{'ratio':>8}{'pace':>8}{'at the paces':>15}{'ratio':>8}"
    print(f"{'model':<8}{'layout':<26}{titles}   fastest and slowest step")
    for model in flags.models:
        compare(model, flags.layouts, sheet, flags.steps)


if __name__ == "__main__":
    main()
