"""Transformer Engine's block scaling: its quantisers, its GEMMs and its grouped GEMM, on Hopper.

Its GEMMs read weft's codes and scales: a `Float8BlockwiseQTensorStorage` is made around them, in the layouts of
`layouts.py`. Everything is its layout "TN", to which it reduces the others on Hopper, so Dgrad gets a transposed weight
and Wgrad transposed operands. Both widths of a weight must be multiples of 16; rows are filled up inside.

Its quantiser multiplies by fp32(448 / amax) where the reference divides by fp32(amax / 448): now and then a scale
differs in its last bit, and a value between two codes goes to the other. With power-of-two scales they agree. Of an
infinity it makes 448, which the reference does not. `auto` therefore leaves its quantiser out.
"""

from functools import cache

import torch
import transformer_engine_torch as tex
from torch import Tensor
from torch.nn.functional import pad
from transformer_engine.pytorch import Float8BlockQuantizer
from transformer_engine.pytorch.cpp_extensions import general_gemm, general_grouped_gemm
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

from kernels.fp8.backends import BackendError, check_widths
from kernels.fp8.backends.layouts import MULTIPLE, blocks, columns, rows, transposed
from kernels.fp8.formats import BLOCKS, COLUMNS, SMALLEST_AMAX, TILE

E4M3 = tex.DType.kFloat8E4M3


@cache
def _quantizer(tile: tuple[int, int], power_of_two: bool) -> Float8BlockQuantizer:
    quantizer = Float8BlockQuantizer(
        E4M3,
        rowwise=tile != COLUMNS,
        columnwise=tile == COLUMNS,
        amax_epsilon=SMALLEST_AMAX,
        force_pow_2_scales=power_of_two,
        block_scaling_dim=2 if tile == BLOCKS else 1,
    )
    quantizer.internal = True  # a storage, without the tensor around it
    return quantizer


