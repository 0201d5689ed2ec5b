"""What a checkpoint holds: tensors by parameter name, through `torch.distributed.checkpoint`, and a JSON description.

A name and the place within its tensor are all that is stored of a shard, so any layout loads what any other has saved:
each rank offers the tensors that it holds and they are filled in place. Masters and moments come as flat shards from
`parallel/zero.py`; the parameters themselves are their cast and are not stored.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from parallel.errors import UserError
from train.checkpoint import directory as checkpoints


def save(directory: Path, step: int, state: dict[str, Any], meta: Mapping[str, Any], keep_last: int) -> None:
    """Write and commit the checkpoint of a step; called by every rank of the world with its part.

    state: nested dictionaries of tensors and flat shards; what several ranks hold under one name is equal and is
    written once. meta: anything JSON, from rank 0. keep_last: how many checkpoints up to this one stay, at least 1.
    """
    first = dist.get_rank() == 0
    if first:
        checkpoints.begin(directory, step)
    dist.barrier()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(checkpoints.draft_of(directory, step), sync_files=True))
    if first:
        checkpoints.commit(directory, step, dict(meta), keep_last)
    dist.barrier()


def load(
    directory: Path, step: int, state: dict[str, Any], expected: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fill `state`'s tensors, whatever layout they belong to, from a committed checkpoint; called by every rank.

    expected: parts of the description that must be equal to this run's, such as its model. Returns the description.
    Raises UserError, on all ranks, if they are not, or if a name is missing or has another size in the checkpoint.
    """
    path = checkpoints.path_of(directory, step)
    meta = checkpoints.read_meta(directory, step)
    for key, saved, now in differences({key: meta.get(key) for key in expected or {}}, expected or {}):
        raise UserError(f"{key}={now}: checkpoint {path} was saved with {saved}; expected the same")
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{path} cannot be loaded into this run: {cause}") from error
    return meta


def differences(saved: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, value now) of every leaf that differs between two JSON-like trees."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for name in sorted({*saved, *now}):
            yield from differences(saved.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif saved != now:
        yield key, saved, now
