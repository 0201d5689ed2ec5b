"""Casts that swallow the operation before them, so that its result never reaches memory in BF16.

SwiGLU with the routing weight, RMSNorm, and the gathering of rows (`permute_quantize`, beside the plain cast). Each
rounds to the input's dtype before it casts, as the unfused operators do, so that both give the same codes wherever the
exponential and the root give the same FP32 value.

Legend: `R` or `T` rows, `F` expert width, `D` model width.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8.backends.triton.tiles import WIDTH, new_codes, new_scales, quantize_tiles
from kernels.fp8.formats import TILE

TILES_AT_ONCE = 16
"""1x128 tiles that one program of SwiGLU casts."""


def swiglu_quantize(gate_up: Tensor, weight: Tensor | None, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """silu(gate) * up [* weight of the row] in 1x128 tiles: codes [R, F] and scales [R, ceil(F / 128)].

    gate_up [R, 2F]: gate, then up. weight [R]: routing weights, or None.
    """
    gate_up = gate_up.contiguous()
    R, F = gate_up.shape[0], gate_up.shape[1] // 2
    codes, scales = new_codes(gate_up, R, F), new_scales(gate_up, R, -(-F // TILE))
    if tiles := scales.numel():
        _swiglu[(triton.cdiv(tiles, TILES_AT_ONCE),)](
            gate_up,
            gate_up if weight is None else weight.contiguous(),
            codes,
            scales,
            tiles,
            F,
            power_of_two,
            WEIGHTED=weight is not None,
            TILES=TILES_AT_ONCE,
        )
    return codes, scales


def rmsnorm_quantize(x: Tensor, gain: Tensor, eps: float, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * gain in 1x128 tiles, for `x` [T, D] and `gain` [D].

    Returns codes [T, D], scales [T, ceil(D / 128)] and what backward needs: the FP32 1 / sqrt(...) of each row, [T, 1].
    """
    x = x.contiguous()
    T, D = x.shape
    codes, scales, inverse_rms = new_codes(x, T, D), new_scales(x, T, -(-D // TILE)), new_scales(x, T, 1)
    if x.numel():
        tiles = triton.next_power_of_2(scales.shape[1])
        warps = max(4, min(16, tiles // 4))
        _rmsnorm[(T,)](
            x, gain.contiguous(), codes, scales, inverse_rms, D, eps, power_of_two, TILES=tiles, num_warps=warps
        )
    return codes, scales, inverse_rms


@triton.jit
def _swiglu(
    gate_up,
    weight,
    codes,
    scales,
    tiles,
    F,
    POWER_OF_TWO: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILES: tl.constexpr,
):
    per_row = tl.cdiv(F, WIDTH)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    row = (tile // per_row).to(tl.int64)
    column = (tile % per_row)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = (tile < tiles)[:, None] & (column < F)
    source = gate_up + row[:, None] * (2 * F) + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + F, mask=mask, other=0.0).to(tl.float32)
    y = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        y *= tl.load(weight + row, mask=tile < tiles, other=0.0).to(tl.float32)[:, None]
    y = y.to(gate_up.dtype.element_ty).to(tl.float32)
    code, scale = quantize_tiles(y, POWER_OF_TWO, axis=1)
    tl.store(codes + row[:, None] * F + column, code.to(codes.dtype.element_ty), mask=mask)
    tl.store(scales + tile, scale, mask=tile < tiles)


@triton.jit
def _rmsnorm(x, gain, codes, scales, inverse_rms, D, eps, POWER_OF_TWO: tl.constexpr, TILES: tl.constexpr):
    """One row, as TILES tiles of 128."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(tl.sum(values * values, axis=1), axis=0) / D + eps))
    y = values * inverse * tl.load(gain + column, mask=column < D, other=0.0).to(tl.float32)
    y = y.to(x.dtype.element_ty).to(tl.float32)
    code, scale = quantize_tiles(y, POWER_OF_TWO, axis=1)
    tl.store(codes + row * D + column, code.to(codes.dtype.element_ty), mask=column < D)
    tl.store(scales + row * tl.cdiv(D, WIDTH) + tile, scale, mask=tile < tl.cdiv(D, WIDTH))
    tl.store(inverse_rms + row, inverse)
