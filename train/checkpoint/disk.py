"""The few things that are done to a disk, each of which a power cut may follow.

What is written is flushed before anybody relies on it, and hashed from the same bytes that are handed to the kernel,
never from what a read returns. `observer` hears of every step, before and after it: fault tests kill the process there.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

BLOCK = 1 << 22
"""Bytes written, read or hashed at a time: they stay in a cache between one and the next."""


def ignore(operation: str, path: Path) -> None:
    """Nobody watches."""


observer: Callable[[str, Path], None] = ignore


def write(
    path: Path, parts: Iterable[bytes | memoryview], wanted: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Write a new file and flush it; returns its size and SHA-256. `wanted` may raise between blocks to give up."""
    digest, size = hashlib.sha256(), 0
    observer("create", path)
    with path.open("xb", buffering=0) as file:
        for part in parts:
            whole = memoryview(part)
            for begin in range(0, len(whole), BLOCK):
                wanted()
                block = whole[begin : begin + BLOCK]
                digest.update(block)
                size += len(block)
                while len(block):  # a disk that is nearly full takes a part
                    block = block[file.write(block) :]
                observer("write", path)
        os.fsync(file.fileno())
    observer("written", path)
    return size, digest.hexdigest()


def rename(path: Path, name: Path) -> None:
    """Give a file or folder another name in the same folder, in one step that survives a power cut."""
    observer("rename", name)
    path.rename(name)
    observer("renamed", name)
    flush(name.parent)
    observer("rename flushed", name)


def remove(folder: Path) -> None:
    """Delete a folder in such a way that half of it is never taken for a whole."""
    doomed = folder if folder.suffix == ".tmp" else folder.with_name(f"{folder.name}.gone.tmp")
    if doomed != folder:
        rename(folder, doomed)
    observer("remove", doomed)
    shutil.rmtree(doomed)
    observer("removed", doomed)


def flush(folder: Path) -> None:
    """Force a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
