"""torch's block-wise `scaled_mm`, which is cuBLAS's: Fprop, Dgrad and Wgrad on Hopper.

Of the pairs of tiles that it multiplies, weft uses 1x128 with 128x128 (Fprop; Dgrad on a transposed weight) and 1x128
with 1x128 (Wgrad, both operands transposed); 128x128 with 128x128 it does not have, nor a grouped GEMM of blocks, nor a
quantiser. Results are BF16 or FP32; it does not accumulate, so a weight gradient is added in a pass of its own. Both
widths of a weight must be multiples of 16; rows are filled up inside. Signatures and meanings are `reference`'s.
"""

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm  # type: ignore[attr-defined,unused-ignore]

from kernels.fp8.backends import check_widths
from kernels.fp8.backends.layouts import blocks, columns, rows, transposed

TILES, BLOCKS = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128


def prepare_weight(codes: Tensor) -> Tensor:
    """Codes as they are."""
    return codes


def linear(
    x: Tensor, x_scales: Tensor, weights: list[Tensor], weight_scales: list[Tensor], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Fprop: x [M, K] in 1x128 tiles, each weight [N, K] in 128x128 blocks -> [M, N] each."""
    M = x.shape[0]
    x, x_scales = rows(x, x_scales)
    return [_gemm(x, x_scales, w, blocks(s), BLOCKS, dtype)[:M] for w, s in zip(weights, weight_scales, strict=True)]


def linear_dgrad(
    dys: list[Tensor],
    dy_scales: list[Tensor],
    weights: list[Tensor],
    weight_scales: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dgrad: sum of dy [M, N] in 1x128 tiles @ weight [N, K] in 128x128 blocks -> [M, K], summed in FP32."""
    M, one = dys[0].shape[0], len(dys) == 1
    dx, *others = (
        _gemm(*rows(dy, s), transposed(w), blocks(ws.t()), BLOCKS, dtype if one else torch.float32)
        for dy, s, w, ws in zip(dys, dy_scales, weights, weight_scales, strict=True)
    )
    for other in others:
        dx += other
    return dx[:M].to(dtype)


def linear_wgrad(x: Tensor, x_scales: Tensor, dys: list[Tensor], dy_scales: list[Tensor], out: list[Tensor]) -> None:
    """Wgrad: out [N, K] += dy^T @ x, both requantised in 128x1 tiles over their T tokens."""
    for main_grad in out:
        check_widths("cublas", *main_grad.shape)
    if not x.shape[0]:
        return
    [operand] = columns(x, x_scales, [x.shape[0]])
    for dy, scales, main_grad in zip(dys, dy_scales, out, strict=True):
        [left] = columns(dy, scales, [x.shape[0]])
        main_grad += _gemm(*left, *operand, TILES, torch.float32)


def _gemm(
    a_MK: Tensor, a_scales: Tensor, b_NK: Tensor, b_scales: Tensor, b_tiles: ScalingType, dtype: torch.dtype
) -> Tensor:
    """a @ b^T, of operands and scales as `layouts` makes them."""
    check_widths("cublas", *b_NK.shape)
    b_KN, a_scales_MK, b_scales_KN = b_NK.t(), a_scales.t(), b_scales.t()
    return scaled_mm(a_MK, b_KN, a_scales_MK, TILES, b_scales_KN, b_tiles, output_dtype=dtype)
