"""The files of a checkpoint: safetensors, each with pieces of flattened tensors under the tensors' own names.

The format is a length, a JSON header and the bytes; any safetensors reader opens it. Written and read here because the
library neither hashes what it writes nor reads into memory that exists. A rank writes what it holds, cut into files of
bounded size, so that several threads share the work; it reads whatever pieces overlap what it is asked to fill.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.flat_shard import FlatShard
from train.checkpoint import disk
from train.checkpoint.manifest import DTYPES, NAMES, Damaged, File, Manifest, Piece, Stored

FILE_BYTES = 1 << 29


@dataclass(frozen=True)
class Part:
    """What this rank holds of a tensor: elements [start, start + len(local)) of its `shape`, flattened."""

    name: str
    local: Tensor
    start: int
    shape: tuple[int, ...]


def parts_of(state: Mapping[str, Any], prefix: str = "") -> Iterator[Part]:
    """Nested dictionaries of tensors (which are whole) and flat shards, under dotted names."""
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from parts_of(value, f"{name}.")
        elif isinstance(value, FlatShard):
            yield Part(name, value.local, value.start, value.shape)
        else:
            yield Part(name, value.detach().view(-1), 0, tuple(value.shape))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a flat CPU tensor, in place."""
    return memoryview(tensor.view(torch.uint8).numpy().data)


