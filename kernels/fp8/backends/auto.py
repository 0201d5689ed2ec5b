"""The backend that asks which of the others is fastest, once for each operation and shape, and then remembers.

Candidates are the backends that can run on this GPU, have the operation exactly, tile the widths, and agree with the
reference on a small example. The first use of a shape times them on its own operands; rows count in powers of two. What
is picked is printed once, and kept in a file under $WEFT_CACHE (else ~/.cache/weft) for this GPU and these versions of
torch, CUDA, Triton, Transformer Engine and weft's kernels. Who measures first binds all that share the file, so ranks
compute with the same backends, and a run repeated computes the same bits: nodes should share $WEFT_CACHE, or a copy.

The GPU is not waited for beyond the current stream, and the file's lock is not held while that one waits for others.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from kernels.fp8 import backends, compare
from kernels.fp8.backends import BACKENDS, QUANTISATIONS

MARGIN = 0.98
"""A backend that is preferred is kept unless another takes less than this share of its time."""


def prepare_weight(codes: Tensor) -> Tensor:
    """Codes as they are: what every candidate on a GPU reads."""
    return codes


def quantize(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`formats.quantize`."""
    key = f"{tile[0]}x{tile[1]} of {_bucket(x.shape[-2])} x {x.shape[-1]}"
    return _best("quantize", key, x.device, lambda backend: backend.quantize(x, tile, power_of_two))


