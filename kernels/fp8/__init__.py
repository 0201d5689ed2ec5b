"""Block-scaled FP8 behind one interface: quantise, and the three GEMMs of a linear and of a grouped linear.

`formats` says what a quantised matrix is. A backend is a module with the functions of `reference`, or some of them
(`backends` lists who has what): `reference` defines the meaning and runs anywhere. The operators here are what the rest
of weft calls, traces and prices: one per quantisation, one per Fprop, Dgrad and Wgrad (report Figure 6), whatever the
backend does beneath. FP8 values count one byte.

Legend: `M`, `R` rows (tokens), `K` width of inputs, `N` of outputs, `E` experts. x [M, K] and dy [M, N] come in 1x128
tiles with scales [M, ceil(K/128)] and [M, ceil(N/128)]; weights [N, K] or [E, N, K] in 128x128 blocks with scales
[..., ceil(N/128), ceil(K/128)]; codes are float8_e4m3fn, scales FP32, in any memory layout: backends turn them into
what they need, and fill rows up where they must. `counts` are the rows of each expert, host integers that add up to R.
All raise `BackendError`, a ValueError, for an operation that the backend has not, for a backend that cannot be
imported, and for a weight whose widths it cannot tile.
"""

from types import ModuleType

import torch
from torch import Tensor

from kernels.fp8 import e5m6, formats
from kernels.fp8.backends import BACKENDS, BackendError, implementation
from kernels.fp8.formats import BLOCKS, COLUMNS, ROWS
from kernels.ops import Cost, Product, op, size

__all__ = ["BACKENDS", "BLOCKS", "COLUMNS", "ROWS", "BackendError"]


