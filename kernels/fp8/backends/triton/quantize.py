"""Casts to FP8: 1x128, 128x1 and 128x128 tiles, both groupings from one read, and the regrouping for weight gradients.

Every kernel reads each value once and writes each code once. The transposed ones hold a 128x128 tile and write it
turned, so that a weight gradient finds its tokens contiguous, which Hopper's FP8 tensor cores require of both operands.
Layouts are those of `kernels.fp8.formats`.

Legend: `T` rows (tokens), `C` columns (channels), `T'` rows with every group filled up to a multiple of 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8.backends.triton.tiles import (
    WIDTH,
    divide,
    group_ends,
    locate,
    magnitude_bits,
    new_codes,
    new_scales,
    quantize_tiles,
    scale_of,
    tiles_of,
)
from kernels.fp8.formats import COLUMNS, ROWS, TILE

TILES_AT_ONCE = 32
"""1x128 tiles that one program casts."""


def quantize(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`formats.quantize`: codes [..., R, C] and scales, for `x` [..., R, C] in BF16, FP16 or FP32."""
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"quantize: x is {x.dtype} {list(x.shape)}: expected floating point [..., rows, columns]")
    x = _matrix(x)
    *batch, R, C = x.shape
    codes, scales = new_codes(x, *x.shape), new_scales(x, *batch, -(-R // tile[0]), -(-C // tile[1]))
    if not x.numel():
        return codes, scales
    if tile == ROWS:
        tiles = scales.numel()
        _rows[(triton.cdiv(tiles, TILES_AT_ONCE),)](
            x, x, codes, scales, tiles, C, power_of_two, GATHER=False, TILES=TILES_AT_ONCE
        )
    else:
        row_tiles, column_tiles = -(-R // TILE), -(-C // TILE)
        grid = (x.numel() // (R * C) * row_tiles, column_tiles)
        (_columns if tile == COLUMNS else _blocks)[grid](x, codes, scales, R, C, row_tiles, power_of_two)
    return codes, scales


def permute_quantize(x: Tensor, row_index: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize` in 1x128 tiles of the rows x[row_index]: `x` [T, C], row_index [R] -> codes [R, C] and scales."""
    x = _matrix(x)
    R, C = len(row_index), x.shape[1]
    codes, scales = new_codes(x, R, C), new_scales(x, R, -(-C // TILE))
    if tiles := scales.numel():
        grid = (triton.cdiv(tiles, TILES_AT_ONCE),)
        _rows[grid](x, row_index, codes, scales, tiles, C, power_of_two, GATHER=True, TILES=TILES_AT_ONCE)
    return codes, scales


def quantize_both(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both groupings of `x` [T, C] from one read.

    Returns codes [T, C] and scales [T, ceil(C / 128)] in 1x128 tiles, and the 128x1 tiles as `requantize` returns them:
    codes [C, T'] and scales [C, T' / 128], with zeros beyond row T.
    """
    x = _matrix(x)
    T, C = x.shape
    row_tiles, column_tiles = -(-T // TILE), -(-C // TILE)
    codes, scales = new_codes(x, T, C), new_scales(x, T, column_tiles)
    turned, turned_scales = new_codes(x, C, row_tiles * TILE), new_scales(x, row_tiles, C)
    if x.numel():
        _both[(row_tiles, column_tiles)](
            x, codes, scales, turned, turned_scales, T, C, row_tiles, power_of_two, num_warps=8
        )
    return codes, scales, turned, turned_scales.t()


def requantize(codes: Tensor, scales: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """`formats.requantize`: codes [T, C] in 1x128 tiles -> codes [C, T'] and scales [C, T' / 128].

    The scales lie in memory as [T' / 128, C], as the GEMM reads them.
    """
    T, C = codes.shape
    if list(scales.shape) != [T, -(-C // TILE)] or sum(counts) != T:
        raise ValueError(
            f"requantize: codes {[T, C]}, scales {list(scales.shape)}, counts {counts}: expected scales "
            f"{[T, -(-C // TILE)]} and counts that add up to {T}"
        )
    row_tiles = tiles_of(counts, TILE)
    turned, turned_scales = new_codes(codes, C, row_tiles * TILE), new_scales(codes, row_tiles, C)
    if turned.numel():
        _requantize[(row_tiles, -(-C // TILE))](
            codes.contiguous(),
            scales.contiguous(),
            turned,
            turned_scales,
            group_ends(counts, codes.device),
            len(counts),
            C,
            row_tiles,
            GROUPS=triton.next_power_of_2(len(counts)),
        )
    return turned, turned_scales.t()


def _matrix(x: Tensor) -> Tensor:
    """Contiguous, and in FP32 if Triton's arithmetic here does not start from the dtype."""
    return (x if x.dtype in (torch.bfloat16, torch.float16) else x.float()).contiguous()


@triton.jit
def _rows(x, row_index, codes, scales, tiles, C, POWER_OF_TWO: tl.constexpr, GATHER: tl.constexpr, TILES: tl.constexpr):
    """TILES successive 1x128 tiles: a row's tiles follow each other, as its scales do."""
    per_row = tl.cdiv(C, WIDTH)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    row = (tile // per_row).to(tl.int64)
    column = (tile % per_row)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = (tile < tiles)[:, None] & (column < C)
    source = tl.load(row_index + row, mask=tile < tiles, other=0).to(tl.int64) if GATHER else row
    values = tl.load(x + source[:, None] * C + column, mask=mask, other=0.0).to(tl.float32)
    code, scale = quantize_tiles(values, POWER_OF_TWO, axis=1)
    tl.store(codes + row[:, None] * C + column, code.to(codes.dtype.element_ty), mask=mask)
    tl.store(scales + tile, scale, mask=tile < tiles)


@triton.jit
def _square(R, C, row_tile, row_tiles):
    """Where the 128x128 tile of this program lies, and what of it exists, in [batch x row_tiles x 128, C]."""
    row = row_tile % row_tiles * WIDTH + tl.arange(0, WIDTH)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    offset = (row_tile // row_tiles * R + row).to(tl.int64)[:, None] * C + column[None, :]
    return offset, (row < R)[:, None] & (column < C)[None, :]


@triton.jit
def _columns(x, codes, scales, R, C, row_tiles, POWER_OF_TWO: tl.constexpr):
    row_tile = tl.program_id(0)
    offset, mask = _square(R, C, row_tile, row_tiles)
    code, scale = quantize_tiles(tl.load(x + offset, mask=mask, other=0.0).to(tl.float32), POWER_OF_TWO, axis=0)
    tl.store(codes + offset, code.to(codes.dtype.element_ty), mask=mask)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    tl.store(scales + row_tile.to(tl.int64) * C + column, scale, mask=column < C)


@triton.jit
def _blocks(x, codes, scales, R, C, row_tiles, POWER_OF_TWO: tl.constexpr):
    row_tile = tl.program_id(0)
    offset, mask = _square(R, C, row_tile, row_tiles)
    values = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(magnitude_bits(values), axis=1), axis=0), POWER_OF_TWO)
    tl.store(codes + offset, divide(values, scale).to(codes.dtype.element_ty), mask=mask)
    tl.store(scales + row_tile * tl.cdiv(C, WIDTH) + tl.program_id(1), scale)


@triton.jit
def _both(x, codes, scales, turned, turned_scales, R, C, row_tiles, POWER_OF_TWO: tl.constexpr):
    row_tile = tl.program_id(0)
    offset, mask = _square(R, C, row_tile, row_tiles)
    values = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    code, scale = quantize_tiles(values, POWER_OF_TWO, axis=1)
    row = row_tile * WIDTH + tl.arange(0, WIDTH)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    tl.store(codes + offset, code.to(codes.dtype.element_ty), mask=mask)
    tl.store(scales + row.to(tl.int64) * tl.cdiv(C, WIDTH) + tl.program_id(1), scale, mask=row < R)
    code, scale = quantize_tiles(values, POWER_OF_TWO, axis=0)
    _store_turned(turned, turned_scales, code, scale, column, C, row_tile, row_tiles)


@triton.jit
def _requantize(codes, scales, turned, turned_scales, ends, groups, C, row_tiles, GROUPS: tl.constexpr):
    row_tile = tl.program_id(0)
    _, first, end = locate(row_tile, ends, groups, WIDTH, GROUPS)
    row = first + tl.arange(0, WIDTH)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < end)[:, None] & (column < C)[None, :]
    values = tl.load(codes + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scales + row.to(tl.int64) * tl.cdiv(C, WIDTH) + tl.program_id(1), mask=row < end, other=0.0)
    values = values * scale[:, None]
    # Powers of two have no mantissa, and a tile made of them keeps one, so that nothing is rounded again.
    power_of_two = tl.max(scale.to(tl.int32, bitcast=True) & 0x7FFFFF, axis=0) == 0
    scale = scale_of(tl.max(magnitude_bits(values), axis=0), power_of_two)
    _store_turned(turned, turned_scales, divide(values, scale[None, :]), scale, column, C, row_tile, row_tiles)


@triton.jit
def _store_turned(turned, turned_scales, code, scale, column, C, row_tile, row_tiles):
    """Codes [128 rows, 128 columns] as 128 columns of the transposed matrix, and a scale for each."""
    row = row_tile * WIDTH + tl.arange(0, WIDTH)
    offset = column.to(tl.int64)[:, None] * (row_tiles * WIDTH) + row[None, :]
    tl.store(turned + offset, tl.trans(code.to(turned.dtype.element_ty)), mask=(column < C)[:, None])
    tl.store(turned_scales + row_tile.to(tl.int64) * C + column, scale, mask=column < C)
