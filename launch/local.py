"""Training on this machine: one process per rank, under torchrun's elastic agent.

`train` writes the resolved recipe into the run directory and starts the workers on that file, so that no rank composes
anything. What a worker could not survive it leaves in its error file (`train/__main__.py`); the earliest of those is
the cause, and the only one that is shown.
"""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch import load
from parallel.errors import UserError
from parallel.experts.build import check_device
from train.compose import write
from train.data.preparation import prepare
from train.precision import fp8_backend
from train.recipe import Recipe

GRACE_SECONDS = 30  # between asking workers to stop and making them


def train(recipe: Recipe) -> int:
    """Train `recipe` with all its ranks on this machine; returns the exit code.

    Data is prepared first, by this process alone. Raises `UserError` before any rank starts.
    """
    world = recipe.parallel.world_size
    check_machine(world)
    if not torch.cuda.is_available():  # where it is, ranks look at their own GPUs before they join
        fp8_backend(recipe, torch.device("cpu"))
        check_device(recipe.parallel.dispatch, torch.device("cpu"))
    config = write(recipe)
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
    with tempfile.TemporaryDirectory(prefix="weft-") as logs:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=recipe.run.name or "weft",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            max_restarts=0,
            local_addr="localhost",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            # -P: a folder or file named `train` where the user stands is not weft's.
            elastic_launch(launch, sys.executable)("-uP", "-m", "train", "--config", str(config.resolve()))
        except SignalException as stopped:
            name = signal.Signals(stopped.sigval).name
            print(f"weft: stopped by {name}; {config.parent} keeps what it had committed", file=sys.stderr)
            return 128 + int(stopped.sigval)
        except ChildFailedError as failed:
            return report(first_failure(Path(logs)), failed)
    if load.recorded(config.parent):
        load.write(config.parent)
    return 0


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


def first_failure(logs: Path) -> dict[str, Any] | None:
    """The earliest error that a worker wrote down, or None: the others are mostly its neighbours missing it."""
    errors = [json.loads(file.read_text())["message"]["extraInfo"] for file in logs.rglob("error.json")]
    return min(errors, key=lambda error: error["nanoseconds"], default=None)


def report(error: dict[str, Any] | None, failed: ChildFailedError) -> int:
    """Print the cause of a failed run once; returns the exit code."""
    if error is None:
        rank, failure = failed.get_first_failure()
        print(f"weft: rank {rank} died without a word: {failure.message}", file=sys.stderr)
        return 1
    if error["user_error"]:
        print(f"weft: {error['user_error']}", file=sys.stderr)
        return 2
    print(f"weft: rank {error['rank']} failed, and with it the run:\n\n{error['py_callstack']}", file=sys.stderr)
    return 1
