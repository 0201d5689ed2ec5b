"""The experts of a MoE layer: those routed to, held as stacked weights, and the shared expert that every token visits.

Routing weights multiply inside SwiGLU, before the down-projection, so that combining a token's rows is a plain sum.
Under FP8 what SwiGLU reads waits for backward in FP8, and its output is made again from that (report section 3.3.3).
R rows sorted by local expert, E local experts, D model width, F expert width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from kernels.linear import Numerics, grouped_linear
from kernels.swiglu import swiglu
from parallel.experts.shard import expert_shard
from train.model.config import ModelConfig
from train.model.parts import SwiGLU
from train.model.router import Router


class Experts(nn.Module):
    """The routed experts `first` .. `first + local - 1` of a layer: [E, 2F, D] (gate above up) and [E, D, F]."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, config: ModelConfig, numerics: Numerics, first: int, local: int) -> None:
        super().__init__()
        self.numerics = numerics
        width, inner = config.hidden_size, config.moe_intermediate_size
        stacked = {"gate_up_proj": (local, 2 * inner, width), "down_proj": (local, width, inner)}
        for name, shape in stacked.items():
            held = torch.empty(shape, dtype=numerics.dtype)
            self.register_parameter(name, expert_shard(held, first, config.n_routed_experts))

    def forward(self, rows_RD: Tensor, weights_R: Tensor, counts: list[int]) -> Tensor:
        """Each row through its expert, times its routing weight: [R, D]."""
        project = partial(grouped_linear, power_of_two=True)
        operands = rows_RD, self.gate_up_proj, counts, self.numerics
        gate_up = self.numerics.recompute.kept_as("swiglu input", project, *operands)
        gate, up = gate_up.chunk(2, -1)
        inner = self.numerics.recompute("swiglu", swiglu, gate, up, weights_R)
        return grouped_linear(inner, self.down_proj, counts, self.numerics, power_of_two_grad=True)


class MoE(nn.Module):
    """Router, routed experts and shared expert of one layer."""

    def __init__(self, config: ModelConfig, numerics: Numerics, first: int, local: int) -> None:
        super().__init__()
        self.gate = Router(config, numerics)
        self.experts = Experts(config, numerics, first, local)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, numerics, "swiglu input")
            if config.n_shared_experts
            else None
        )
