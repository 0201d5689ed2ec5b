"""Causal attention with values of another width than queries and keys, as MLA has them.

On a GPU PyTorch's fused kernels take both widths. On a CPU they do not, and what PyTorch falls back to computes and
keeps all T x T scores. There, queries are taken in blocks, each with the keys up to its last query: half the products.
Backward makes the probabilities again, so that nothing of T x T is kept, and like the fused kernels' it takes a row's
share in the softmax's gradient from the output: sum(p dp) = dy . out. Softmax and sums are FP32 (FP64 for FP64).

Legend: `B` sequences, `T` tokens, `H` heads, `d` width of queries and keys, `v` width of values.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gemm import BF16Units
from kernels.ops import Cost, op, size, wide

BLOCK = 128
"""Queries taken at a time."""


def _pairs(q_BHTd: Tensor) -> int:
    """Queries times the keys that each sees, over all heads and sequences."""
    B, H, T, _ = q_BHTd.shape
    return B * H * T * (T + 1) // 2


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    for start in range(0, tokens, BLOCK):
        yield start, min(start + BLOCK, tokens)


def _units(operand: Tensor) -> AbstractContextManager[None]:
    """BF16 operands are widened; their products may still come from BF16 units."""
    return BF16Units(operand) if operand.dtype == torch.bfloat16 else nullcontext()


def _wide(rows: Tensor) -> Tensor:
    return rows.to(wide(rows.dtype)).contiguous()


def _probabilities(q_HTd: Tensor, k_HTd: Tensor, scale: float, start: int, end: int) -> Tensor:
    """What queries `start` to `end` give to the keys up to `end`: [H, end - start, end]."""
    later = torch.full((end - start, end), float("-inf"), dtype=q_HTd.dtype, device=q_HTd.device).triu_(start + 1)
    return torch.baddbmm(later, q_HTd[:, start:end], k_HTd[:, :end].transpose(1, 2), alpha=scale).softmax(-1)


def _empty_out(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    B, H, T, width = v.shape
    return v.new_empty(B, T, H, width)


@op(
    cost=lambda q, k, v, scale: Cost(2 * _pairs(q) * (q.shape[3] + v.shape[3]), size(q, k, v, v), "attention"),
    fake=_empty_out,
)
def causal_attention_forward(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTv: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the keys that are not later than the query: [B, T, H, v]."""
    out_BTHv = _empty_out(q_BHTd, k_BHTd, v_BHTv, scale)
    with _units(q_BHTd):
        for out_THv, *sequence in zip(out_BTHv, q_BHTd, k_BHTd, v_BHTv, strict=True):
            q, k, v = map(_wide, sequence)
            for start, end in _blocks(len(out_THv)):
                p = _probabilities(q, k, scale, start, end)
                out_THv[start:end] = torch.bmm(p, v[:, :end]).transpose(0, 1)
    return out_BTHv


@op(
    cost=lambda dy, out, q, k, v, scale: Cost(
        2 * _pairs(q) * (3 * q.shape[3] + 2 * v.shape[3]),
        2 * size(q, k, v) + size(dy, out),
        "attention",
        workspace=4 * q.numel(),  # the gradients of queries are summed in FP32
    ),
    fake=lambda dy, out, q, k, v, scale: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)
def causal_attention_backward(
    dy_BTHv: Tensor, out_BTHv: Tensor, q_BHTd: Tensor, k_BHTd: Tensor, v_BHTv: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    dtype = wide(q_BHTd.dtype)
    grads = [torch.zeros_like(operand, dtype=dtype) for operand in (q_BHTd, k_BHTd, v_BHTv)]
    with _units(q_BHTd):
        heads = (each.transpose(1, 2) for each in (dy_BTHv, out_BTHv))
        for dy_HTv, out_HTv, *sequence, dq, dk, dv in zip(*heads, q_BHTd, k_BHTd, v_BHTv, *grads, strict=True):
            dy, q, k, v = map(_wide, (dy_HTv, *sequence))
            less_HT1 = (dy * out_HTv).sum(-1, keepdim=True).neg_()
            for start, end in _blocks(q.shape[1]):
                p, dy_block = _probabilities(q, k, scale, start, end), dy[:, start:end]
                dv[:, :end].baddbmm_(p.transpose(1, 2), dy_block)
                ds = torch.baddbmm(less_HT1[:, start:end], dy_block, v[:, :end].transpose(1, 2)).mul_(p)
                dq[:, start:end].baddbmm_(ds, k[:, :end], alpha=scale)
                dk[:, :end].baddbmm_(ds.transpose(1, 2), q[:, start:end], alpha=scale)
    dq, dk, dv = (grad.to(q_BHTd.dtype) for grad in grads)
    return dq, dk, dv


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = causal_attention_forward(q, k, v, scale)
        ctx.save_for_backward(out, q, k, v)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *causal_attention_backward(dy, *ctx.saved_tensors, ctx.scale), None


def causal_attention(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTv: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, each query seeing the keys up to its own position: [B, T, H, v] in the inputs' dtype."""
    if q_BHTd.is_cuda:
        return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTv, is_causal=True, scale=scale).transpose(1, 2)
    return _CausalAttention.apply(q_BHTd, k_BHTd, v_BHTv, scale)
