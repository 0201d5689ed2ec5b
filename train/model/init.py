"""Initial values: every parameter is a function of (seed, global name, expert), so any layout starts from one model.

Normal with standard deviation 0.006 (report section 4.2; `initializer_range`), norm gains one, router biases zero.
"""

import hashlib

import torch
from torch import Tensor, nn

from parallel.experts.shard import share_of


@torch.no_grad()
def initialise(stage: nn.Module, seed: int, deviation: float) -> None:
    """Fill the parameters of a stage in place; drawn in FP32 on the CPU, then rounded to the parameter's dtype."""
    for name, parameter in stage.named_parameters():
        if share := share_of(parameter):
            for number, expert in enumerate(parameter, share.first):
                expert.copy_(_normal(expert.shape, deviation, f"{seed}/{name}/{number}"))
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(_normal(parameter.shape, deviation, f"{seed}/{name}"))


def _normal(shape: torch.Size, deviation: float, key: str) -> Tensor:
    """Normal values that depend on `key` only."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * deviation
