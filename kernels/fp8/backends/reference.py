"""The backend that defines what FP8 means, in plain PyTorch, on any device.

out = sum over blocks of 128 along K of (a_block @ b_block) x scale of a's tile x scale of b's tile, all in FP32: the
products of E4M3 values are exact, and scales are applied outside them, every 128, as Hopper's kernels promote their
sums (report section 3.3.2). Codes may come widened to FP32, which is how weights are kept between two optimizer steps.

Codes and scales come as `formats.quantize` makes them: activations and gradients [rows, columns] in 1x128 tiles with
scales [rows, ceil(columns / 128)], weights [..., N, K] in blocks with scales [..., ceil(N / 128), ceil(K / 128)]. Any
number of rows will do, also none. Operands that do not fit each other raise ValueError or PyTorch's RuntimeError.

Legend: `M` rows, `N` output width, `K` contracted width, `T` tokens, `E` experts.
"""

import torch
from torch import Tensor

from kernels.fp8.formats import TILE, regroup, widen
from kernels.gemm import BF16Units

ROWS = 16  # fewer than a BF16 GEMM's 64 (`gemm.ROWS`): this one computes what it pads


def prepare_weight(codes: Tensor) -> Tensor:
    """Weights in the form that the GEMMs read fastest."""
    return widen(codes)


def linear(
    x: Tensor, x_scales: Tensor, weights: list[Tensor], weight_scales: list[Tensor], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Fprop: x [M, K] in 1x128 tiles, each weight [N, K] in 128x128 blocks -> [M, N] each, rounded once to `dtype`."""
    x = widen(x)
    operands = zip(map(widen, weights), weight_scales, strict=True)
    return [_gemm(x, x_scales, w.t(), s.t()).to(dtype) for w, s in operands]


def linear_dgrad(
    dys: list[Tensor],
    dy_scales: list[Tensor],
    weights: list[Tensor],
    weight_scales: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dgrad: sum of dy [M, N] in 1x128 tiles @ weight [N, K] with the blocks of Fprop -> [M, K] in `dtype`."""
    operands = zip(map(widen, dys), dy_scales, map(widen, weights), weight_scales, strict=True)
    dx, *others = (_gemm(*operand) for operand in operands)
    for other in others:
        dx += other
    return dx.to(dtype)


def linear_wgrad(x: Tensor, x_scales: Tensor, dys: list[Tensor], dy_scales: list[Tensor], out: list[Tensor]) -> None:
    """Wgrad: out [N, K] += dy^T @ x, both requantised in 128x1 tiles over their T tokens."""
    T = x.shape[0]
    x_values, x_tiles = regroup(x, x_scales, [T])
    for dy, scales, main_grad in zip(dys, dy_scales, out, strict=True):
        dy_values, dy_tiles = regroup(dy, scales, [T])
        _accumulate_over_tokens(main_grad, dy_values[:T], dy_tiles, x_values[:T], x_tiles)


def grouped_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Fprop of each expert's rows: x [R, K], weight [E, N, K] -> [R, N] in `dtype`."""
    b_EKN, b_scales = widen(weight).transpose(1, 2), weight_scales.transpose(1, 2)
    return _grouped_gemm(x, x_scales, b_EKN, b_scales, counts).to(dtype)


def grouped_dgrad(
    dy: Tensor,
    dy_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dgrad of each expert's rows: dy [R, N], weight [E, N, K] -> [R, K] in `dtype`."""
    return _grouped_gemm(dy, dy_scales, widen(weight), weight_scales, counts).to(dtype)


def grouped_wgrad(x: Tensor, x_scales: Tensor, dy: Tensor, dy_scales: Tensor, out: Tensor, counts: list[int]) -> None:
    """Wgrad of each expert: out[e] [N, K] += dy^T @ x over its rows; 128x1 tiles begin anew at every expert."""
    x_values, x_tiles = regroup(x, x_scales, counts)
    dy_values, dy_tiles = regroup(dy, dy_scales, counts)
    first = 0
    for main_grad, count in zip(out.unbind(), counts, strict=True):
        tiles = slice(first, first + -(-count // TILE))
        rows = slice(first * TILE, first * TILE + count)
        if count:
            _accumulate_over_tokens(main_grad, dy_values[rows], dy_tiles[tiles], x_values[rows], x_tiles[tiles])
        first = tiles.stop


def _gemm(a_MK: Tensor, a_scales: Tensor, b_KN: Tensor, b_scales: Tensor) -> Tensor:
    """a [M, K] with a scale for every row and block of K, b [K, N] with a scale for every 128x128 block."""
    b_scales = b_scales.unsqueeze(2).expand(-1, -1, TILE).flatten(1)[:, : b_KN.shape[1]]
    out: Tensor | None = None
    rows, a_MK, a_scales = a_MK.shape[0], _few_shapes(a_MK), _few_shapes(a_scales)
    with BF16Units(a_MK):
        for a, b, a_scale, b_scale in zip(
            a_MK.split(TILE, 1), b_KN.split(TILE, 0), a_scales.split(1, 1), b_scales, strict=True
        ):
            partial = torch.mm(a, b).mul_(a_scale)
            out = partial.mul_(b_scale) if out is None else out.addcmul_(partial, b_scale)
    assert out is not None
    return out[:rows]


def _grouped_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, counts: list[int]) -> Tensor:
    operands = zip(widen(a).split(counts), a_scales.split(counts), b.unbind(), b_scales.unbind(), counts, strict=True)
    parts = [_gemm(*operand) for *operand, count in operands if count]
    return torch.cat(parts) if parts else torch.empty(0, b.shape[2], device=b.device)


def _accumulate_over_tokens(out_NK: Tensor, dy_TN: Tensor, dy_scales: Tensor, x_TK: Tensor, x_scales: Tensor) -> None:
    with BF16Units(out_NK):
        for dy, dy_scale, x, x_scale in zip(dy_TN.split(TILE), dy_scales, x_TK.split(TILE), x_scales, strict=True):
            partial = torch.mm(_few_shapes(dy).t(), _few_shapes(x))
            out_NK.addcmul_(partial.mul_(dy_scale.unsqueeze(1)), x_scale)


def _few_shapes(rows: Tensor) -> Tensor:
    """The rows, on a CPU followed by zeros to a multiple of `ROWS`: GEMMs are compiled there by shape (`gemm.ROWS`)."""
    missing = 0 if rows.is_cuda else -rows.shape[0] % ROWS
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
