"""Queries, keys and values of MLA's heads, put together from what the projections yield, rotary parts turned.

A head's query and key have a part without positions, and after it a rotary part; the key's rotary part is one for all
heads. Pairs lie interleaved before the rotation and apart after it, first members ahead of second ones: queries and
keys are permuted alike, which their products do not see. Rotation is in the dtype of the angles (FP32), rounded once.
The released inference code pairs (x0, x1), (x2, x3), ... in the same way.

Legend: `B` sequences, `T` tokens, `H` heads, `d` width of queries and keys, `r` of their rotary part, `v` of values.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.ops import Cost, op, size


def _turned(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs [..., T, r] turned by the angles [T, r/2], then laid apart."""
    first, second = pairs[..., 0::2].to(cos.dtype), pairs[..., 1::2].to(cos.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _turn_back(pairs: Tensor, turned: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write into `pairs` what `_turned` would make `turned` of: a rotation's transpose is its inverse."""
    first, second = turned.to(cos.dtype).chunk(2, -1)
    pairs[..., 0::2] = first * cos + second * sin
    pairs[..., 1::2] = second * cos - first * sin


def _empty_heads(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, d = q.shape
    shape, values = (B, H, T, d), (B, H, T, kv.shape[3] - (d - k_rope.shape[2]))
    return q.new_empty(shape), q.new_empty(shape), q.new_empty(values)


@op(cost=lambda q, kv, k_rope, cos, sin: _cost(q, kv, k_rope, cos), fake=_empty_heads)
def mla_heads_forward(
    q_BTHd: Tensor, kv_BTHc: Tensor, k_rope_BTr: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, T, d] and values [B, H, T, v]."""
    q, k, v = _empty_heads(q_BTHd, kv_BTHc, k_rope_BTr, cos, sin)
    nope = q.shape[3] - k_rope_BTr.shape[2]
    q_BHTd, kv_BHTc = q_BTHd.transpose(1, 2), kv_BTHc.transpose(1, 2)
    q[..., :nope], q[..., nope:] = q_BHTd[..., :nope], _turned(q_BHTd[..., nope:], cos, sin)
    k[..., :nope], k[..., nope:] = kv_BHTc[..., :nope], _turned(k_rope_BTr, cos, sin).unsqueeze(1)
    return q, k, v.copy_(kv_BHTc[..., nope:])


def _empty_projections(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, d = dq.shape
    rope = 2 * cos.shape[1]
    return dq.new_empty(B, T, H, d), dq.new_empty(B, T, H, d - rope + dv.shape[3]), dq.new_empty(B, T, rope)


@op(
    cost=lambda dq, dk, dv, cos, sin: _cost(*_empty_projections(dq, dk, dv, cos, sin), cos),
    fake=_empty_projections,
)
def mla_heads_backward(
    dq_BHTd: Tensor, dk_BHTd: Tensor, dv_BHTv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three inputs; that of the shared rotary key is the sum over heads."""
    dq, dkv, dk_rope = _empty_projections(dq_BHTd, dk_BHTd, dv_BHTv, cos, sin)
    nope = dq.shape[3] - dk_rope.shape[2]
    q_BHTd, kv_BHTc = dq.transpose(1, 2), dkv.transpose(1, 2)
    q_BHTd[..., :nope] = dq_BHTd[..., :nope]
    _turn_back(q_BHTd[..., nope:], dq_BHTd[..., nope:], cos, sin)
    kv_BHTc[..., :nope], kv_BHTc[..., nope:] = dk_BHTd[..., :nope], dv_BHTv
    _turn_back(dk_rope, dk_BHTd[..., nope:].sum(1, dtype=cos.dtype), cos, sin)
    return dq, dkv, dk_rope


def _cost(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor) -> Cost:
    """Six operations a pair; everything is read and written once, the shared key written for every head."""
    B, T, H, _ = q.shape
    pairs = B * T * (H + 1) * cos.shape[1]
    return Cost(6 * pairs, 2 * size(q, kv, cos) + (1 + H) * size(k_rope))


class _MLAHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return mla_heads_forward(q, kv, k_rope, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return *mla_heads_backward(dq, dk, dv, *ctx.saved_tensors), None, None


def mla_heads(
    q_BTHd: Tensor, kv_BTHc: Tensor, k_rope_BTr: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, T, d] and values [B, H, T, v] of one dtype.

    q_BTHd: unturned queries; kv_BTHc: each head's key without its rotary part, then its value; k_rope_BTr: the keys'
    rotary part; cos, sin: of the angles [T, r/2]. Source: report section 2.1.1, equations 1 to 9.
    """
    return _MLAHeads.apply(q_BTHd, kv_BTHc, k_rope_BTr, cos, sin)
