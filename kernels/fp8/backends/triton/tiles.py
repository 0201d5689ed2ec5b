"""What every kernel here shares: the scale of a tile, the cast, and which group a tile of rows belongs to.

The arithmetic is that of `kernels.fp8.formats`, to the bit. Under TRITON_INTERPRET=1, which runs the kernels on a CPU
to check indexing and masks, codes stay FP32 and unrounded: the interpreter cannot cast to FP8.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8.formats import E4M3_MAX, SMALLEST_AMAX, TILE

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
CODES = torch.float32 if INTERPRETED else torch.float8_e4m3fn
"""What codes are stored as."""

WIDTH = tl.constexpr(TILE)
LARGEST = tl.constexpr(E4M3_MAX)
SMALLEST = tl.constexpr(SMALLEST_AMAX)


@triton.jit
def magnitude_bits(x):
    """|x| as integers, which order as the magnitudes do, with NaN above infinity: a maximum that NaN survives."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits, power_of_two):
    """Scales of tiles with the largest `magnitude_bits` given, rounded up to 2^k where `power_of_two`."""
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(amax < SMALLEST, SMALLEST, amax), LARGEST)
    bits = scale.to(tl.int32, bitcast=True)
    rounded_up = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((bits < 0x7F800000) & power_of_two, rounded_up, scale)


@triton.jit
def divide(x, scale):
    """x / scale in FP32, rounded as a division rounds wherever E4M3 can tell.

    An exactly rounded reciprocal makes one step of correction by the remainder exact (Markstein), in a quarter of the
    instructions of a division. Where a remainder is so small that it underflows, the code is zero either way. An
    infinite scale gives zero, or NaN for what is infinite itself. The factors -1 (a minus sign would subtract from
    zero) keep the sign of zero.
    """
    if INTERPRETED:  # its fused multiply-add rounds twice
        return tl.div_rn(x, scale)
    reciprocal = tl.div_rn(1.0, scale)
    quotient = x * reciprocal
    excess = tl.fma(quotient, tl.where(scale == float("inf"), 0.0, scale), x * -1.0)
    return tl.fma(excess, reciprocal * -1.0, quotient)


@triton.jit
def quantize_tiles(x, power_of_two: tl.constexpr, axis: tl.constexpr):
    """Codes, not yet narrowed, and scales of tiles that lie along `axis` of a matrix."""
    scale = scale_of(tl.max(magnitude_bits(x), axis=axis), power_of_two)
    return divide(x, tl.expand_dims(scale, axis)), scale


@triton.jit
def locate(tile, ends, groups, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Group, first row and end of the group's rows, of one of the tiles of BLOCK rows that groups are cut into.

    ends [groups]: where the rows of each group end. Every group begins at a new tile. GROUPS: a power of two >= groups.
    """
    group = tl.arange(0, GROUPS)
    end = tl.load(ends + group, mask=group < groups, other=0)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group < groups), other=0)
    tiles = tl.cdiv(end - start, BLOCK)
    own = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32))
    before = tl.sum(tl.where(group < own, tiles, 0))
    first = tl.sum(tl.where(group == own, start, 0)) + (tile - before) * BLOCK
    return own, first, tl.sum(tl.where(group == own, end, 0))


def group_ends(counts: list[int], device: torch.device) -> Tensor:
    """Where the rows of each group end, on the device; the host waits for nothing."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def tiles_of(counts: list[int], rows: int) -> int:
    """How many tiles of `rows` rows these groups are cut into."""
    return sum(-(-count // rows) for count in counts)


def new_codes(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=CODES, device=like.device)


def new_scales(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
