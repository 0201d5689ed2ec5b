"""A stacked expert parameter of which this rank holds consecutive experts."""

from typing import Self

import torch
from torch import Tensor, nn


class ExpertShard(nn.Parameter):
    """Experts `first` .. `first + len - 1` of a global parameter [experts, ...]: one rank's share."""

    first: int
    experts: int

    def __new__(cls, data: Tensor, first: int, experts: int) -> Self:
        """data: [local experts, ...]."""
        made = torch.Tensor._make_subclass(cls, data, True)
        made.first, made.experts = first, experts
        return made

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.experts, *self.shape[1:]

    @property
    def global_numel(self) -> int:
        """Elements of the whole parameter."""
        return self.experts * self[0].numel()

    @property
    def global_offset(self) -> int:
        """Where this share begins in the flattened whole."""
        return self.first * self[0].numel()