def quantize(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`formats.quantize` of BF16 or FP32 [..., R, C], C a multiple of 16, by Transformer Engine's rules."""
    if x.dim() > 2:
        codes, scales = zip(*(quantize(each, tile, power_of_two) for each in x.flatten(0, -3)), strict=True)
        batch = x.shape[:-2]
        return torch.stack(codes).unflatten(0, batch), torch.stack(scales).unflatten(0, batch)
    R, C = x.shape
    if C % MULTIPLE:
        raise BackendError(f"fp8.backend=transformer_engine: rows of {C}; expected a multiple of {MULTIPLE}")
    if tile == COLUMNS and R % MULTIPLE:
        x = pad(x, (0, 0, 0, -R % MULTIPLE))
    made = _quantizer(tile, power_of_two)(x.contiguous())
    if tile == COLUMNS:
        codes, scales = made._columnwise_data.t()[:R], made._columnwise_scale_inv[:, :C]
    elif tile == BLOCKS:
        codes, scales = made._rowwise_data, made._rowwise_scale_inv[:, : -(-C // TILE)]
    else:
        codes, scales = made._rowwise_data, made._rowwise_scale_inv[:, :R].t()
    return codes.view(torch.float8_e4m3fn), scales


def prepare_weight(codes: Tensor) -> Tensor:
    """Codes as they are."""
    return codes


def linear(
    x: Tensor, x_scales: Tensor, weights: list[Tensor], weight_scales: list[Tensor], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Fprop: x [M, K] in 1x128 tiles, each weight [N, K] in 128x128 blocks -> [M, N] each."""
    M, operand = x.shape[0], _tiles(*rows(x, x_scales))
    if not M:
        return [x.new_empty(0, w.shape[0], dtype=dtype) for w in weights]
    return [_gemm(operand, _blocks(w, s), dtype)[:M] for w, s in zip(weights, weight_scales, strict=True)]


def linear_dgrad(
    dys: list[Tensor],
    dy_scales: list[Tensor],
    weights: list[Tensor],
    weight_scales: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dgrad: sum of dy [M, N] in 1x128 tiles @ weight [N, K] in 128x128 blocks -> [M, K], summed in FP32."""
    M, wide = dys[0].shape[0], dtype if len(dys) == 1 else torch.float32
    if not M:
        return dys[0].new_empty(0, weights[0].shape[1], dtype=dtype)
    dx: Tensor | None = None
    for dy, s, w, ws in zip(dys, dy_scales, weights, weight_scales, strict=True):
        dx = _gemm(_tiles(*rows(dy, s)), _blocks(transposed(w), ws.t()), wide, dx)
    assert dx is not None
    return dx[:M].to(dtype)


def linear_wgrad(x: Tensor, x_scales: Tensor, dys: list[Tensor], dy_scales: list[Tensor], out: list[Tensor]) -> None:
    """Wgrad: out [N, K] += dy^T @ x in the GEMM itself, both requantised in 128x1 tiles over their T tokens."""
    for main_grad in out:
        check_widths("transformer_engine", *main_grad.shape)
    if not x.shape[0]:
        return
    [operand] = columns(x, x_scales, [x.shape[0]])
    for dy, scales, main_grad in zip(dys, dy_scales, out, strict=True):
        [left] = columns(dy, scales, [x.shape[0]])
        _gemm(_tiles(*left), _tiles(*operand), torch.float32, main_grad)


def grouped_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Fprop of each expert's rows: x [R, K], weight [E, N, K] -> [R, N]."""
    return _grouped(x, x_scales, weight, blocks(weight_scales), counts, dtype)


def grouped_dgrad(
    dy: Tensor,
    dy_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dgrad of each expert's rows: dy [R, N], weight [E, N, K] -> [R, K]."""
    return _grouped(dy, dy_scales, transposed(weight), blocks(weight_scales.transpose(1, 2)), counts, dtype)


def grouped_wgrad(x: Tensor, x_scales: Tensor, dy: Tensor, dy_scales: Tensor, out: Tensor, counts: list[int]) -> None:
    """Wgrad of each expert: out[e] [N, K] += dy^T @ x over its rows; 128x1 tiles begin anew at every expert."""
    busy = [e for e, count in enumerate(counts) if count]
    if not busy:
        return
    check_widths("transformer_engine", *out.shape[1:])
    general_grouped_gemm(
        [_tiles(*operand) for operand in columns(x, x_scales, counts)],
        [_tiles(*operand) for operand in columns(dy, dy_scales, counts)],
        [out[e] for e in busy],
        [None] * len(busy),
        torch.float32,
        layout="TN",
        accumulate=True,
        use_split_accumulator=True,
    )


def _grouped(
    a: Tensor, a_scales: Tensor, b_ENK: Tensor, b_scales: Tensor, counts: list[int], dtype: torch.dtype
) -> Tensor:
    """Rows of each expert times its matrix, transposed; rows of an expert are filled up to a multiple of 16."""
    E, N, K = b_ENK.shape
    check_widths("transformer_engine", N, K)
    busy = [e for e in range(E) if counts[e]]
    operands = [
        rows(part, scales) for part, scales in zip(a.split(counts), a_scales.split(counts), strict=True) if len(part)
    ]
    sizes = [codes.shape[0] for codes, _ in operands]
    out = a.new_empty(sum(sizes), N, dtype=dtype)
    if busy:
        general_grouped_gemm(
            [_storage(b_ENK[e], b_scales[e], BLOCKS) for e in busy],
            [_tiles(*operand) for operand in operands],
            [out],
            [None] * len(busy),
            dtype,
            layout="TN",
            m_splits=sizes,
            use_split_accumulator=True,
            single_output=True,
        )
    if out.shape[0] == a.shape[0]:
        return out
    return torch.cat([part[: counts[e]] for part, e in zip(out.split(sizes), busy, strict=True)])


def _gemm(
    a: Float8BlockwiseQTensorStorage, b: Float8BlockwiseQTensorStorage, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """a @ b^T, added to `out` if there is one. Transformer Engine names its operands in the order of columns."""
    check_widths("transformer_engine", *b._rowwise_data.shape)
    return general_gemm(b, a, out_dtype=dtype, layout="TN", out=out, accumulate=out is not None)[0]


def _tiles(codes: Tensor, scales: Tensor) -> Float8BlockwiseQTensorStorage:
    """Codes [M, K] with scales [tiles of K, M]."""
    return _storage(codes, scales, (1, TILE))


def _blocks(codes: Tensor, scales: Tensor) -> Float8BlockwiseQTensorStorage:
    """Codes [N, K] with canonical scales of 128x128 blocks."""
    return _storage(codes, blocks(scales), BLOCKS)


def _storage(codes: Tensor, scales: Tensor, tile: tuple[int, int]) -> Float8BlockwiseQTensorStorage:
    return Float8BlockwiseQTensorStorage(
        rowwise_data=codes.view(torch.uint8),
        rowwise_scale_inv=scales,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=E4M3,
        quantizer=_quantizer(tile, False),
        is_2D_scaled=tile == BLOCKS,
    )
