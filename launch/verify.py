"""`weft verify RUN`: every checkpoint of a run, each file of it read and hashed, in a table."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import UserError
from train.checkpoint import directory as names
from train.checkpoint import shards
from train.checkpoint.manifest import Damaged, Manifest


@dataclass(frozen=True)
class Verdict:
    """What is known of a committed checkpoint; no problems if it is as it was written."""

    step: int
    files: int
    bytes: int
    problems: list[str]


def verify(run: Path) -> list[Verdict]:
    """Look at all committed checkpoints of a run, in ascending order of steps. Raises UserError if it has none."""
    directory = run / "checkpoints"
    steps = names.committed(directory)
    if not steps:
        raise UserError(f"{run}: expected the folder of a run with checkpoints; {directory} has none")
    return [look(directory, step) for step in steps]


def look(directory: Path, step: int) -> Verdict:
    """Read one checkpoint from end to end."""
    folder = names.path_of(directory, step)
    try:
        manifest = Manifest.of(folder, step)
        problems = shards.verify(folder, manifest, list(manifest.files), os.cpu_count() or 1)
    except Damaged as damaged:
        return Verdict(step, 0, 0, [str(damaged)])
    return Verdict(step, len(manifest.files), manifest.bytes, problems)


def text(verdicts: Iterable[Verdict]) -> str:
    """The table, and under it what is wrong."""
    rows = [f"{'step':>10}{'files':>8}{'bytes':>16}  verdict"]
    for each in verdicts:
        rows.append(f"{each.step:>10}{each.files:>8}{each.bytes:>16,}  {'damaged' if each.problems else 'whole'}")
    return "\n".join([*rows, *(problem for each in verdicts for problem in each.problems)])
