"""Block-scaled GEMMs with FP32 accumulation outside the tensor cores every 128 products.

One kernel multiplies rows, for Fprop and Dgrad, and one contracts over tokens, for Wgrad; a plain linear is a grouped
one of a single group. Hopper's FP8 tensor cores want both operands contiguous along the contraction, so Dgrad reads a
transposed copy of the weights, made once for as long as they live, and Wgrad operands that `requantize` has transposed.
A program computes BLOCK_N columns in one or two parts that share the left operand: while one part is scaled and added
to its FP32 sum, the tensor cores multiply the other. What does not exist reads as zeros and is not written. No result
depends on the tile sizes that tuning picks.

Legend: `M` or `R` rows, `N` output width, `K` contracted width, `T` tokens, `E` experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fp8.backends.layouts import transposed
from kernels.fp8.backends.triton.quantize import requantize
from kernels.fp8.backends.triton.tiles import INTERPRETED, WIDTH, group_ends, locate, tiles_of
from kernels.fp8.formats import TILE


def prepare_weight(codes: Tensor) -> Tensor:
    """The weight [..., N, K] itself; Dgrad reads a transposed copy, made once and kept while it lives."""
    return codes


def linear(
    x: Tensor,
    x_scales: Tensor,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Fprop: x [M, K] in 1x128 tiles, each weight [N, K] in 128x128 blocks -> [M, N] each, in `dtype`."""
    operands = zip(weights, weight_scales, strict=True)
    return [_multiply(x, x_scales, w[None], s[None], [len(x)], dtype) for w, s in operands]


