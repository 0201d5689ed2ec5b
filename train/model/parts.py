"""The small parts that layers are made of: a linear that knows its precision, a norm, SwiGLU.

Parameter names are Hugging Face's: each part owns one `weight`.
"""

import torch
from torch import Tensor, nn

from kernels.linear import Numerics, linear
from kernels.norm import rms_norm
from kernels.swiglu import swiglu


class Linear(nn.Module):
    """y = x W^T without bias. Under FP8 all three GEMMs are block-scaled unless `fp8` is False (section 3.3)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        numerics: Numerics,
        *,
        fp8: bool = True,
        power_of_two: bool = False,
        wide_out: bool = False,
        recompute: str | None = None,
    ) -> None:
        """recompute: the choice under which its output is made again in backward."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=numerics.dtype))
        self.numerics, self.fp8, self.power_of_two, self.wide_out = numerics, fp8, power_of_two, wide_out
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to [..., outputs]."""
        options = {"fp8": self.fp8, "power_of_two": self.power_of_two, "wide_out": self.wide_out}
        return linear(x, (self.weight,), self.numerics, **options, recompute=self.recompute)[0]


def together(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several linears of one input, which is then quantised once."""
    first = layers[0]
    return linear(x, [layer.weight for layer in layers], first.numerics, fp8=first.fp8)


class Norm(nn.Module):
    """RMSNorm with a gain; statistics in FP32."""

    def __init__(self, width: int, eps: float, numerics: Numerics) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=numerics.dtype))
        self.eps, self.recompute = eps, numerics.recompute

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] to the same shape."""
        return self.recompute("norms", rms_norm, x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward network, and the shared expert."""

    def __init__(self, width: int, inner: int, numerics: Numerics, kept_as: str = "") -> None:
        """kept_as: the form, if there is one of this name, in which gate and up wait for backward."""
        super().__init__()
        self.recompute, self.kept_as = numerics.recompute, kept_as
        self.gate_proj = Linear(width, inner, numerics)
        self.up_proj = Linear(width, inner, numerics)
        self.down_proj = Linear(inner, width, numerics)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] to the same shape."""
        gate, up = self.recompute.kept_as(self.kept_as, together, x, self.gate_proj, self.up_proj)
        return self.down_proj(self.recompute("swiglu", swiglu, gate, up))