def _ceil(x: int, tile: int) -> int:
    return -(-x // tile)


def _cast(x: Tensor, backend: str, operation: str) -> ModuleType:
    """Who casts `x`: `auto` takes only backends that give the reference's bytes, and on a CPU there is no other."""
    return implementation("reference" if backend == "auto" and not x.is_cuda else backend, operation)


def _fake_quantize(x: Tensor, tile: list[int], power_of_two: bool, backend: str = "auto") -> tuple[Tensor, Tensor]:
    *batch, R, C = x.shape
    scales = x.new_empty(*batch, _ceil(R, tile[0]), _ceil(C, tile[1]), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scales


@op(
    cost=lambda x, tile, power_of_two, backend="auto": Cost(3 * x.numel(), size(x) + x.numel()),
    fake=_fake_quantize,
)
def fp8_quantize(x: Tensor, tile: list[int], power_of_two: bool, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`formats.quantize`: codes in float8_e4m3fn and FP32 scales, in tiles of 1x128, 128x1 or 128x128."""
    return _cast(x, backend, "quantize").quantize(x, (tile[0], tile[1]), power_of_two)


@op(
    cost=lambda codes, scales, tile, dtype, backend="auto": Cost(
        codes.numel(), codes.numel() * (1 + dtype.itemsize) + size(scales)
    ),
    fake=lambda codes, scales, tile, dtype, backend="auto": torch.empty_like(codes, dtype=dtype),
)
def fp8_dequantize(codes: Tensor, scales: Tensor, tile: list[int], dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """`formats.dequantize` of codes in tiles of 1x128, 128x1 or 128x128."""
    return _cast(codes, backend, "dequantize").dequantize(codes, scales, (tile[0], tile[1]), dtype)


@op(
    cost=lambda codes, scale_bytes, order, dtype, backend="auto": Cost(
        len(order) * codes.shape[1],
        len(order) * (codes.shape[1] * (1 + dtype.itemsize) + scale_bytes.shape[1]) + size(order),
    ),
    fake=lambda codes, scale_bytes, order, dtype, backend="auto": codes.new_empty(
        len(order), codes.shape[1], dtype=dtype
    ),
)
def fp8_gather_dequantize(
    codes: Tensor, scale_bytes: Tensor, order: Tensor, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """`formats.gather_dequantize`: rows that travelled, put in order and dequantised in one pass."""
    return _cast(codes, backend, "gather_dequantize").gather_dequantize(codes, scale_bytes, order, dtype)


def _fake_requantize(codes: Tensor, scales: Tensor, counts: list[int], backend: str = "auto") -> tuple[Tensor, Tensor]:
    C, tiles = codes.shape[1], sum(_ceil(count, formats.TILE) for count in counts)
    return codes.new_empty(C, tiles * formats.TILE), scales.new_empty(C, tiles)


@op(
    cost=lambda codes, scales, counts, backend="auto": Cost(
        4 * codes.numel(), codes.numel() + size(scales) + size(*_fake_requantize(codes, scales, counts))
    ),
    fake=_fake_requantize,
)
def fp8_requantize(codes: Tensor, scales: Tensor, counts: list[int], backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`formats.requantize`: 1x128 tiles over channels -> the transposed matrix in 1x128 tiles over tokens."""
    return _cast(codes, backend, "requantize").requantize(codes, scales, counts)


def _fake_e5m6_quantize(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    *rows, C = x.shape
    words = x.new_empty(*rows, 3 * _ceil(C, e5m6.GROUP), dtype=torch.int32)
    return words, x.new_empty(*rows, _ceil(C, formats.TILE), dtype=torch.float32)


@op(cost=lambda x, power_of_two: Cost(3 * x.numel(), size(x) + 3 * x.numel() // 2), fake=_fake_e5m6_quantize)
def e5m6_quantize(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`e5m6.quantize`: words in int32, three for eight values of a row, and FP32 scales of 1x128 tiles."""
    return e5m6.quantize(x, power_of_two)


@op(
    cost=lambda words, scales, columns, dtype: Cost(
        words.numel() // 3 * e5m6.GROUP, size(words, scales) + words.shape[:-1].numel() * columns * dtype.itemsize
    ),
    fake=lambda words, scales, columns, dtype: words.new_empty(*words.shape[:-1], columns, dtype=dtype),
)
def e5m6_dequantize(words: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`e5m6.dequantize` of rows of `columns` values, rounded to `dtype`."""
    return e5m6.dequantize(words, scales, columns).to(dtype)


@op(
    cost=lambda codes, backend: Cost(0, codes.numel() * (1 + BACKENDS[backend].weight_dtype.itemsize)),
    fake=lambda codes, backend: torch.empty_like(codes, dtype=BACKENDS[backend].weight_dtype),
)
def fp8_prepare_weight(codes: Tensor, backend: str) -> Tensor:
    """A weight's codes in the form that the backend's GEMMs read fastest."""
    return implementation(backend, "linear").prepare_weight(codes)


def _operands(*codes: Tensor) -> int:
    return sum(c.numel() for c in codes)


@op(
    cost=lambda x, x_scales, weights, weight_scales, dtype, backend: Cost.of(
        "fp8",
        tuple(Product(x.shape[0], *w.shape) for w in weights),
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
    return list(implementation(backend, "linear").linear(x, x_scales, weights, weight_scales, dtype))


@op(
    cost=lambda dys, dy_scales, weights, weight_scales, dtype, backend: Cost.of(
        "fp8",
        tuple(Product(len(dy), w.shape[1], w.shape[0]) for dy, w in zip(dys, weights, strict=True)),
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
    return implementation(backend, "linear_dgrad").linear_dgrad(dys, dy_scales, weights, weight_scales, dtype)


@op(
    cost=lambda x, x_scales, dys, dy_scales, out, backend: Cost.of(
        "fp8",
        tuple(Product(o.shape[0], o.shape[1], len(x)) for o in out),
        3 * _operands(x, *dys) + size(x_scales, *dy_scales) + 2 * size(*out),  # requantised, then multiplied
        _operands(x, *dys) + size(x_scales, *dy_scales),
    ),
    fake=lambda x, x_scales, dys, dy_scales, out, backend: None,
    mutates=("out",),
)
def fp8_linear_wgrad(
    x: Tensor, x_scales: Tensor, dys: list[Tensor], dy_scales: list[Tensor], out: list[Tensor], backend: str
) -> None:
    """Wgrad of several weights on one input, added to the FP32 tensors `out`."""
    implementation(backend, "linear_wgrad").linear_wgrad(x, x_scales, dys, dy_scales, out)


def _grouped_cost(rows: Tensor, scales: Tensor, weight: Tensor, counts: list[int], result_bytes: int) -> Cost:
    """Only experts that have rows read their weights."""
    _, N, K = weight.shape
    read = rows.numel() + size(scales) + sum(1 for count in counts if count) * N * K
    return Cost.of("fp8", (Product(len(rows), N, K, len(counts)),), read + result_bytes)


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
    return implementation(backend, "grouped_linear").grouped_linear(x, x_scales, weight, weight_scales, counts, dtype)


@op(
    cost=lambda dy, dy_scales, weight, weight_scales, counts, dtype, backend: _grouped_cost(
        dy, dy_scales, weight.transpose(1, 2), counts, dy.shape[0] * weight.shape[2] * dtype.itemsize
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
    return implementation(backend, "grouped_dgrad").grouped_dgrad(dy, dy_scales, weight, weight_scales, counts, dtype)


@op(
    cost=lambda x, x_scales, dy, dy_scales, out, counts, backend: Cost.of(
        "fp8",
        tuple(Product(out.shape[1], out.shape[2], count) for count in counts if count),
        3 * _operands(x, dy)
        + size(x_scales, dy_scales)
        + 2 * sum(1 for count in counts if count) * size(out) // max(len(counts), 1),
        _operands(x, dy) + size(x_scales, dy_scales),
    ),
    fake=lambda x, x_scales, dy, dy_scales, out, counts, backend: None,
    mutates=("out",),
)
def fp8_grouped_wgrad(
    x: Tensor, x_scales: Tensor, dy: Tensor, dy_scales: Tensor, out: Tensor, counts: list[int], backend: str
) -> None:
    """Wgrad of each expert, added to the FP32 tensor `out` [E, N, K]."""
    implementation(backend, "grouped_wgrad").grouped_wgrad(x, x_scales, dy, dy_scales, out, counts)
