"""The directory `checkpoints/`: `step-00000100/` is committed, `step-00000100.tmp/` is being written or was cut short.

Everything is written and flushed under the temporary name; one rename commits it. Whatever a killed run leaves is
therefore either whole or ignored, and the next save clears it away. `state.py` writes and reads what is inside.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from parallel.errors import UserError

META = "meta.json"
VERSION = 1


def path_of(directory: Path, step: int) -> Path:
    """Where the committed checkpoint of a step is."""
    return directory / f"step-{step:08d}"


def draft_of(directory: Path, step: int) -> Path:
    """Where it is written before."""
    return directory / f"step-{step:08d}.tmp"


def committed(directory: Path) -> list[int]:
    """The steps that have a committed checkpoint, in ascending order; none if there is no directory."""
    if not directory.is_dir():
        return []
    matches = [re.fullmatch(r"step-(\d{8,})", entry.name) for entry in directory.iterdir() if entry.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def newest(directory: Path) -> int | None:
    """The last committed step, or None."""
    steps = committed(directory)
    return steps[-1] if steps else None


def resume_step(directory: Path, resume: str | int) -> int | None:
    """The step that `checkpoint.resume` (`auto`, `never` or a step) asks for; None to start anew.

    Raises UserError for a step without a committed checkpoint, naming those that exist.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest(directory)
    steps = committed(directory)
    if not str(resume).isdecimal() or int(resume) not in steps:
        there_are = f"{directory} has " + (", ".join(map(str, steps)) or "no checkpoint")
        raise UserError(f"checkpoint.resume={resume}: expected auto, never or the step of a checkpoint; {there_are}")
    return int(resume)


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """The JSON that was saved with a step. Raises UserError if it is missing, damaged or of another version of weft."""
    file = path_of(directory, step) / META
    try:
        meta = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected the description of a checkpoint ({error})") from error
    if meta.get("version") != VERSION:
        raise UserError(f"{file}: checkpoint of version {meta.get('version')}; expected {VERSION}")
    return meta


def begin(directory: Path, step: int) -> None:
    """Clear away what killed runs left and make the place to write to. On one rank."""
    directory.mkdir(parents=True, exist_ok=True)
    for draft in directory.glob("step-*.tmp"):
        shutil.rmtree(draft)
    draft_of(directory, step).mkdir()


def commit(directory: Path, step: int, meta: dict[str, Any], keep_last: int) -> None:
    """Make the draft of a step, whose other files are on disk, the checkpoint. On one rank, once all have written.

    A checkpoint of the same step gives way. Of those up to this step the newest `keep_last` (at least 1) stay.
    """
    draft, final = draft_of(directory, step), path_of(directory, step)
    with (draft / META).open("w") as file:
        json.dump({"version": VERSION, "step": step, **meta}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush(draft)
    if final.exists():
        remove(final)
    draft.rename(final)
    flush(directory)
    for old in [earlier for earlier in committed(directory) if earlier <= step][:-keep_last]:
        remove(path_of(directory, old))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint in such a way that half of one is never taken for a whole."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old.tmp")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def flush(directory: Path) -> None:
    """Force a directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
