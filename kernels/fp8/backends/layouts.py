"""From the canonical layouts to those of cuBLAS, which `cublas` and `transformer_engine` both feed.

On Hopper cuBLAS multiplies a [M, K] by b [N, K], both contiguous along K. Scales of 1x128 tiles lie as [tiles of K, M],
those of 128x128 blocks as [blocks of N, blocks of K], filled up to a multiple of 4. So a weight is transposed for
Dgrad, and both operands are for Wgrad. Source: cuBLAS's documentation, "1D and 2D block scaling for FP8 data types".
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.fp8.backends import auto

MULTIPLE = 16  # of rows: bytes that the addresses of rows of operands and of scales are aligned to


def rows(codes_MK: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and scales [tiles of K, M], with rows of zeros up to a multiple of 16.

    Scales that were made in that layout, and are passed as a view of it, are not copied.
    """
    missing = -codes_MK.shape[0] % MULTIPLE
    if missing:
        codes_MK = pad(codes_MK.view(torch.uint8), (0, 0, 0, missing)).view(codes_MK.dtype)
        scales = pad(scales, (0, 0, 0, missing))
    return codes_MK.contiguous(), scales.t().contiguous()


def blocks(scales: Tensor) -> Tensor:
    """Scales of 128x128 blocks [..., blocks of N, blocks of K to a multiple of 4]."""
    return pad(scales, (0, -scales.shape[-1] % 4)).contiguous()


_transposed: Any = WeakTensorKeyDictionary()


def transposed(codes: Tensor) -> Tensor:
    """A weight's codes [..., N, K] as [..., K, N]: made once, kept while that very tensor lives. It may not change."""
    if codes not in _transposed:
        _transposed[codes] = codes.transpose(-2, -1).contiguous()
    return _transposed[codes]


def columns(codes_RC: Tensor, scales: Tensor, counts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """`formats.requantize` of each group that has rows: codes [C, rows filled up to 128], scales [tiles of rows, C]."""
    parts = zip(codes_RC.split(counts), scales.split(counts), counts, strict=True)
    turned = [auto.requantize(codes, its_scales, [count]) for codes, its_scales, count in parts if count]
    return [(codes, its_scales.t().contiguous()) for codes, its_scales in turned]
