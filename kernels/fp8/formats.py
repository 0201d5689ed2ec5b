"""Block-scaled E4M3: what a quantised matrix is.

A matrix is cut into tiles: 1x128 for activations and their gradients, 128x1 for the same contracted over tokens,
128x128 for weights. Every tile has one FP32 scale from its own largest magnitude, s = max(amax, 1e-4) / 448, and stores
each x as the E4M3 value nearest to x / s, ties to even. A ragged edge is a smaller tile. Source: report section 3.3.2.

A tile that holds an infinity or a NaN has a non-finite scale (NaN if there is one) and comes back non-finite
throughout, so a bad value poisons what reads it as it would in BF16. The sign of a NaN means nothing.
"""

import torch
from torch import Tensor

from kernels.fp8 import native

TILE = 128
ROWS, COLUMNS, BLOCKS = (1, TILE), (TILE, 1), (TILE, TILE)

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
SMALLEST_NORMAL = 2.0**-6


def tile_scales(amax: Tensor, power_of_two: bool, largest: float = E4M3_MAX) -> Tensor:
    """FP32 scales that bring tiles with these largest magnitudes to `largest`, rounded up to 2^k if asked."""
    amax = amax.float().clamp_min(SMALLEST_AMAX)
    scales = amax / amax.new_full((), largest)  # on a GPU, dividing by a Python number multiplies by its reciprocal
    if not power_of_two:
        return scales
    next_exponent = (scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000  # unless the mantissa is zero
    return torch.where(scales.isfinite(), next_exponent.view(torch.float32), scales)


def quantize(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise the last two dimensions of `x` [..., R, C], of any floating dtype, in tiles of `tile` rows x columns.

    Returns codes [..., R, C] in float8_e4m3fn and FP32 scales [..., ceil(R / tile rows), ceil(C / tile columns)],
    rounded up to 2^k if asked. What FP32 cannot hold of an FP64 value is rounded first.
    Raises ValueError if `x` is no matrix of floating-point numbers.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"quantize: x is {x.dtype} {list(x.shape)}: expected floating point [..., rows, columns]")
    if tile == ROWS and x.dtype == torch.bfloat16 and (lib := native.loops(x)):
        return native.quantize_rows(lib, x, power_of_two)
    R, C = x.shape[-2:]
    tiles = split(x.float(), tile)
    scales = tile_scales(tiles.abs().amax((-3, -1), keepdim=True), power_of_two)
    codes = (tiles / scales).to(torch.float8_e4m3fn)
    return join(codes, R, C), scales.squeeze(-1).squeeze(-2)


def dequantize(codes: Tensor, scales: Tensor, tile: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """code x scale of its tile in FP32, rounded to `dtype`: the shape of `codes` [..., R, C].

    scales: as `quantize` returns them; in BF16 with powers of two nothing is rounded.
    Raises ValueError if there is not one scale for each tile.
    """
    check_scales(codes, scales, tile)
    return join(split(widen(codes), tile) * scales.unsqueeze(-1).unsqueeze(-3), *codes.shape[-2:]).to(dtype)


def check_scales(codes: Tensor, scales: Tensor, tile: tuple[int, int]) -> None:
    """Raise ValueError if there is not one scale for each tile."""
    *batch, R, C = codes.shape
    grid = [*batch, -(-R // tile[0]), -(-C // tile[1])]
    if list(scales.shape) != grid:
        raise ValueError(f"dequantize: scales {list(scales.shape)} for {list(codes.shape)} in {tile}: expected {grid}")


def gather_dequantize(codes: Tensor, scale_bytes: Tensor, order: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dequantize` of the rows codes[order], in tiles of 1x128: [R, C] in `dtype`.

    codes [S, C] in float8_e4m3fn and scale_bytes [S, 4 ceil(C / 128)] in uint8, the bytes of FP32 scales: parts of rows
    that travelled, so rows of either may lie apart by any number of bytes. order [R]: rows of both, in int64.
    Raises ValueError if there are not the bytes of one scale for each tile.
    """
    check_travelled(codes, scale_bytes)
    picked, scales = (rows.index_select(0, order) for rows in (codes.view(torch.uint8), scale_bytes))
    return dequantize(picked.view(codes.dtype), scales.view(torch.float32), ROWS, dtype)


def check_travelled(codes: Tensor, scale_bytes: Tensor) -> None:
    """Raise ValueError if `scale_bytes` are not those of one FP32 scale for each 1x128 tile."""
    S, C = codes.shape
    if list(scale_bytes.shape) != [S, 4 * -(-C // TILE)] or scale_bytes.dtype != torch.uint8:
        raise ValueError(
            f"gather_dequantize: {scale_bytes.dtype} {list(scale_bytes.shape)} for codes {[S, C]}: expected "
            f"torch.uint8 {[S, 4 * -(-C // TILE)]}"
        )


def requantize(codes: Tensor, scales: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Transpose a matrix in 1x128 tiles over its columns into one in 1x128 tiles over what were its rows.

    This makes the operands of a weight gradient, which contracts over tokens, from what forward and Dgrad used.
    codes [T, C] and scales [T, ceil(C / 128)]: as `quantize` returns them for ROWS. counts: the rows of each group,
    which add up to T; every group begins at a new tile.
    Returns codes [C, T'] in float8_e4m3fn and FP32 scales [C, T' / 128]; T' is the sum of the counts, each rounded up
    to 128 with zeros. Values are dequantised to FP32 and quantised again. A tile made only of values with power-of-two
    scales has one, too: then nothing is rounded but what becomes subnormal (report section 3.3.3).
    Raises ValueError if the scales or counts do not fit the codes.
    """
    values_TC, tile_scales_TC = regroup(codes, scales, counts)
    return values_TC.to(torch.float8_e4m3fn).t().contiguous(), tile_scales_TC.t().contiguous()


def regroup(codes_TC: Tensor, scales: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """`requantize` before it transposes and narrows: FP32 values of codes [T', C] and scales [T' / 128, C]."""
    T, C = codes_TC.shape
    if list(scales.shape) != [T, -(-C // TILE)] or sum(counts) != T:
        raise ValueError(
            f"requantize: codes {[T, C]}, scales {list(scales.shape)}, counts {counts}: expected scales "
            f"{[T, -(-C // TILE)]} and counts that add up to {T}"
        )
    if lib := native.loops(codes_TC):
        return native.regroup(lib, codes_TC, scales, counts)
    x = in_tiles(dequantize(codes_TC, scales, ROWS), counts)
    powers_of_two = in_tiles(scales.view(torch.int32) & 0x7FFFFF, counts).eq(0).all(1)
    powers_of_two = powers_of_two.repeat_interleave(TILE, 1)[:, :C]
    amax = x.abs().amax(1)
    column_scales = torch.where(powers_of_two, tile_scales(amax, True), tile_scales(amax, False))
    beyond = in_tiles(scales.new_ones(T, 1), counts) == 0
    values = round_to_e4m3(x / column_scales.unsqueeze(1)).masked_fill_(beyond, 0)
    return values.view(-1, C), column_scales


def in_tiles(x_TC: Tensor, counts: list[int]) -> Tensor:
    """[T, C] as [tiles, 128, C], zeros after the last row of each group."""
    if any(count % TILE for count in counts):
        parts = zip(x_TC.split(counts), counts, strict=True)
        x_TC = torch.cat([torch.nn.functional.pad(rows, (0, 0, 0, -count % TILE)) for rows, count in parts])
    return x_TC.view(-1, TILE, x_TC.shape[1])


def split(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[..., R, C] as [..., rows of tiles, tile rows, columns of tiles, tile columns], zeros at ragged edges."""
    (R, C), (rows, columns) = x.shape[-2:], tile
    if R % rows or C % columns:
        x = torch.nn.functional.pad(x, (0, -C % columns, 0, -R % rows))
    return x.reshape(*x.shape[:-2], -(-R // rows), rows, -(-C // columns), columns)


def join(tiles: Tensor, R: int, C: int) -> Tensor:
    """The inverse of `split`: [..., R, C]."""
    x = tiles.flatten(-4, -3).flatten(-2, -1)
    return x if x.shape[-2:] == (R, C) else x[..., :R, :C].contiguous()


def widen(codes: Tensor) -> Tensor:
    """E4M3 codes as FP32; FP32 passes through. Shifting their bits into FP16 is far faster than PyTorch's cast."""
    if codes.dtype == torch.float32:
        return codes
    if lib := native.loops(codes):
        return native.widen(lib, codes)
    bits = codes.view(torch.int8).to(torch.int16)
    bits <<= 7  # s eeee mmm -> s s eeee mmm 0000000: the sign extended into the exponent's top bit, which is cleared
    bits &= -0x4080
    values = bits.view(torch.float16).float().mul_(256.0)  # FP16's exponent bias is 15, E4M3's 7
    return values.masked_fill_(values.abs() > E4M3_MAX, torch.nan)


def round_to_e4m3(x: Tensor) -> Tensor:
    """FP32 values in the range of E4M3, rounded to its nearest, ties to even: `widen` of a cast, in half the time."""
    return round_mantissa(x, 3, SMALLEST_NORMAL)


def round_mantissa(x: Tensor, bits: int, smallest_normal: float) -> Tensor:
    """FP32 values rounded to `bits` bits of mantissa, ties to even, with subnormals below `smallest_normal`.

    Adding and subtracting 1.5 x 2^(23 - bits) units of the leading bit leaves that many after it, in FP32's rounding.
    """
    leading_bit = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min_(smallest_normal)
    unit = 1.5 * 2 ** (23 - bits)
    return torch.add(x, leading_bit, alpha=unit).sub_(leading_bit, alpha=unit).copysign_(x)
