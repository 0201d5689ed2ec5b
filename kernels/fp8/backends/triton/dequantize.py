"""The way back from codes to numbers: of a matrix as it lies, and of rows picked from what has travelled.

Rows arrive from other ranks in the order of their senders, and are wanted sorted by expert. `gather_dequantize` does
both in one pass: codes are read once, and only what the experts read is written.

Legend: `S` rows that arrived, `R` rows that are wanted, `C` columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8.backends.triton.tiles import WIDTH
from kernels.fp8.formats import TILE, check_scales, check_travelled

TILES_AT_ONCE = 16
"""1x128 tiles that one program makes numbers of."""


def dequantize(codes: Tensor, scales: Tensor, tile: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """`formats.dequantize`."""
    check_scales(codes, scales, tile)
    codes = codes.contiguous()
    R, C = codes.shape[-2:]
    values = torch.empty_like(codes, dtype=dtype)
    if C and (tiles := codes.numel() // C * -(-C // TILE)):
        grid = (triton.cdiv(tiles, TILES_AT_ONCE),)
        _matrix[grid](codes, scales.contiguous(), values, tiles, R, C, *tile, TILES=TILES_AT_ONCE)
    return values


def gather_dequantize(codes: Tensor, scale_bytes: Tensor, order: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`formats.gather_dequantize`."""
    check_travelled(codes, scale_bytes)
    C = codes.shape[1]
    values = codes.new_empty(len(order), C, dtype=dtype)
    if tiles := len(order) * -(-C // TILE):
        grid = (triton.cdiv(tiles, TILES_AT_ONCE),)
        _picked[grid](
            codes, scale_bytes, order, values, tiles, C, codes.stride(0), scale_bytes.stride(0), TILES=TILES_AT_ONCE
        )
    return values


@triton.jit
def _place(tiles, C, TILES: tl.constexpr):
    """The tiles of this program: number, row and number in the row; their columns and what of them exists."""
    per_row = tl.cdiv(C, WIDTH)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    row, in_row = (tile // per_row).to(tl.int64), tile % per_row
    column = in_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tile, row, in_row, column, (tile < tiles)[:, None] & (column < C)


@triton.jit
def _matrix(codes, scales, values, tiles, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """Each element looks its scale up, whatever the shape of tiles."""
    _, row, _, column, mask = _place(tiles, C, TILES)
    offset = row[:, None] * C + column
    scale_row = row // R * tl.cdiv(R, ROWS) + row % R // ROWS
    scale = tl.load(scales + scale_row[:, None] * tl.cdiv(C, COLUMNS) + column // COLUMNS, mask=mask, other=0.0)
    value = tl.load(codes + offset, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(values + offset, value.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _picked(codes, scale_bytes, order, values, tiles, C, codes_stride, scales_stride, TILES: tl.constexpr):
    """A scale is put together from its bytes, little end first: in a row of bytes it may begin anywhere."""
    tile, row, in_row, column, mask = _place(tiles, C, TILES)
    source = tl.load(order + row, mask=tile < tiles, other=0).to(tl.int64)
    first = scale_bytes + source * scales_stride + in_row * 4
    bits = tl.zeros((TILES,), tl.int32)
    for byte in tl.static_range(4):
        bits |= tl.load(first + byte, mask=tile < tiles, other=0).to(tl.int32) << (8 * byte)
    scale = bits.to(tl.float32, bitcast=True)
    value = tl.load(codes + source[:, None] * codes_stride + column, mask=mask, other=0.0).to(tl.float32)
    value *= scale[:, None]
    tl.store(values + row[:, None] * C + column, value.to(values.dtype.element_ty), mask=mask)
