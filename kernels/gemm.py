"""GEMMs whose result is wider than their operands: BF16 (or FP8) values in, FP32 sums out.

Weight gradients accumulate straight into FP32, and logits leave in FP32, without ever passing through BF16. PyTorch has
no such GEMM for CPUs. But products of BF16 values are exact in FP32, so the operands are widened and multiplied as FP32
while oneDNN may use its BF16 units: the same numbers, at the speed of BF16.
"""

import os
from typing import Any

import torch
from torch import Tensor

from kernels.ops import Cost, op, size

# oneDNN compiles a GEMM for each shape and keeps the last 1,024. Experts get another number of rows each time, which
# would fill that many within a step; with room for all, a BF16 step of recipe tiny takes two thirds of the time.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

_onednn: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


class BF16Units:
    """Inside, FP32 GEMMs on the CPU may use BF16 units: exact as long as every operand holds BF16 values."""

    def __init__(self, operand: Tensor) -> None:
        self.precision = None if operand.is_cuda else _onednn.fp32_precision

    def __enter__(self) -> None:
        if self.precision is not None:
            _onednn.fp32_precision = "bf16"

    def __exit__(self, *exception: object) -> None:
        if self.precision is not None:
            _onednn.fp32_precision = self.precision


def accumulate(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """out += a @ b for operands no wider than `out`."""
    if a_MK.dtype == out_MN.dtype:
        out_MN.addmm_(a_MK, b_KN)
    elif a_MK.is_cuda:
        out_MN += torch.mm(a_MK, b_KN, out_dtype=out_MN.dtype)
    else:
        with BF16Units(out_MN):
            out_MN.addmm_(a_MK.to(out_MN.dtype), b_KN.to(out_MN.dtype))


def _cost(a: Tensor, b: Tensor, out: Tensor) -> Cost:
    return Cost(2 * out.numel() * a.shape[-1], size(a, b, out))


@op(
    cost=lambda a_MK, b_KN, dtype: _cost(a_MK, b_KN, a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=dtype)),
    fake=lambda a_MK, b_KN, dtype: a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=dtype),
)
def wide_mm(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, with sums that never leave it."""
    if a_MK.dtype == dtype:
        return torch.mm(a_MK, b_KN)
    if a_MK.is_cuda:
        return torch.mm(a_MK, b_KN, out_dtype=dtype)
    with BF16Units(a_MK):
        return torch.mm(a_MK.to(dtype), b_KN.to(dtype))


@op(
    cost=lambda out_MN, a_MK, b_KN: _cost(a_MK, b_KN, out_MN),
    fake=lambda out_MN, a_MK, b_KN: None,
    mutates=("out_MN",),
)
def accumulate_mm(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """out += a @ b in the dtype of `out`."""
    accumulate(out_MN, a_MK, b_KN)


def _grouped_cost(rows: Tensor, b_EKN: Tensor, counts: list[int]) -> Cost:
    busy = sum(1 for count in counts if count)
    _, K, N = b_EKN.shape
    R = rows.shape[0]
    return Cost(2 * R * K * N, R * (K + N) * rows.element_size() + busy * K * N * b_EKN.element_size())


@op(
    cost=_grouped_cost,
    fake=lambda a_RK, b_EKN, counts: a_RK.new_empty(a_RK.shape[0], b_EKN.shape[2]),
)
def grouped_mm(a_RK: Tensor, b_EKN: Tensor, counts: list[int]) -> Tensor:
    """Rows sorted by expert, `counts[e]` of them each, times that expert's matrix: [R, N]."""
    parts = [torch.mm(a, b) for a, b, n in zip(a_RK.split(counts), b_EKN.unbind(), counts, strict=True) if n]
    return torch.cat(parts) if parts else a_RK.new_empty(0, b_EKN.shape[2])


@op(
    cost=lambda out_EMN, a_RM, b_RN, counts: _grouped_cost(a_RM, out_EMN, counts),
    fake=lambda out_EMN, a_RM, b_RN, counts: None,
    mutates=("out_EMN",),
)
def grouped_accumulate_mm(out_EMN: Tensor, a_RM: Tensor, b_RN: Tensor, counts: list[int]) -> None:
    """out[e] += a[rows of e]^T @ b[rows of e] in the dtype of `out`."""
    if a_RM.dtype != out_EMN.dtype and not a_RM.is_cuda:
        a_RM, b_RN = a_RM.to(out_EMN.dtype), b_RN.to(out_EMN.dtype)
        with BF16Units(out_EMN):
            _grouped_accumulate(out_EMN, a_RM, b_RN, counts)
    else:
        _grouped_accumulate(out_EMN, a_RM, b_RN, counts)


def _grouped_accumulate(out_EMN: Tensor, a_RM: Tensor, b_RN: Tensor, counts: list[int]) -> None:
    for out, a, b, n in zip(out_EMN.unbind(), a_RM.split(counts), b_RN.split(counts), counts, strict=True):
        if n:
            accumulate(out, a.t(), b)
