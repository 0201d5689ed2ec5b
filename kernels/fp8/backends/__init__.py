"""Which backends of FP8 there are, what each can do, and what it needs.

A backend is a module of this folder with functions of `reference`, or some of them; it is imported when it is first
used, since it may need a package that is not there. One that lacks an operation says so here: nothing falls back in
silence to something slower or less exact. `auto` chooses among those that are there, by measuring.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from kernels.fp8 import formats

QUANTISATIONS = ("quantize", "dequantize", "gather_dequantize", "requantize")
GEMMS = ("linear", "linear_dgrad", "linear_wgrad")
GROUPED = ("grouped_linear", "grouped_dgrad", "grouped_wgrad")
OPERATIONS = (*QUANTISATIONS, *GEMMS, *GROUPED)
NEEDED = ("quantize", *GEMMS, *GROUPED)
"""What a model with experts calls through its own backend."""


class BackendError(ValueError):
    """A backend cannot do what is asked of it: not here, or not with these shapes."""


@dataclass(frozen=True)
class Backend:
    """What a backend can do, and what it needs.

    operations: those that it has. inexact: those whose bytes are not always the reference's. weight_dtype: of what its
    `prepare_weight` returns. multiple: what both widths of a weight must be multiples of. row_align: what the rows of
    each expert had better be multiples of, or they are copied. turns: whether Dgrad reads a transposed copy of a
    weight, which is kept as long as that (`layouts.transposed`). gpus: how the compute capabilities that it runs on are
    called, none for any device; `oldest` and `newest` are the first and the last of them. package, install: what must
    be importable, and how it is got. cuda: the oldest CUDA that torch may be built for.
    """

    operations: tuple[str, ...] = OPERATIONS
    inexact: tuple[str, ...] = ()
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    multiple: int = 1
    row_align: int = 1
    turns: bool = True
    gpus: str = ""
    oldest: tuple[int, int] = (0, 0)
    newest: tuple[int, int] = (99, 9)
    package: str = ""
    install: str = ""
    cuda: tuple[int, int] = (0, 0)


_TENSOR_CORES: dict[str, Any] = {"gpus": "9.0 or newer", "oldest": (9, 0)}
_HOPPER: dict[str, Any] = {"gpus": "9.0 (Hopper)", "oldest": (9, 0), "newest": (9, 9), "cuda": (12, 9)}

BACKENDS: dict[str, Backend] = {
    "auto": Backend(row_align=16, **_TENSOR_CORES),
    "reference": Backend(weight_dtype=torch.float32, turns=False),
    "transformer_engine": Backend(
        operations=("quantize", *GEMMS, *GROUPED),
        inexact=("quantize",),
        multiple=16,
        row_align=16,
        package="transformer_engine",
        install="pip install 'weft[gpu]'",
        **_HOPPER,
    ),
    "triton": Backend(
        package="triton",
        install="pip install triton (torch for CUDA brings it)",
        **_TENSOR_CORES,
    ),
    "cublas": Backend(operations=GEMMS, multiple=16, **_HOPPER),
}
"""By name; `auto` prefers them in this order where they are equally fast."""


@cache
def load(name: str) -> ModuleType:
    """The module of a backend. Raises `BackendError` if it cannot be imported."""
    try:
        return importlib.import_module(f"kernels.fp8.backends.{name}")
    except (ImportError, OSError) as error:  # a package that is there, and misses a symbol of another
        raise BackendError(f"{name} cannot be imported: {error}") from error


def obstacle(name: str, device: torch.device) -> str | None:
    """What keeps a backend from running on `device`, as a sentence's end, or None."""
    backend = BACKENDS[name]
    if name == "auto" and device.type == "cpu":
        return None
    if backend.gpus and device.type != "cuda":
        return f"needs a GPU of compute capability {backend.gpus}, and torch sees none here"
    if backend.gpus:
        found = torch.cuda.get_device_capability(device)
        if not backend.oldest <= found <= backend.newest:
            model = torch.cuda.get_device_name(device)
            return f"needs a GPU of compute capability {backend.gpus}; {model} has {found[0]}.{found[1]}"
    if backend.package and importlib.util.find_spec(backend.package) is None:
        return f"needs the package {backend.package}, which is not installed: {backend.install}"
    if backend.gpus and (version := _cuda()) < backend.cuda:
        return (
            f"needs torch for CUDA {_dotted(backend.cuda)} or newer; torch {torch.__version__} has {_dotted(version)}"
        )
    if name != "auto":
        try:
            load(name)
        except BackendError as error:
            return str(error)
    return None


def available(device: torch.device) -> list[str]:
    """The backends that can run on `device`, without `auto`, in the order of preference."""
    names = [name for name in BACKENDS if name not in ("auto", "reference") and obstacle(name, device) is None]
    return [*names, "reference"]


def resolve(name: str, device: torch.device) -> str:
    """The backend that `name` means on `device`: on a CPU `auto` is the reference, which is the only one there.

    Raises `BackendError` for one that cannot run there.
    """
    if reason := obstacle(name, device):
        raise BackendError(f"{reason}; expected {' or '.join(dict.fromkeys(['auto', *available(device)]))}")
    return "reference" if name == "auto" and device.type == "cpu" else name


def lacking(name: str) -> list[str]:
    """The operations of a model with experts that a backend does not have."""
    return [operation for operation in NEEDED if operation not in BACKENDS[name].operations]


def implementation(name: str, operation: str) -> ModuleType:
    """The module of a backend that has `operation`. Raises `BackendError` if this one has not."""
    if operation not in BACKENDS[name].operations:
        others = [other for other, backend in BACKENDS.items() if operation in backend.operations]
        raise BackendError(f"fp8.backend={name} has no {operation}; expected one of {', '.join(others)}")
    return formats if name == "reference" and operation in QUANTISATIONS else load(name)


def check_widths(name: str, *widths: int) -> None:
    """Raise `BackendError` unless a weight of these widths can be tiled by the backend."""
    multiple = BACKENDS[name].multiple
    if any(width % multiple for width in widths):
        shape = " x ".join(map(str, widths))
        raise BackendError(f"fp8.backend={name}: a weight of {shape}; expected multiples of {multiple}")


def _cuda() -> tuple[int, int]:
    major, minor, *_ = (torch.version.cuda or "0.0").split(".")
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
