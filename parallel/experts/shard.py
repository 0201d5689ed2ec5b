"""A stacked expert parameter of which this rank holds consecutive experts."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Share:
    """Which part of a global parameter [experts, ...] a rank holds: from expert `first` on, as many as it has."""

    first: int
    experts: int


def expert_shard(data: Tensor, first: int, experts: int) -> nn.Parameter:
    """Experts `first` .. `first + len - 1` of a global parameter [experts, ...]; data: [local experts, ...]."""
    parameter: Any = nn.Parameter(data)
    parameter.share = Share(first, experts)
    return parameter


def share_of(parameter: Tensor) -> Share | None:
    """The share that a parameter is; None for one that every rank holds whole."""
    return getattr(parameter, "share", None)


def global_span(parameter: Tensor) -> tuple[int, int]:
    """(where it begins, how long it is) in elements of the flattened global parameter."""
    share = share_of(parameter)
    if share is None:
        return 0, parameter.numel()
    each = parameter[0].numel()
    return share.first * each, share.experts * each


def global_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    share = share_of(parameter)
    return tuple(parameter.shape) if share is None else (share.experts, *parameter.shape[1:])
