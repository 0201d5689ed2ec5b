"""Moving tokens to the rows of their experts and back.

`slot_TK[t, k]` is the row that holds the k-th copy of token t, and `source_R[r]` the token that row r is a copy of: two
views of one permutation. Gathering copies a token to its rows, combining adds them up; each is the other's backward.

Legend: `T` tokens, `D` model width, `K` chosen experts, `R` rows (T x K).
"""

from typing import Any

import torch
from torch import Tensor

from kernels.ops import Cost, op, size, wide


@op(
    cost=lambda x_TD, source_R: Cost(0, size(source_R) + 2 * len(source_R) * x_TD.shape[1] * x_TD.element_size()),
    fake=lambda x_TD, source_R: x_TD.new_empty(source_R.shape[0], x_TD.shape[1]),
)
def gather_forward(x_TD: Tensor, source_R: Tensor) -> Tensor:
    """Row r is x[source[r]]."""
    return x_TD.index_select(0, source_R)


@op(
    cost=lambda x_RD, slot_TK: Cost(
        slot_TK.numel() * x_RD.shape[1],
        size(slot_TK) + (slot_TK.numel() + slot_TK.shape[0]) * x_RD.shape[1] * x_RD.element_size(),
    ),
    fake=lambda x_RD, slot_TK: x_RD.new_empty(slot_TK.shape[0], x_RD.shape[1]),
)
def combine_forward(x_RD: Tensor, slot_TK: Tensor) -> Tensor:
    """Token t is the sum of x[slot[t, k]] over k, added in slot order."""
    first, *others = slot_TK.t().unbind()
    y = x_RD.index_select(0, first).to(wide(x_RD.dtype))
    for slot in others:
        y += x_RD.index_select(0, slot)
    return y.to(x_RD.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return gather_forward(x, source)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return combine_forward(dy, slot), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return combine_forward(x, slot)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return gather_forward(dy, source), None, None


def gather_rows(x_TD: Tensor, source_R: Tensor, slot_TK: Tensor) -> Tensor:
    """Copy each token to its rows: [R, D] with row r = x[source[r]]."""
    return _Gather.apply(x_TD, source_R, slot_TK)


def combine_rows(x_RD: Tensor, source_R: Tensor, slot_TK: Tensor) -> Tensor:
    """Add each token's rows up: [T, D] with y[t] = sum over k of x[slot[t, k]]; FP32 sum in slot order, cast back."""
    return _Combine.apply(x_RD, source_R, slot_TK)
