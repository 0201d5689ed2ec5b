"""SwiGLU, silu(gate) * up, with the routing weight of each row folded in.

For routed experts the weight multiplies the activation before the down-projection (and before its FP8 cast), so that
combining experts is a plain sum; its gradient is the sum over channels of the incoming gradient times the unweighted
activation. Products are FP32 (FP64 for FP64 input), rounded once, at the end; backward recomputes from the two inputs.

Legend: `R` rows, `F` width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.ops import Cost, op, size, wide


@op(
    cost=lambda gate_RF, up_RF, weights_R: Cost(7 * gate_RF.numel(), 3 * size(gate_RF)),
    fake=lambda gate_RF, up_RF, weights_R: torch.empty_like(gate_RF),
)
def swiglu_forward(gate_RF: Tensor, up_RF: Tensor, weights_R: Tensor | None) -> Tensor:
    """silu(gate) * up [* weight of the row]."""
    dtype = wide(gate_RF.dtype)
    y = silu(gate_RF.to(dtype)).mul_(up_RF.to(dtype))
    if weights_R is not None:
        y *= weights_R.unsqueeze(-1)
    return y.to(gate_RF.dtype)


@op(
    cost=lambda dy_RF, gate_RF, up_RF, weights_R: Cost(16 * gate_RF.numel(), 5 * size(gate_RF)),
    fake=lambda dy_RF, gate_RF, up_RF, weights_R: (
        torch.empty_like(gate_RF),
        torch.empty_like(up_RF),
        gate_RF.new_empty(0) if weights_R is None else torch.empty_like(weights_R),
    ),
)
def swiglu_backward(
    dy_RF: Tensor, gate_RF: Tensor, up_RF: Tensor, weights_R: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and the rows' weights (empty without weights)."""
    dtype = wide(gate_RF.dtype)
    dy, gate, up = dy_RF.to(dtype), gate_RF.to(dtype), up_RF.to(dtype)
    d_silu, silu_gate = dy * up, silu(gate)
    d_weights = gate_RF.new_empty(0)
    if weights_R is not None:
        d_weights = (d_silu * silu_gate).sum(-1).to(weights_R.dtype)
        weights = weights_R.unsqueeze(-1)
        d_silu, dy = d_silu.mul_(weights), dy * weights
    d_gate = torch.ops.aten.silu_backward(d_silu, gate)
    return d_gate.to(gate_RF.dtype), silu_gate.mul_(dy).to(up_RF.dtype), d_weights


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weights)
        return swiglu_forward(gate, up, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weights = ctx.saved_tensors
        d_gate, d_up, d_weights = swiglu_backward(dy, gate, up, weights)
        return d_gate, d_up, None if weights is None else d_weights


def swiglu(gate: Tensor, up: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """silu(gate) * up for `gate`, `up` [..., F] of one dtype; with `weights_R` [...], each row times its weight."""
    return _SwiGLU.apply(gate, up, weights_R)