def linear_dgrad(
    dys: list[Tensor],
    dy_scales: list[Tensor],
    weights: list[Tensor],
    weight_scales: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dgrad: sum of dy [M, N] in 1x128 tiles @ weight [N, K] with the blocks of Fprop -> [M, K] in `dtype`."""
    dx, last = None, len(dys) - 1
    for i, (dy, scales, w, w_scales) in enumerate(zip(dys, dy_scales, weights, weight_scales, strict=True)):
        stored = dtype if i == last else torch.float32  # the sum is rounded once
        dx = _multiply(dy, scales, transposed(w)[None], w_scales.t()[None], [len(dy)], stored, dx)
    assert dx is not None
    return dx


def linear_wgrad(x: Tensor, x_scales: Tensor, dys: list[Tensor], dy_scales: list[Tensor], out: list[Tensor]) -> None:
    """Wgrad: out [N, K] += dy^T @ x, both requantised in 128x1 tiles over their T tokens."""
    counts = [len(x)]
    x, x_scales = requantize(x, x_scales, counts)
    for dy, scales, main_grad in zip(dys, dy_scales, out, strict=True):
        _accumulate(*requantize(dy, scales, counts), x, x_scales, main_grad[None], counts)


def grouped_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Fprop of each expert's rows: x [R, K], weight [E, N, K] -> [R, N] in `dtype`."""
    return _multiply(x, x_scales, weight, weight_scales, counts, dtype)


def grouped_dgrad(
    dy: Tensor,
    dy_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dgrad of each expert's rows: dy [R, N], weight [E, N, K] -> [R, K] in `dtype`."""
    return _multiply(dy, dy_scales, transposed(weight), weight_scales.transpose(1, 2), counts, dtype)


def grouped_wgrad(x: Tensor, x_scales: Tensor, dy: Tensor, dy_scales: Tensor, out: Tensor, counts: list[int]) -> None:
    """Wgrad of each expert: out[e] [N, K] += dy^T @ x over its rows; 128x1 tiles begin anew at every expert."""
    _accumulate(*requantize(dy, dy_scales, counts), *requantize(x, x_scales, counts), out, counts)


def _multiply(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype,
    addend: Tensor | None = None,
) -> Tensor:
    """Rows of group e of a [R, K] times b[e] [N, K], plus the addend [R, N] -> [R, N]."""
    (R, K), (E, N, _) = a.shape, b.shape
    out = torch.empty(R, N, dtype=dtype, device=a.device)
    if not out.numel():
        return out

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (tiles_of(counts, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),)

    _multiply_kernel[grid](
        _descriptor(a),
        a_scales,
        *a_scales.stride(),
        _descriptor(b.reshape(E * N, K)),
        b_scales,
        *b_scales.stride(),
        out,
        out if addend is None else addend,
        group_ends(counts, a.device) if E > 1 else out,
        E,
        R,
        N,
        K,
        triton.next_power_of_2(R),
        GROUPS=triton.next_power_of_2(E),
        ADD=addend is not None,
    )
    return out


def _accumulate(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, counts: list[int]) -> None:
    """out[e] [N, K] += a [N, T'] @ b [K, T']^T over the tiles of group e, as `requantize` returns the operands."""
    E, N, K = out.shape
    T = a.shape[1]
    if not T or not out.numel():
        return

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(N, meta["BLOCK_M"]) * triton.cdiv(K, meta["BLOCK_N"]), E

    _accumulate_kernel[grid](
        _descriptor(a),
        a_scales,
        *a_scales.stride(),
        _descriptor(b),
        b_scales,
        *b_scales.stride(),
        out,
        *out.stride(),
        group_ends([-(-count // TILE) for count in counts], a.device),
        N,
        K,
        triton.next_power_of_2(T),
    )


def _descriptor(codes: Tensor) -> TensorDescriptor:
    """A matrix for the tensor memory accelerator, which steps from row to row in units of 16 bytes."""
    unit = 16 // codes.element_size()
    (R, C), width = codes.shape, -(-codes.shape[1] // unit) * unit
    if width != C or codes.data_ptr() % 16 or not codes.is_contiguous():
        aligned = torch.zeros(R, width, dtype=codes.dtype, device=codes.device)
        aligned[:, :C] = codes
        codes = aligned
    return TensorDescriptor(codes, [R, width], [width, 1], [TILE, TILE])  # a Config sets the true size of blocks


def _set_block_shapes(arguments: dict[str, Any]) -> None:
    arguments["a"].block_shape = [arguments["BLOCK_M"], TILE]
    arguments["b"].block_shape = [arguments["PART"], TILE]


def _config(m: int, n: int, part: int, warps: int, stages: int) -> triton.Config:
    tiles = {"BLOCK_M": m, "BLOCK_N": n, "PART": part}
    return triton.Config(tiles, num_warps=warps, num_stages=stages, pre_hook=_set_block_shapes)


CONFIGS = [
    _config(128, 128, 128, 8, 4),
    _config(128, 128, 64, 8, 3),
    _config(128, 256, 128, 8, 3),
    _config(128, 256, 128, 8, 4),
    _config(64, 128, 128, 4, 3),
]
"""What is tried, once, for a shape; the interpreter has nothing to measure."""
TRIED = CONFIGS[:1] if INTERPRETED else CONFIGS


@triton.jit
def _swizzle(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile, in bands of GROUP rows, so that tiles that run together share operands in L2."""
    band = tile // (GROUP * columns)
    height = tl.minimum(rows - band * GROUP, GROUP)
    within = tile % (GROUP * columns)
    return band * GROUP + within % height, within // height


@triton.autotune(TRIED, key=["N", "K", "size_class", "E"])
@triton.jit
def _multiply_kernel(
    a,
    a_scales,
    a_scales_row,
    a_scales_block,
    b,
    b_scales,
    b_scales_group,
    b_scales_row,
    b_scales_block,
    out,
    addend,
    ends,
    E,
    R,
    N,
    K,
    size_class,
    GROUPS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    """BLOCK_M x BLOCK_N outputs of one group. `size_class` is for tuning only."""
    columns = tl.cdiv(N, BLOCK_N)
    row_tile, column_tile = _swizzle(tl.program_id(0), tl.num_programs(0) // columns, columns, 8)
    if GROUPS > 1:
        group, first, end = locate(row_tile, ends, E, BLOCK_M, GROUPS)
    else:
        group, first, end = 0, row_tile * BLOCK_M, R
    row = first + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N
    a_scale = a_scales + row.to(tl.int64) * a_scales_row
    b_scale = b_scales + group * b_scales_group
    left_b_scale = b_scale + column // WIDTH * b_scales_row
    right_b_scale = b_scale + tl.minimum(column + PART, N - 1) // WIDTH * b_scales_row
    left = tl.zeros((BLOCK_M, PART), tl.float32)
    right = tl.zeros((BLOCK_M, PART), tl.float32)
    for k in range(tl.cdiv(K, WIDTH)):
        scale = tl.load(a_scale + k * a_scales_block, mask=row < end, other=0.0)
        left_scale = scale * tl.load(left_b_scale + k * b_scales_block)
        right_scale = scale * tl.load(right_b_scale + k * b_scales_block)
        rows = a.load([first, k * WIDTH])
        left += tl.dot(rows, b.load([group * N + column, k * WIDTH]).T) * left_scale[:, None]
        if BLOCK_N > PART:
            right += tl.dot(rows, b.load([group * N + column + PART, k * WIDTH]).T) * right_scale[:, None]
    _store(out, addend, left, row, end, column, N, ADD)
    if BLOCK_N > PART:
        _store(out, addend, right, row, end, column + PART, N, ADD)


@triton.jit
def _store(out, addend, value, row, end, first_column, N, ADD: tl.constexpr):
    column = first_column + tl.arange(0, value.shape[1])
    offset = row.to(tl.int64)[:, None] * N + column[None, :]
    mask = (row < end)[:, None] & (column < N)[None, :]
    if ADD:
        value += tl.load(addend + offset, mask=mask, other=0.0)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


@triton.autotune(TRIED, key=["N", "K", "size_class"], restore_value=["out"])
@triton.jit
def _accumulate_kernel(
    a,
    a_scales,
    a_scales_row,
    a_scales_tile,
    b,
    b_scales,
    b_scales_row,
    b_scales_tile,
    out,
    out_group,
    out_row,
    out_column,
    ends,
    N,
    K,
    size_class,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    """BLOCK_M x BLOCK_N of one group's gradient. `size_class` is for tuning only."""
    group = tl.program_id(1)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    row_tile, column_tile = _swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, PART)
    a_scale = a_scales + row.to(tl.int64) * a_scales_row
    b_scale = b_scales + column.to(tl.int64) * b_scales_row
    left = tl.zeros((BLOCK_M, PART), tl.float32)
    right = tl.zeros((BLOCK_M, PART), tl.float32)
    for t in range(start, end):
        scale = tl.load(a_scale + t * a_scales_tile, mask=row < N, other=0.0)[:, None]
        left_scale = tl.load(b_scale + t * b_scales_tile, mask=column < K, other=0.0)[None, :]
        beyond = b_scale + PART * b_scales_row + t * b_scales_tile
        right_scale = tl.load(beyond, mask=column + PART < K, other=0.0)[None, :]
        rows = a.load([row_tile * BLOCK_M, t * WIDTH])
        left += tl.dot(rows, b.load([column_tile * BLOCK_N, t * WIDTH]).T) * scale * left_scale
        if BLOCK_N > PART:
            right += tl.dot(rows, b.load([column_tile * BLOCK_N + PART, t * WIDTH]).T) * scale * right_scale
    if start < end:
        out += group.to(tl.int64) * out_group
        _add_to(out, out_row, out_column, left, row, N, column, K)
        if BLOCK_N > PART:
            _add_to(out, out_row, out_column, right, row, N, column + PART, K)


@triton.jit
def _add_to(out, out_row, out_column, value, row, N, column, K):
    target = out + row.to(tl.int64)[:, None] * out_row + column[None, :] * out_column
    mask = (row < N)[:, None] & (column < K)[None, :]
    tl.store(target, tl.load(target, mask=mask, other=0.0) + value, mask=mask)