def dequantize(codes: Tensor, scales: Tensor, tile: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """`formats.dequantize`."""
    key = f"{tile[0]}x{tile[1]} of {_bucket(codes.shape[-2])} x {codes.shape[-1]}"
    return _best("dequantize", key, codes.device, lambda backend: backend.dequantize(codes, scales, tile, dtype))


def gather_dequantize(codes: Tensor, scale_bytes: Tensor, order: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`formats.gather_dequantize`."""
    return _best(
        "gather_dequantize",
        f"{_bucket(len(order))} x {codes.shape[1]}",
        codes.device,
        lambda backend: backend.gather_dequantize(codes, scale_bytes, order, dtype),
    )


def requantize(codes: Tensor, scales: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """`formats.requantize`."""
    key = f"{_bucket(codes.shape[0])} x {codes.shape[1]}, {len(counts)} groups"
    return _best("requantize", key, codes.device, lambda backend: backend.requantize(codes, scales, counts))


def linear(
    x: Tensor, x_scales: Tensor, weights: list[Tensor], weight_scales: list[Tensor], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """`reference.linear`."""
    return _best(
        "linear",
        _shapes(x, weights, dtype),
        x.device,
        lambda backend: backend.linear(x, x_scales, weights, weight_scales, dtype),
        *_widths(weights),
    )


def linear_dgrad(
    dys: list[Tensor],
    dy_scales: list[Tensor],
    weights: list[Tensor],
    weight_scales: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.linear_dgrad`."""
    return _best(
        "linear_dgrad",
        _shapes(dys[0], weights, dtype),
        dys[0].device,
        lambda backend: backend.linear_dgrad(dys, dy_scales, weights, weight_scales, dtype),
        *_widths(weights),
    )


def linear_wgrad(x: Tensor, x_scales: Tensor, dys: list[Tensor], dy_scales: list[Tensor], out: list[Tensor]) -> None:
    """`reference.linear_wgrad`; measured on zeros in place of `out`."""
    return _best(
        "linear_wgrad",
        _shapes(x, out, torch.float32),
        x.device,
        lambda backend, out=out: backend.linear_wgrad(x, x_scales, dys, dy_scales, out),
        *_widths(out),
        scratch=lambda: [torch.zeros_like(each) for each in out],
    )


def grouped_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.grouped_linear`."""
    return _best(
        "grouped_linear",
        _shapes(x, [weight], dtype),
        x.device,
        lambda backend: backend.grouped_linear(x, x_scales, weight, weight_scales, counts, dtype),
        *_widths([weight]),
    )


def grouped_dgrad(
    dy: Tensor,
    dy_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.grouped_dgrad`."""
    return _best(
        "grouped_dgrad",
        _shapes(dy, [weight], dtype),
        dy.device,
        lambda backend: backend.grouped_dgrad(dy, dy_scales, weight, weight_scales, counts, dtype),
        *_widths([weight]),
    )


def grouped_wgrad(x: Tensor, x_scales: Tensor, dy: Tensor, dy_scales: Tensor, out: Tensor, counts: list[int]) -> None:
    """`reference.grouped_wgrad`; measured on zeros in place of `out`."""
    return _best(
        "grouped_wgrad",
        _shapes(x, [out], torch.float32),
        x.device,
        lambda backend, out=out: backend.grouped_wgrad(x, x_scales, dy, dy_scales, out, counts),
        *_widths([out]),
        scratch=lambda: torch.zeros_like(out),
    )


def _bucket(rows: int) -> int:
    """Rows, rounded up to a power of two: shapes that differ by less share a choice."""
    return 1 << max(rows - 1, 0).bit_length()


def _shapes(rows: Tensor, weights: list[Tensor], dtype: torch.dtype) -> str:
    widths = " + ".join("x".join(map(str, weight.shape)) for weight in weights)
    return f"{_bucket(rows.shape[0])} rows, {widths}, {str(dtype).removeprefix('torch.')}"


def _widths(weights: list[Tensor]) -> list[int]:
    return [width for weight in weights for width in weight.shape[-2:]]


def _best(
    operation: str,
    shape: str,
    device: torch.device,
    call: Callable[..., Any],
    *widths: int,
    scratch: Callable[[], Any] | None = None,
) -> Any:
    """Call `operation` on the backend that is fastest at this shape; `scratch` makes what a trial may write to."""
    name = choice(operation, shape, device, call, widths, scratch)
    return call(backends.implementation(name, operation))


def choice(
    operation: str,
    shape: str,
    device: torch.device,
    call: Callable[..., Any],
    widths: tuple[int, ...] = (),
    scratch: Callable[[], Any] | None = None,
) -> str:
    """The name of the backend for `operation` at `shape`: the only one, the one remembered, or the fastest now."""
    names = candidates(operation, device, widths)
    if len(names) == 1:
        return names[0]
    key = f"{operation}: {shape}"
    memory = _memory(device)
    if known := memory.get(key, names):
        return known
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # before the lock: this may wait for another rank
    with memory.lock:
        memory.read()
        if not (known := memory.get(key, names)):
            written = scratch() if scratch else None
            times = {name: _time(call, backends.implementation(name, operation), device, written) for name in names}
            known = fastest(times)
            memory.add(key, known, times)
    return known


def fastest(times: dict[str, float]) -> str:
    """The first name unless another is faster by more than the margin."""
    best, *others = times
    for name in others:
        if times[name] < MARGIN * times[best]:
            best = name
    return best


def _time(call: Callable[..., Any], backend: ModuleType, device: torch.device, written: Any) -> float:
    arguments = (backend,) if written is None else (backend, written)
    return compare.seconds(lambda: call(*arguments), device, repeats=5)


def candidates(operation: str, device: torch.device, widths: tuple[int, ...] = ()) -> list[str]:
    """Backends that may be picked, in the order of preference; the reference only where there is no other."""
    names = [
        name for name in trusted(operation, device) if not any(width % BACKENDS[name].multiple for width in widths)
    ]
    return names or ["reference"]


@cache
def trusted(operation: str, device: torch.device) -> list[str]:
    """Backends that have `operation` exactly, and agree with the reference on a small example; says who does not."""
    names = []
    for name in backends.available(device):
        backend = BACKENDS[name]
        if name == "reference" or operation not in backend.operations or operation in backend.inexact:
            continue
        try:
            verdict = compare.judge(compare.Case(operation, compare.Sizes(), device, torch.float32), name)
        except (RuntimeError, ValueError, TypeError) as error:
            _say(f"{operation} of {name} is left out: {error}")
            continue
        if verdict.good(exact=operation in QUANTISATIONS):
            names.append(name)
        else:
            _say(f"{operation} of {name} is left out: it differs from the reference by {verdict.diff:.1e}")
    if not names and device.type == "cuda":
        _say(f"{operation}: no backend for this GPU but the reference, which is slow")
    return names


class Memory:
    """What has been picked, in a file that processes share."""

    def __init__(self, file: Path, described: dict[str, str]) -> None:
        self.file, self.described = file, described
        self.choices: dict[str, dict[str, Any]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(f"{file}.lock")
        self.read()

    def read(self) -> None:
        """Take over what others have written."""
        if self.file.exists():
            self.choices = json.loads(self.file.read_text())["choices"]

    def get(self, key: str, names: list[str]) -> str | None:
        """The backend picked for `key`, if it is among `names`."""
        picked = self.choices.get(key, {}).get("picked")
        return picked if picked in names else None

    def add(self, key: str, picked: str, times: dict[str, float]) -> None:
        """Remember and say what has been picked. The caller holds the lock."""
        microseconds = {name: round(1e6 * time, 1) for name, time in times.items()}
        self.choices[key] = {"picked": picked, "microseconds": microseconds}
        draft = self.file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({**self.described, "choices": self.choices}, indent=1) + "\n")
        draft.replace(self.file)
        told = ", ".join(f"{name} {time:.1f} us" for name, time in microseconds.items())
        _say(f"{key}: picked {picked} ({told})")


@cache
def _memory(device: torch.device) -> Memory:
    described = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": str(torch.version.cuda),
        "kernels": _sources(),
        **{name: version(name) for name in ("torch", "triton", "transformer-engine")},
    }
    folder = Path(os.environ.get("WEFT_CACHE") or Path.home() / ".cache" / "weft")
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    return Memory(folder / f"fp8-choices-{digest}.json", described)


def version(package: str) -> str:
    """The version of an installed package, or `none`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _sources() -> str:
    """A digest of this folder: kernels that have changed are measured anew."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))).hexdigest()[:16]


def _say(message: str) -> None:
    """To the console, once: from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"weft: fp8.backend=auto: {message}", file=sys.stderr, flush=True)
