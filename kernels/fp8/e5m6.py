"""E5M6 in 1x128 tiles, packed: the format in which the input of the attention's output projection waits for backward.

Attention's own backward reads that tensor too, and E4M3 is too coarse for it (report section 3.3.3). A value has a
sign, five bits of exponent (bias 15) and six of mantissa: the top 12 bits of an FP16, so the largest finite value is
65024, the smallest normal 2^-14, the smallest step 2^-20. Eight values fill three 32-bit words, 1.5 bytes each.
Scales and rounding are as in `formats`, with 65024 in the place of 448: s = max(amax, 1e-4) / 65024.

A tile that holds an infinity or a NaN has a non-finite scale and comes back non-finite throughout.
"""

import torch
from torch import Tensor

from kernels.fp8 import native
from kernels.fp8.formats import ROWS, join, round_mantissa, split, tile_scales

E5M6_MAX = 65024.0
SMALLEST_NORMAL = 2.0**-14
NAN = 0x7E0
GROUP = 8
"""Values that share three words."""


def quantize(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise rows of `x` [..., R, C], of any floating dtype, in tiles of 1x128; the sign of a NaN is dropped.

    Returns words [..., R, ceil(C / 8) * 3] in int32, missing values being zeros, and FP32 scales [..., R,
    ceil(C / 128)], rounded up to 2^k if asked.
    """
    if x.dtype == torch.bfloat16 and (lib := native.loops(x)):
        return native.e5m6_quantize(lib, x, power_of_two)
    R, C = x.shape[-2:]
    tiles = split(x.float(), ROWS)
    scales = tile_scales(tiles.abs().amax((-3, -1), keepdim=True), power_of_two, E5M6_MAX)
    values = round_mantissa(tiles / scales, 6, SMALLEST_NORMAL)
    codes = (values.half().view(torch.int16).int() >> 4) & 0xFFF
    codes = join(torch.where(values.isnan(), NAN, codes), R, C)
    return pack(torch.nn.functional.pad(codes, (0, -C % GROUP))), scales.squeeze(-1).squeeze(-2)


def dequantize(words: Tensor, scales: Tensor, columns: int) -> Tensor:
    """code x scale of its tile in FP32: [..., R, columns] from `words` and `scales` as `quantize` returns them."""
    if lib := native.loops(words):
        return native.e5m6_dequantize(lib, words, scales, columns)
    values = (unpack(words) << 4).to(torch.int16).view(torch.float16).float()[..., :columns]
    return join(split(values, ROWS) * scales.unsqueeze(-1).unsqueeze(-3), words.shape[-2], columns)


def pack(codes: Tensor) -> Tensor:
    """12-bit codes [..., 8 n] in int32 -> words [..., 3 n], the first code in the highest bits."""
    a, b, c, d, e, f, g, h = codes.unflatten(-1, (-1, GROUP)).unbind(-1)
    words = a << 20 | b << 8 | c >> 4, c << 28 | d << 16 | e << 4 | f >> 8, f << 24 | g << 12 | h
    return torch.stack(words, -1).flatten(-2)


def unpack(words: Tensor) -> Tensor:
    """The inverse of `pack`."""
    x, y, z = words.unflatten(-1, (-1, 3)).unbind(-1)
    codes = x >> 20, x >> 8, x << 4 | y >> 28 & 0xF, y >> 16, y >> 4, y << 8 | z >> 24 & 0xFF, z >> 12, z
    return torch.stack(codes, -1).flatten(-2) & 0xFFF
