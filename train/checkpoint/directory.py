"""The directory `checkpoints/`: which names mean a whole checkpoint, and the renames that make one.

`step-00000100.tmp/` is being written, or was cut short, and is never read. One rename makes it `step-00000100/`, which
is never written into again. A checkpoint of the same step steps aside before, as `step-00000100.old/`, and counts as
long as the new one has not taken its place: at each instant a whole one exists.
"""

import re
from collections.abc import Collection
from pathlib import Path

from train.checkpoint import disk


def final_of(directory: Path, step: int) -> Path:
    """The name of a committed checkpoint."""
    return directory / f"step-{step:08d}"


def draft_of(directory: Path, step: int) -> Path:
    """Where it is written before."""
    return directory / f"step-{step:08d}.tmp"


def aside_of(directory: Path, step: int) -> Path:
    """Where it waits while another takes its place."""
    return directory / f"step-{step:08d}.old"


def path_of(directory: Path, step: int) -> Path:
    """Where the committed checkpoint of a step is."""
    final, aside = final_of(directory, step), aside_of(directory, step)
    return aside if aside.is_dir() and not final.exists() else final


def committed(directory: Path) -> list[int]:
    """The steps that have a committed checkpoint, in ascending order; none if there is no directory."""
    if not directory.is_dir():
        return []
    matches = [re.fullmatch(r"step-(\d{8,})(\.old)?", entry.name) for entry in directory.iterdir() if entry.is_dir()]
    return sorted({int(match[1]) for match in matches if match})


def tidy(directory: Path) -> None:
    """Clear away what killed runs left, on one rank while no other reads."""
    for aside in directory.glob("step-*.old"):
        if (final := aside.with_suffix("")).exists():
            disk.remove(aside)
        else:
            disk.rename(aside, final)
    for draft in directory.glob("step-*.tmp"):
        disk.remove(draft)


def commit(directory: Path, step: int) -> None:
    """Make the draft of a step, all of whose files are on disk, the checkpoint. On one rank."""
    draft, final, aside = draft_of(directory, step), final_of(directory, step), aside_of(directory, step)
    disk.flush(draft)
    if final.exists():
        disk.rename(final, aside)
    disk.rename(draft, final)
    if aside.exists():
        disk.remove(aside)


def prune(directory: Path, step: int, keep_last: int, keep_every: int, damaged: Collection[int] = ()) -> None:
    """Of the checkpoints up to `step`, just committed, keep the newest `keep_last` and every `keep_every`-th (0: none).

    Steps that are known to be damaged do not count; they go once they are older than all that are kept. Later ones
    belong to another history and are left alone.
    """
    steps = [earlier for earlier in committed(directory) if earlier <= step]
    oldest, *_ = [each for each in steps if each not in damaged][-keep_last:]
    for old in steps:
        if old < oldest and (not keep_every or old % keep_every):
            disk.remove(path_of(directory, old))
