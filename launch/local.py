"""Training on this machine: one process per rank, under torchrun's elastic agent.

`train` writes the resolved recipe into the run directory and starts the workers on that file, so that no rank composes
anything. What a worker could not survive it leaves in its error file (`train/safety/failures.py`); the agent starts
all of them again, `run.max_restarts` times at most, and the earliest error of the last try is the one that is shown.
SIGTERM and SIGUSR1 are passed on to the ranks, who save and end (`train/safety/preemption.py`).
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch import load, rendezvous
from parallel.errors import UserError
from parallel.experts.build import check_device
from train.compose import write
from train.data.preparation import prepare
from train.precision import fp8_backend
from train.recipe import Recipe
from train.safety import preemption
from train.safety.failures import first_failure
from train.safety.lock import claim_for_launcher


def train(recipe: Recipe) -> int:
    """Train `recipe` with all its ranks on this machine; returns the exit code.

    Data is prepared first, by this process alone. Raises `UserError` before any rank starts.
    """
    check_machine(recipe.parallel.world_size)
    if not torch.cuda.is_available():  # where it is, ranks look at their own GPUs before they join
        fp8_backend(recipe, torch.device("cpu"))
        check_device(recipe.parallel.dispatch, torch.device("cpu"))
    rendezvous.listen(recipe.run.rendezvous).close()
    with claim_for_launcher(Path(recipe.run.dir) / str(recipe.run.name)):
        return start(recipe)


def start(recipe: Recipe) -> int:
    """The same, in a run directory that is this job's alone."""
    config = write(recipe)
    preemption.unmark(config.parent)
    print(f"{config.parent}: {recipe.summary()}", flush=True)
    prepare(
        recipe.data,
        vocab_size=recipe.model.vocab_size,
        sequence_length=recipe.train.sequence_length,
        seed=recipe.train.seed,
    )
    if recipe.data.rebuild:  # done; the ranks need not do it again
        recipe.data.rebuild = False
        write(recipe)
    os.environ.update(environment(recipe, dict(os.environ)))
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what went wrong is told once, by `report`
    with tempfile.TemporaryDirectory(prefix="weft-") as logs, passing_signals_on() as asked:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=recipe.parallel.world_size,
            run_id=recipe.run.name or "weft",
            rdzv_backend=rendezvous.NAME,
            rdzv_endpoint=recipe.run.rendezvous,
            max_restarts=recipe.run.max_restarts,
            local_addr=recipe.run.rendezvous.rpartition(":")[0],
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # these end the ranks, now
        )
        try:
            # -P: a folder or file named `train` where the user stands is not weft's.
            elastic_launch(launch, sys.executable)("-uP", "-m", "train", "--config", str(config.resolve()))
        except SignalException as stopped:
            return stopped_by(stopped.sigval, config.parent)
        except ChildFailedError as failed:
            if asked:
                return stopped_by(asked[0], config.parent)
            return report(failed, Path(logs))
        if marker := preemption.marked(config.parent):
            print(
                f"weft: preempted by {marker['signal']}; {config.parent} is committed up to step {marker['step']}, "
                "the same command goes on from there",
                file=sys.stderr,
            )
            return preemption.EXIT_CODE
    if load.recorded(config.parent):
        load.write(config.parent)
    return 0


@contextmanager
def passing_signals_on() -> Iterator[list[int]]:
    """While this lasts, a signal that asks the run to stop goes to every rank. Yields those that have come."""
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        os.environ[preemption.STOP_VARIABLE] = signal.Signals(number).name
        for rank in psutil.Process().children():
            with suppress(psutil.Error):  # it has just ended
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in preemption.SIGNALS}
    try:
        yield asked
    finally:
        os.environ.pop(preemption.STOP_VARIABLE, None)
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_by(number: int, directory: Path) -> int:
    """Say so; returns the exit code."""
    print(f"weft: stopped by {signal.Signals(number).name}; {directory} keeps what it had committed", file=sys.stderr)
    return 128 + int(number)


def check_machine(world: int) -> None:
    """Raise `UserError` if `world` processes make no sense here."""
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    most = gpus or max(16, 4 * cores)
    if world > most:
        machine = f"{gpus} GPUs" if gpus else f"{cores} cores"
        raise UserError(
            f"this recipe needs {world} processes, this machine has {machine}: expected at most {most}; start it on "
            "enough machines (torchrun --nnodes N --nproc-per-node M -m train recipe=NAME), or choose a smaller layout "
            "with parallel.pipeline, parallel.data and parallel.expert"
        )


def environment(recipe: Recipe, given: dict[str, str]) -> dict[str, str]:
    """Variables for the workers; those that the user has set stay as they are."""
    threads = recipe.train.threads or max(1, (os.cpu_count() or 1) // recipe.parallel.world_size)
    wanted = {"OMP_NUM_THREADS": str(threads)}
    if "lo" in [name for _, name in socket.if_nameindex()]:
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    chosen = {name: given.get(name, value) for name, value in wanted.items()}
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").exists():  # a checkout, perhaps not installed
        chosen["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), given.get("PYTHONPATH")]))
    return chosen


def report(failed: ChildFailedError, logs: Path) -> int:
    """Print the cause of a failed run once; returns the exit code."""
    error, killed = last_failure(logs), killed_rank(failed)
    if error is None or (killed and error["culprit"] != killed[0]):
        rank, failure = killed or failed.get_first_failure()
        print(f"weft: rank {rank} died without a word: {failure.message}", file=sys.stderr)
        return 1
    if error["user_error"]:
        print(f"weft: {error['user_error']}", file=sys.stderr)
        return 2
    print(f"weft: rank {error['rank']} failed, and with it the run:\n\n{error['py_callstack']}", file=sys.stderr)
    return 1


def last_failure(logs: Path) -> dict[str, Any] | None:
    """The first error of the last attempt that left any."""
    attempts = sorted(logs.glob("*/attempt_*"), key=lambda folder: int(folder.name.rpartition("_")[2]))
    found = [error for error in map(first_failure, attempts) if error]
    return found[-1] if found else None


def killed_rank(failed: ChildFailedError) -> tuple[int, ProcessFailure] | None:
    """A rank that a signal has killed, not this launcher: its neighbours' errors are consequences."""
    dead = [
        (rank, failure)
        for rank, failure in failed.failures.items()
        if failure.exitcode < 0 and -failure.exitcode not in preemption.SIGNALS
    ]
    return min(dead, default=None, key=lambda each: each[0])
