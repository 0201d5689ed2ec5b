"""One example of every operation, and how a backend's answer and speed are judged on it.

`auto` tries a backend on them before it trusts it; `weft doctor --fp8`, the GPU's tests and the benchmark use them.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from kernels.fp8 import formats
from kernels.fp8.backends import QUANTISATIONS, BackendError, implementation
from kernels.fp8.formats import BLOCKS, COLUMNS, ROWS

ALIKE = 1e-5
"""Largest `calc_diff` of two GEMMs on the same FP8 operands, which leave only sums to differ. (DeepGEMM's tests allow
1e-3, but compare with what has not been quantised.) The wrong scale of one tile of an example makes 2e-5 or more."""


@dataclass(frozen=True)
class Sizes:
    """Rows, widths and rows of each expert; `counts` add up to any number, and its length is that of the experts."""

    M: int = 272
    N: int = 384
    K: int = 512
    counts: list[int] = field(default_factory=lambda: [128, 0, 272, 16])


class Case:
    """Operands of one operation on random data, with outliers; `run` gives what a backend makes of them."""

    def __init__(self, operation: str, sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.operation, self.sizes, self.device, self.dtype = operation, sizes, device, dtype
        self.grouped = operation.startswith("grouped")
        self.generator = torch.Generator(device).manual_seed(0)
        self.weight: dict[str, Tensor] = {}
        rows = sum(sizes.counts) if self.grouped else sizes.M
        experts = [len(sizes.counts)] if self.grouped else []
        self.x, self.dy = self._data(rows, sizes.K), self._data(rows, sizes.N)
        if operation not in QUANTISATIONS:
            self.w, self.w_scales = formats.quantize(self._data(*experts, sizes.N, sizes.K), BLOCKS)
        self.x_codes, self.dy_codes = formats.quantize(self.x, ROWS), formats.quantize(self.dy, ROWS)
        self.out_shape = (*experts, sizes.N, sizes.K)

    def _data(self, *shape: int) -> Tensor:
        """Normal numbers in BF16, a few of which are ten times as large."""
        x = torch.randn(shape, generator=self.generator, device=self.device)
        outliers = torch.rand(shape, generator=self.generator, device=self.device) < 1e-3
        return torch.where(outliers, 10 * x, x).bfloat16()

    @property
    def flops(self) -> int:
        """Of a GEMM; 0 for a quantisation."""
        rows = 0 if self.operation in QUANTISATIONS else self.x.shape[0]
        return 2 * rows * self.sizes.N * self.sizes.K

    def prepared(self, name: str) -> Tensor:
        """The weight as the backend wants it, made once."""
        if name not in self.weight:
            self.weight[name] = implementation(name, self.operation).prepare_weight(self.w)
        return self.weight[name]

    def run(self, name: str, out: Tensor | None = None) -> list[Tensor]:
        """What backend `name` makes of the operands; weight gradients are added to `out`, zeros unless given."""
        module: ModuleType = implementation(name, self.operation)
        if self.operation in QUANTISATIONS:
            return getattr(self, f"_{self.operation}")(module)
        function, counts = getattr(module, self.operation), self.sizes.counts
        if self.operation.endswith("wgrad"):
            out = torch.zeros(self.out_shape, device=self.device) if out is None else out
            if self.grouped:
                function(*self.x_codes, *self.dy_codes, out, counts)
            else:
                function(*self.x_codes, [self.dy_codes[0]], [self.dy_codes[1]], [out])
            return [out]
        w = self.prepared(name)
        left = self.dy_codes if self.operation.endswith("dgrad") else self.x_codes
        if self.grouped:
            return [function(*left, w, self.w_scales, counts, self.dtype)]
        if self.operation == "linear":
            return list(function(*left, [w], [self.w_scales], self.dtype))
        return [function([left[0]], [left[1]], [w], [self.w_scales], self.dtype)]

    def truth(self) -> list[Tensor]:
        """A GEMM in FP64 of what the FP8 operands stand for: what the reference itself is held against."""
        groups = self.sizes.counts if self.grouped else [self.x.shape[0]]
        if self.operation.endswith("wgrad"):
            x, dy = (
                formats.dequantize(*formats.requantize(*codes, groups), ROWS).double()
                for codes in (self.x_codes, self.dy_codes)
            )
            tiles = [-(-count // 128) * 128 for count in groups]
            parts = [b @ a.t() for a, b in zip(x.split(tiles, 1), dy.split(tiles, 1), strict=True)]
            return [torch.stack(parts) if self.grouped else parts[0]]
        left = self.dy_codes if self.operation.endswith("dgrad") else self.x_codes
        rows, w = formats.dequantize(*left, ROWS).double(), formats.dequantize(self.w, self.w_scales, BLOCKS).double()
        w_EKN = w.view(len(groups), *w.shape[-2:]).transpose(1, 2)
        if self.operation.endswith("dgrad"):
            w_EKN = w_EKN.transpose(1, 2)
        return [torch.cat([a @ b for a, b in zip(rows.split(groups), w_EKN, strict=True)])]

    def _quantize(self, module: ModuleType) -> list[Tensor]:
        tiles = [(ROWS, False), (ROWS, True), (COLUMNS, False), (BLOCKS, False)]
        return [part for tile, power_of_two in tiles for part in module.quantize(self.x, tile, power_of_two)]

    def _dequantize(self, module: ModuleType) -> list[Tensor]:
        return [module.dequantize(*self.x_codes, ROWS)]

    def _gather_dequantize(self, module: ModuleType) -> list[Tensor]:
        codes, scales = self.x_codes
        bytes_of = [each.contiguous().view(torch.uint8) for each in (codes, scales)]
        rows = torch.cat([*bytes_of, bytes_of[0][:, :2]], 1)  # as they travel, at odd places
        order = torch.arange(2 * len(rows), device=self.device) * 7 % len(rows)
        travelled = rows[:, : codes.shape[1]].view(codes.dtype), rows[:, codes.shape[1] : -2]
        return [module.gather_dequantize(*travelled, order, self.dtype)]

    def _requantize(self, module: ModuleType) -> list[Tensor]:
        return list(module.requantize(*self.x_codes, [self.x.shape[0]]))


def calc_diff(x: Tensor, y: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) in FP64: 0 for equal tensors, the measure of DeepGEMM's tests."""
    x, y = x.double().flatten(), y.double().flatten()
    norm = float(x @ x + y @ y)
    return 1 - 2 * float(x @ y) / norm if norm else 0.0