# ---------------------------------------------------------------- writing
def files_of(parts: list[Part]) -> list[list[Part]]:
    """Cut parts into files of at most `FILE_BYTES`; wide dtypes first, so that every tensor starts at its alignment."""
    files: list[list[Part]] = []
    room = 0
    for part in sorted(parts, key=lambda part: -part.local.itemsize):
        left = part
        while left.local.numel():
            if room < left.local.itemsize:
                files.append([])
                room = FILE_BYTES
            count = min(left.local.numel(), room // left.local.itemsize)
            files[-1].append(replace(left, local=left.local[:count]))
            room -= count * left.local.itemsize
            left = replace(left, local=left.local[count:], start=left.start + count)
    return files


def header_of(parts: list[Part]) -> bytes:
    """The beginning of a safetensors file that holds these parts one after the other, and says where each starts."""
    entries: dict[str, Any] = {"__metadata__": {part.name: str(part.start) for part in parts}}
    offset = 0
    for part in parts:
        end = offset + part.local.nbytes
        dtype, count = NAMES[part.local.dtype], part.local.numel()
        entries[part.name] = {"dtype": dtype, "shape": [count], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


Written = dict[str, tuple[File, list[tuple[str, str, tuple[int, ...], Piece]]]]
"""File -> its size and hash, and (tensor, dtype, shape, piece) of what is in it."""


def write(folder: Path, rank: int, parts: list[Part], threads: int, wanted: Callable[[], None]) -> Written:
    """Write a rank's parts, which are on the CPU, into new files; `wanted` may raise to give up."""

    def one(numbered: tuple[int, list[Part]]) -> tuple[str, Any]:
        number, held = numbered
        name = f"rank-{rank:05d}-{number:03d}.safetensors"
        bytes, sha256 = disk.write(folder / name, [header_of(held), *(raw(part.local) for part in held)], wanted)
        pieces = [(p.name, NAMES[p.local.dtype], p.shape, Piece(name, p.start, p.local.numel())) for p in held]
        return name, (File(bytes, sha256), pieces)

    return dict(in_threads(one, list(enumerate(files_of(parts))), threads))


def manifest_of(step: int, meta: dict[str, Any], written: list[Written]) -> Manifest:
    """The manifest of what all ranks have written."""
    files = {name: file for each in written for name, (file, _) in each.items()}
    found: dict[str, tuple[str, tuple[int, ...], list[Piece]]] = {}
    for each in written:
        for _, pieces in each.values():
            for name, dtype, shape, piece in pieces:
                found.setdefault(name, (dtype, shape, []))[2].append(piece)
    tensors = {
        name: Stored(dtype, shape, tuple(sorted(pieces, key=lambda piece: piece.start)))
        for name, (dtype, shape, pieces) in sorted(found.items())
    }
    return Manifest(step, meta, files, tensors)


# ---------------------------------------------------------------- reading
@contextmanager
def opened(folder: Path, name: str, file: File) -> Iterator[int]:
    """The descriptor of a file of a checkpoint. Raises `Damaged` if it is missing, no file, or of another size."""
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place must not hold us
    except OSError as error:
        raise Damaged(path, str(error)) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.bytes:
            raise Damaged(path, f"it has {found.st_size} bytes; expected a file of {file.bytes}")
        yield descriptor
    except OSError as error:
        raise Damaged(path, str(error)) from error
    finally:
        os.close(descriptor)


def verify(folder: Path, manifest: Manifest, names: list[str], threads: int) -> list[str]:
    """What is wrong with these files of a checkpoint, one message a file; none if they are as they were written."""

    def one(name: str) -> str:
        buffer, digest = memoryview(bytearray(disk.BLOCK)), hashlib.sha256()
        try:
            with opened(folder, name, manifest.files[name]) as descriptor:
                while count := os.readv(descriptor, [buffer]):
                    digest.update(buffer[:count])
        except Damaged as damaged:
            return str(damaged)
        if digest.hexdigest() == manifest.files[name].sha256:
            return ""
        return f"{folder / name}: its SHA-256 is not the manifest's; it has been changed since it was written"

    return [problem for problem in in_threads(one, names, threads) if problem]


def misfits(manifest: Manifest, parts: list[Part]) -> list[str]:
    """Why these parts cannot be filled from a checkpoint, one reason a tensor."""
    found = []
    for part in parts:
        stored, dtype = manifest.tensors.get(part.name), NAMES[part.local.dtype]
        if stored is None:
            found.append(f"{part.name}: it is not in the checkpoint")
        elif stored.shape != part.shape:
            found.append(f"{part.name}: shape {list(stored.shape)} in the checkpoint, {list(part.shape)} in this run")
        elif stored.dtype != dtype:
            found.append(f"{part.name}: dtype {stored.dtype} in the checkpoint, {dtype} in this run")
    return found


def read(folder: Path, manifest: Manifest, parts: list[Part], threads: int) -> None:
    """Fill parts, for which there are no `misfits`, from the files of a verified checkpoint."""
    wanted: dict[str, list[tuple[Part, Piece]]] = {}
    for part in parts:
        for piece in manifest.tensors[part.name].pieces:
            if piece.start < part.start + part.local.numel() and part.start < piece.start + piece.length:
                wanted.setdefault(piece.file, []).append((part, piece))

    def one(item: tuple[str, list[tuple[Part, Piece]]]) -> None:
        name, pairs = item
        with opened(folder, name, manifest.files[name]) as descriptor:
            offsets = offsets_of(folder / name, descriptor, manifest)
            for part, piece in pairs:
                first = max(part.start, piece.start)
                last = min(part.start + len(part.local), piece.start + piece.length)
                into = part.local[first - part.start : last - part.start]
                landing = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
                fill(descriptor, raw(landing), offsets[part.name] + (first - piece.start) * into.itemsize)
                if landing is not into:
                    into.copy_(landing)

    in_threads(one, list(wanted.items()), threads)


def offsets_of(path: Path, descriptor: int, manifest: Manifest) -> dict[str, int]:
    """Where each tensor of a file begins. Raises `Damaged` unless its header says what the manifest does."""
    size = manifest.files[path.name].bytes
    pieces = [(n, t.dtype, piece) for n, t in manifest.tensors.items() for piece in t.pieces if piece.file == path.name]
    offsets = {}
    try:
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        header = json.loads(os.pread(descriptor, min(length, size), 8).decode())
        for name, dtype, piece in pieces:
            begin, end = header[name]["data_offsets"]
            same = header[name]["dtype"] == dtype and header["__metadata__"][name] == str(piece.start)
            whole = header[name]["shape"] == [piece.length] and end - begin == piece.length * DTYPES[dtype].itemsize
            if not (same and whole and 0 <= begin < end <= size - 8 - length):
                raise ValueError(f"{name} is not what the manifest says")
            offsets[name] = 8 + length + begin
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(path, f"expected a safetensors file with what the manifest says ({error})") from error
    return offsets


def fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Read a file from `offset` on until `buffer` is full."""
    while len(buffer):
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            raise OSError(0, "it ended early")
        buffer, offset = buffer[count:], offset + count


def in_threads(function: Callable[[Any], Any], items: list[Any], threads: int) -> list[Any]:
    """`function` of each item, in so many threads."""
    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
