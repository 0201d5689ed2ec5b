"""`manifest.json`: what a checkpoint consists of, so that nothing is believed that is not in it.

It names every file with its size and SHA-256, every tensor with its dtype, its global shape and where its pieces lie,
and what a run wants to know of itself (`meta`). It ends with the SHA-256 of all the rest, so that an edited or damaged
manifest is refused too. JSON throughout: reading a checkpoint executes nothing.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from parallel.errors import UserError
from train.checkpoint import disk

NAME = "manifest.json"
VERSION = 2
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""The dtypes by their names in the safetensors format."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Damaged(UserError):
    """A checkpoint that is not what was saved; the message names the file."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")


class Piece(NamedTuple):
    """Elements [start, start + length) of a flattened tensor, stored under its name in `file`."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor: dtype as safetensors spells it, global shape, and the pieces that make it up, in order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class File:
    """Size and hash of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents."""

    step: int
    meta: dict[str, Any]
    files: dict[str, File]
    tensors: dict[str, Stored]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())

    def check(self) -> None:
        """Raise ValueError unless every tensor is there, each element once."""
        for name, tensor in self.tensors.items():
            ends = [0, *(piece.start + piece.length for piece in tensor.pieces)]
            starts = [*(piece.start for piece in tensor.pieces), math.prod(tensor.shape)]
            if starts != ends or not all(begin < end for begin, end in pairwise(ends)):
                raise ValueError(f"the pieces of {name} are not its {math.prod(tensor.shape)} elements, each once")

    def write(self, folder: Path) -> None:
        """Write it as the last file of a draft. Raises ValueError if `check` does."""
        self.check()
        contents = {"version": VERSION, **asdict(self)}
        disk.write(folder / NAME, [json.dumps({**contents, "sha256": digest(contents)}).encode()])

    @classmethod
    def of(cls, folder: Path, step: int) -> "Manifest":
        """The manifest of the checkpoint of a step. Raises `Damaged` if it is that of another, or as `read` does."""
        found = cls.read(folder)
        if found.step != step:
            raise Damaged(folder / NAME, f"it describes step {found.step}")
        return found

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint. Raises `Damaged` if it is missing or not as it was written."""
        path = folder / NAME
        try:
            contents = json.loads(path.read_text("utf-8") if path.is_file() else "")
            if contents.pop("sha256") != digest(contents):
                raise Damaged(path, "it is not as it was written: its SHA-256 differs from the one at its end")
            if contents["version"] != VERSION:
                raise Damaged(path, f"checkpoint of version {contents['version']}; expected {VERSION}")
            files = {name: File(size(file["bytes"]), text(file["sha256"])) for name, file in contents["files"].items()}
            if strange := [name for name in files if not re.fullmatch(r"[\w-]+\.safetensors", name, re.ASCII)]:
                raise ValueError(f"a file called {strange[0]}")
            tensors = {name: stored(each, files) for name, each in contents["tensors"].items()}
            found = cls(size(contents["step"]), dict(contents["meta"]), files, tensors)
            found.check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            missing = "" if path.is_file() else "it is missing; "
            raise Damaged(path, f"{missing}expected the manifest of a checkpoint ({error})") from error
        return found


def stored(value: dict[str, Any], files: dict[str, File]) -> Stored:
    """A tensor's entry as it was read."""
    pieces = tuple(Piece(text(file), size(start), size(length)) for file, start, length in value["pieces"])
    if value["dtype"] not in DTYPES or any(piece.file not in files for piece in pieces):
        raise ValueError(f"a tensor of dtype {value['dtype']} in {[piece.file for piece in pieces]}")
    return Stored(value["dtype"], tuple(map(size, value["shape"])), pieces)


def size(value: Any) -> int:
    """`value`, which must be a whole number from 0 on."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a whole number belongs")
    return value


def text(value: Any) -> str:
    """`value`, which must be a string."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where a name belongs")
    return value


def digest(contents: dict[str, Any]) -> str:
    """SHA-256 of JSON, however it is spelt."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
