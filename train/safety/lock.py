"""One job a run directory: two that write the same checkpoints and metrics would destroy each other's.

Rank 0 holds `.lock` as long as it lives, `weft train` holds `.launcher.lock`, and also looks whether ranks whose
launcher is gone are still at work. The kernel lets go of a lock when its process ends, however it ends.
"""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from parallel.errors import UserError

RANKS, LAUNCHER = ".lock", ".launcher.lock"
RESTART_SECONDS = 30.0  # that ranks which were killed may take to be gone


def claim(directory: Path, name: str = RANKS) -> FileLock:
    """The lock, held until it is released or this process ends. Raises `UserError` if another job has it, or if
    nothing can be written there."""
    lock = FileLock(directory / name)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=RESTART_SECONDS if restarted else 0)
    except Timeout:
        raise UserError(
            f"run.name={directory.name}: another job is at work in {directory}; expected a name of its own, or that "
            "job to end first"
        ) from None
    except OSError as error:
        raise UserError(f"run.dir={directory.parent}: expected a folder to write into; {error}") from None
    return lock


def claim_for_launcher(directory: Path) -> FileLock:
    """The launcher's lock, once no rank of another job is at work. Raises `UserError`."""
    lock = claim(directory, LAUNCHER)
    try:
        claim(directory, RANKS).release()
    except UserError:
        lock.release()
        raise
    return lock
