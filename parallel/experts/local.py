"""Every expert is on this rank: dispatch is a permutation, and nothing is sent.

It still yields a communication (of no bytes) where another dispatcher would, so that passes take turns in the same way.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.permute import combine_rows, gather_rows
from parallel.experts.dispatch import Layout, Tag, Traffic
from parallel.passes import Comm, Effect


def by_key(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The stable permutation that sorts `keys`, of any shape: positions in their flattened order, and each one's place.

    No sizes are read, so the host does not wait.
    """
    order = torch.argsort(keys.flatten(), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place.view_as(keys)


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stable permutation that sorts a token's copies by expert.

    Returns counts_E (rows for each expert), order_R (position in the flattened [T, K] of each row), source_R (its
    token) and slot_TK (the row of each copy).
    """
    order_R, slot_TK = by_key(experts_TK)
    return count(experts_TK, experts), order_R, order_R // experts_TK.shape[1], slot_TK


def count(numbers: Tensor, upto: int) -> Tensor:
    """How often each of 0 .. upto-1 occurs (`bincount` would make the host wait for the device)."""
    flat = numbers.flatten()
    return flat.new_zeros(upto).scatter_add_(0, flat, torch.ones_like(flat))


def host_counts(counts: Tensor) -> list[int]:
    """Numbers of rows, read by the host: the only place where routing makes it wait for the device."""
    return counts.tolist()


class Nothing:
    """The work of a communication that is none."""

    def wait(self) -> None:
        """Nothing to wait for."""


@dataclass
class LocalLayout(Layout):
    """source_R and slot_TK describe one permutation: row r holds token source[r]; token t's k-th copy is slot[t, k]."""

    source_R: Tensor
    slot_TK: Tensor


class LocalExperts:
    """Dispatcher of an expert group of one."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.log: list[Tag] = []
        self.traffic = Traffic()

    def issues(self, operation: str) -> Sequence[str]:
        """Nothing."""
        return ()

    def _turn(self, tag: Tag) -> Comm:
        return Comm(tag.operation, Nothing(), 0, None)

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, LocalLayout]]:
        """Sort the tokens' copies by expert."""
        counts_E, order_R, source_R, slot_TK = sort_by_expert(experts_TK, self.experts)
        layout = LocalLayout(host_counts(counts_E), source_R, slot_TK)
        yield self._turn(tag)
        return gather_rows(x_TD, source_R, slot_TK), weights_TK.flatten()[order_R], layout

    def dispatch_backward(
        self, layout: LocalLayout, drows_RD: Tensor, dweights_R: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor]]:
        """Sum the gradients of a token's copies."""
        yield self._turn(tag)
        return combine_rows(drows_RD, layout.source_R, layout.slot_TK), dweights_R[layout.slot_TK]

    def combine(self, layout: LocalLayout, rows_RD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Sum a token's rows."""
        yield self._turn(tag)
        return combine_rows(rows_RD, layout.source_R, layout.slot_TK)

    def combine_backward(self, layout: LocalLayout, dy_TD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Copy a token's gradient to its rows."""
        yield self._turn(tag)
        return gather_rows(dy_TD, layout.source_R, layout.slot_TK)
