"""Block-scaled E4M3: what a quantised matrix is.

A matrix is cut into tiles: 1x128 for activations and their gradients, 128x1 for the same contracted over tokens,
128x128 for weights. Every tile has one FP32 scale from its own largest magnitude, s = max(amax, 1e-4) / 448, and stores
each x as the E4M3 value nearest to x / s, ties to even. A ragged edge is a smaller tile. Source: report section 3.3.2.

A tile that holds an infinity or a NaN has a non-finite scale, so it is non-finite again wherever it is read.
"""

import torch
from torch import Tensor

from kernels.fp8 import native

TILE = 128
ROWS, COLUMNS, BLOCKS = (1, TILE), (TILE, 1), (TILE, TILE)

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
SMALLEST_NORMAL = 2.0**-6


def tile_scales(amax: Tensor, power_of_two: bool) -> Tensor:
    """FP32 scales of tiles with these largest magnitudes, rounded up to 2^k if asked."""
    scales = amax.float().clamp_min(SMALLEST_AMAX) / E4M3_MAX
    if not power_of_two:
        return scales
    bits = scales.view(torch.int32)
    rounded_up = ((bits + 0x7FFFFF) & 0x7F800000).view(
        torch.float32
    )  # to the next exponent unless the mantissa is zero
    return torch.where(scales.isfinite(), rounded_up, scales)


def quantize(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise the last two dimensions of `x` [..., R, C], of any floating dtype, in tiles of `tile` rows x columns.

    Returns codes [..., R, C] in float8_e4m3fn and scales [..., ceil(R / tile rows), ceil(C / tile columns)] in FP32.
    """
    if tile == ROWS and x.dim() == 2 and x.dtype == torch.bfloat16 and (lib := native.loops(x)):
        return native.quantize_rows(lib, x, power_of_two)
    R, C = x.shape[-2:]
    tiles = split(x.float(), tile)
    scales = tile_scales(tiles.abs().amax((-3, -1), keepdim=True), power_of_two)
    codes = (tiles / scales).to(torch.float8_e4m3fn)
    return join(codes, R, C), scales.squeeze(-1).squeeze(-2)


def dequantize(codes: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """code x scale of its tile in FP32, the shape of `codes`."""
    R, C = codes.shape[-2:]
    return join(split(widen(codes), tile) * scales.unsqueeze(-1).unsqueeze(-3), R, C)


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
    return bits.view(torch.float16).float().mul_(256.0)  # FP16's exponent bias is 15, E4M3's 7


def round_to_e4m3(x: Tensor) -> Tensor:
    """FP32 values within the range of E4M3, rounded to its nearest, ties to even: `widen` of a cast, in half the time.

    Adding and subtracting 1.5 x 2^20 units of the leading bit leaves three bits after it, in FP32's own rounding.
    """
    leading_bit = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min_(SMALLEST_NORMAL)
    return torch.add(x, leading_bit, alpha=1.5 * 2**20).sub_(leading_bit, alpha=1.5 * 2**20)