@dataclass(frozen=True)
class Verdict:
    """How far a backend's answer is from the reference's: share of equal bytes, `calc_diff`, largest error."""

    equal: float
    diff: float
    largest: float

    def good(self, exact: bool) -> bool:
        """Whether the backend may be trusted with the operation; `exact`: every byte is asked for."""
        return self.equal == 1 if exact else self.diff < ALIKE


def judge(case: Case, name: str) -> Verdict:
    """Compare a backend with the reference, and the reference's GEMMs with FP64. Raises what the backend raises."""
    theirs = case.run(name)
    ours = case.truth() if name == "reference" and case.flops else case.run("reference")
    pairs = [(a, b.to(a.dtype)) for a, b in zip(theirs, ours, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        raise BackendError(f"{name}: {case.operation} gives {[list(a.shape) for a, _ in pairs]}")
    equal = sum(int((_bytes(a) == _bytes(b)).sum()) for a, b in pairs)
    values = [(a.float(), b.float()) for a, b in pairs]
    return Verdict(
        equal / sum(_bytes(b).numel() for _, b in pairs),
        max(calc_diff(a, b) for a, b in values),
        max(float((a - b).abs().max()) for a, b in values),
    )


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 10, flush: Tensor | None = None) -> float:
    """Median time of a call after warming up. flush: a large tensor, written in between so that no cache helps.

    On a GPU the host waits for the current stream alone: other streams may hold what another rank is waited for.
    """
    for _ in range(3):
        call()
    if device.type != "cuda":
        return statistics.median(_wall(call) for _ in range(repeats))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        if flush is not None:
            flush.zero_()
        begin.record()
        call()
        end.record()
    pairs[-1][1].synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def _wall(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
