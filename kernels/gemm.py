"""GEMMs whose result is wider than their operands: BF16 (or FP8) values in, FP32 sums out.

Weight gradients accumulate straight into FP32, and logits leave in FP32, without ever passing through BF16. PyTorch has
no such GEMM for CPUs. But products of BF16 values are exact in FP32, so the operands are widened and multiplied as FP32
while oneDNN may use its BF16 units: the same numbers, at the speed of BF16.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.ops import Cost, Product, op, size, unit_of

ROWS = 64
"""On a CPU oneDNN compiles a BF16 GEMM for each shape and keeps a thousand. Experts get another number of rows each
time, which uses that many up within a step; in multiples of 64 there are few shapes, each compiled once."""

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
    return Cost.of(unit_of(a.dtype), (Product(out.shape[0], out.shape[1], a.shape[-1]),), size(a, b, out))


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


def _grouped_bytes(rows: Tensor, b_EKN: Tensor, counts: list[int]) -> int:
    busy = sum(1 for count in counts if count)
    _, K, N = b_EKN.shape
    return rows.shape[0] * (K + N) * rows.element_size() + busy * K * N * b_EKN.element_size()


@op(
    cost=lambda a_RK, b_EKN, counts: Cost.of(
        unit_of(a_RK.dtype),
        (Product(len(a_RK), b_EKN.shape[2], b_EKN.shape[1], len(counts)),),
        _grouped_bytes(a_RK, b_EKN, counts),
    ),
    fake=lambda a_RK, b_EKN, counts: a_RK.new_empty(a_RK.shape[0], b_EKN.shape[2]),
)
def grouped_mm(a_RK: Tensor, b_EKN: Tensor, counts: list[int]) -> Tensor:
    """Rows sorted by expert, `counts[e]` of them each, times that expert's matrix: [R, N]."""
    R, N = a_RK.shape[0], b_EKN.shape[2]
    step = ROWS if _few_shapes(a_RK) else 1
    if step > 1:
        a_RK = torch.cat([a_RK, a_RK.new_zeros(step - 1, a_RK.shape[1])])
    out = a_RK.new_empty(R + step - 1, N)
    start = 0
    for b, n in zip(b_EKN.unbind(), counts, strict=True):
        if n:  # rows of the next expert may be multiplied too; its own turn then overwrites them
            end = start + _up(n, step)
            torch.mm(a_RK[start:end], b, out=out[start:end])
        start += n
    return out[:R]


def _few_shapes(rows: Tensor) -> bool:
    """Whether GEMMs of these rows are compiled by shape."""
    return rows.dtype == torch.bfloat16 and not rows.is_cuda


def _up(rows: int, step: int) -> int:
    """`rows` rounded up to a multiple of `step`."""
    return -(-rows // step) * step


@op(
    cost=lambda out_EMN, a_RM, b_RN, counts: Cost.of(
        unit_of(a_RM.dtype),
        tuple(Product(out_EMN.shape[1], out_EMN.shape[2], count) for count in counts if count),
        _grouped_bytes(a_RM, out_EMN, counts),
    ),
    fake=lambda out_EMN, a_RM, b_RN, counts: None,
    mutates=("out_EMN",),
)
def grouped_accumulate_mm(out_EMN: Tensor, a_RM: Tensor, b_RN: Tensor, counts: list[int]) -> None:
    """out[e] += a[rows of e]^T @ b[rows of e] in the dtype of `out`."""
    if not _few_shapes(a_RM):
        _grouped_accumulate(out_EMN, a_RM, b_RN, counts)
        return
    a_RM, b_RN = (_padded(rows, counts, out_EMN.dtype) for rows in (a_RM, b_RN))
    with BF16Units(out_EMN):
        _grouped_accumulate(out_EMN, a_RM, b_RN, [_up(count, ROWS) for count in counts])


def _grouped_accumulate(out_EMN: Tensor, a_RM: Tensor, b_RN: Tensor, counts: list[int]) -> None:
    for out, a, b, n in zip(out_EMN.unbind(), a_RM.split(counts), b_RN.split(counts), counts, strict=True):
        if n:
            accumulate(out, a.t(), b)


def _padded(rows: Tensor, counts: list[int], dtype: torch.dtype) -> Tensor:
    """The rows in `dtype`, those of each expert followed by zeros up to a multiple of `ROWS`."""
    sizes = [_up(count, ROWS) for count in counts]
    padded = rows.new_zeros(sum(sizes), rows.shape[1], dtype=dtype)
    for target, source, n in zip(padded.split(sizes), rows.split(counts), counts, strict=True):
        target[:n] = source
    return padded
