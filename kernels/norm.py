"""RMSNorm, forward and backward as one operator each.

y = x / sqrt(mean(x^2) + eps) * gain. Statistics and products are FP32 (FP64 for FP64 input), rounded once, at the end.
The reciprocal root of each row is all that backward keeps besides the input.

Legend: `T` rows (tokens), `D` width.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.ops import Cost, op, size, wide


@op(
    cost=lambda x_TD, gain_D, eps: Cost(4 * x_TD.numel(), 2 * size(x_TD) + size(gain_D)),
    fake=lambda x_TD, gain_D, eps: (
        torch.empty_like(x_TD),
        x_TD.new_empty(*x_TD.shape[:-1], 1, dtype=wide(x_TD.dtype)),
    ),
)
def rms_norm_forward(x_TD: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows, and 1 / sqrt(mean(x^2) + eps) of each."""
    x = x_TD.to(wide(x_TD.dtype))
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * scale).mul_(gain_D.to(x.dtype)).to(x_TD.dtype), scale


@op(
    cost=lambda dy_TD, x_TD, gain_D, scale_T1: Cost(9 * x_TD.numel(), 3 * size(x_TD) + size(gain_D, scale_T1)),
    fake=lambda dy_TD, x_TD, gain_D, scale_T1: (torch.empty_like(x_TD), torch.empty_like(gain_D)),
)
def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, gain_D: Tensor, scale_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the gain."""
    dtype = scale_T1.dtype
    dy, gain = dy_TD.to(dtype), gain_D.to(dtype)
    normed = x_TD.to(dtype) * scale_T1
    product = dy * normed
    d_gain = product.flatten(0, -2).sum(0)
    mean = product.mul_(gain).mean(-1, keepdim=True)
    dx = (dy * gain).sub_(normed.mul_(mean)).mul_(scale_T1)
    return dx.to(x_TD.dtype), d_gain.to(gain_D.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        y, scale = rms_norm_forward(x, gain, eps)
        ctx.save_for_backward(x, gain, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *rms_norm_backward(dy, *ctx.saved_tensors), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide the rows of `x` [..., D] by their root mean square and multiply by `weight` [D]; dtype of `x`."""
    return _RMSNorm.apply(x, weight, eps)
