"""Block-scaled FP8 behind one interface: quantise, and the three GEMMs of a linear and of a grouped linear.

`formats` says what a quantised matrix is; a backend is a module with the functions of `reference`, which defines the
meaning and runs anywhere. The operators here are what the rest of weft calls, traces and prices: one per quantisation,
one per Fprop, Dgrad and Wgrad (report Figure 6), whatever the backend does beneath. FP8 values count one byte.
"""

from types import ModuleType

import torch
from torch import Tensor

from kernels.fp8 import formats, reference
from kernels.fp8.formats import BLOCKS, COLUMNS, ROWS
from kernels.ops import Cost, op, size

__all__ = ["BACKENDS", "BLOCKS", "COLUMNS", "ROWS"]

BACKENDS: dict[str, ModuleType] = {"reference": reference}


def _ceil(x: int, tile: int) -> int:
    return -(-x // tile)


def _fake_quantize(x: Tensor, tile: list[int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    *batch, R, C = x.shape
    scales = x.new_empty(*batch, _ceil(R, tile[0]), _ceil(C, tile[1]), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scales


@op(cost=lambda x, tile, power_of_two: Cost(3 * x.numel(), size(x) + x.numel()), fake=_fake_quantize)
def fp8_quantize(x: Tensor, tile: list[int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`formats.quantize`: codes in float8_e4m3fn and FP32 scales."""
    return formats.quantize(x, (tile[0], tile[1]), power_of_two)


@op(
    cost=lambda codes, scales, tile, dtype: Cost(codes.numel(), codes.numel() * (1 + dtype.itemsize) + size(scales)),
    fake=lambda codes, scales, tile, dtype: torch.empty_like(codes, dtype=dtype),
)
def fp8_dequantize(codes: Tensor, scales: Tensor, tile: list[int], dtype: torch.dtype) -> Tensor:
    """`formats.dequantize`, rounded to `dtype`; in BF16 with power-of-two scales nothing is rounded."""
    return formats.dequantize(codes, scales, (tile[0], tile[1])).to(dtype)


@op(
    cost=lambda codes, backend: Cost(0, codes.numel() * (1 + BACKENDS[backend].WEIGHT_DTYPE.itemsize)),
    fake=lambda codes, backend: torch.empty_like(codes, dtype=BACKENDS[backend].WEIGHT_DTYPE),
)
def fp8_prepare_weight(codes: Tensor, backend: str) -> Tensor:
    """A weight's codes in the form that the backend's GEMMs read fastest."""
    return BACKENDS[backend].prepare_weight(codes)


def _operands(*codes: Tensor) -> int:
    return sum(c.numel() for c in codes)


@op(
    cost=lambda x, x_scales, weights, weight_scales, dtype, backend: Cost(
        sum(2 * x.shape[0] * w.numel() for w in weights),
        _operands(x, *weights)
        + size(x_scales, *weight_scales)
        + sum(x.shape[0] * w.shape[0] * dtype.itemsize for w in weights),
    ),
    fake=lambda x, x_scales, weights, weight_scales, dtype, backend: [
        x.new_empty(x.shape[0], w.shape[0], dtype=dtype) for w in weights
    ],
)
def fp8_linear(
    x: Tensor,
    x_scales: Tensor,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """Fprop of several weights on one input, in `dtype`."""
    return [y.to(dtype) for y in BACKENDS[backend].linear(x, x_scales, weights, weight_scales)]


@op(
    cost=lambda dys, dy_scales, weights, weight_scales, dtype, backend: Cost(
        sum(2 * dys[0].shape[0] * w.numel() for w in weights),
        _operands(*dys, *weights)
        + size(*dy_scales, *weight_scales)
        + dys[0].shape[0] * weights[0].shape[1] * dtype.itemsize,
    ),
    fake=lambda dys, dy_scales, weights, weight_scales, dtype, backend: dys[0].new_empty(
        dys[0].shape[0], weights[0].shape[1], dtype=dtype
    ),
)
def fp8_linear_dgrad(
    dys: list[Tensor],
    dy_scales: list[Tensor],
    weights: list[Tensor],
    weight_scales: list[Tensor],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Dgrad summed over the weights, in `dtype`."""
    return BACKENDS[backend].linear_dgrad(dys, dy_scales, weights, weight_scales).to(dtype)


@op(
    cost=lambda x, x_scales, dys, dy_scales, out, backend: Cost(
        sum(2 * x.shape[0] * o.numel() for o in out),
        _operands(x, *dys) + size(x_scales, *dy_scales) + 2 * size(*out),
    ),
    fake=lambda x, x_scales, dys, dy_scales, out, backend: None,
    mutates=("out",),
)
def fp8_linear_wgrad(
    x: Tensor, x_scales: Tensor, dys: list[Tensor], dy_scales: list[Tensor], out: list[Tensor], backend: str
) -> None:
    """Wgrad of several weights on one input, added to the FP32 tensors `out`."""
    BACKENDS[backend].linear_wgrad(x, x_scales, dys, dy_scales, out)


def _grouped_cost(rows: Tensor, scales: Tensor, weight: Tensor, counts: list[int], result_bytes: int) -> Cost:
    """Only experts that have rows read their weights."""
    _, N, K = weight.shape
    read = rows.numel() + size(scales) + sum(1 for count in counts if count) * N * K
    return Cost(2 * rows.shape[0] * N * K, read + result_bytes)


@op(
    cost=lambda x, x_scales, weight, weight_scales, counts, dtype, backend: _grouped_cost(
        x, x_scales, weight, counts, x.shape[0] * weight.shape[1] * dtype.itemsize
    ),
    fake=lambda x, x_scales, weight, weight_scales, counts, dtype, backend: x.new_empty(
        x.shape[0], weight.shape[1], dtype=dtype
    ),
)
def fp8_grouped_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Fprop of each expert's rows, in `dtype`."""
    return BACKENDS[backend].grouped_linear(x, x_scales, weight, weight_scales, counts).to(dtype)


@op(
    cost=lambda dy, dy_scales, weight, weight_scales, counts, dtype, backend: _grouped_cost(
        dy, dy_scales, weight, counts, dy.shape[0] * weight.shape[2] * dtype.itemsize
    ),
    fake=lambda dy, dy_scales, weight, weight_scales, counts, dtype, backend: dy.new_empty(
        dy.shape[0], weight.shape[2], dtype=dtype
    ),
)
def fp8_grouped_dgrad(
    dy: Tensor,
    dy_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Dgrad of each expert's rows, in `dtype`."""
    return BACKENDS[backend].grouped_dgrad(dy, dy_scales, weight, weight_scales, counts).to(dtype)


@op(
    cost=lambda x, x_scales, dy, dy_scales, out, counts, backend: Cost(
        2 * x.shape[0] * x.shape[1] * dy.shape[1],
        _operands(x, dy)
        + size(x_scales, dy_scales)
        + 2 * sum(1 for count in counts if count) * size(out) // max(len(counts), 1),
    ),
    fake=lambda x, x_scales, dy, dy_scales, out, counts, backend: None,
    mutates=("out",),
)
def fp8_grouped_wgrad(
    x: Tensor, x_scales: Tensor, dy: Tensor, dy_scales: Tensor, out: Tensor, counts: list[int], backend: str
) -> None:
    """Wgrad of each expert, added to the FP32 tensor `out` [E, N, K]."""
    BACKENDS[backend].grouped_wgrad(x, x_scales, dy, dy_scales, out, counts)
