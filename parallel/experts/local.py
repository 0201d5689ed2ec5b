"""Every expert is on this rank: dispatch is a permutation, and nothing is sent.

It still yields a communication (of no bytes) where another dispatcher would, so that passes take turns in the same way.
"""

from collections.abc import Generator

import torch
from torch import Tensor

from kernels.permute import combine_rows, gather_rows
from parallel.experts.dispatch import Layout, Tag
from parallel.passes import Comm, Effect


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stable permutation that sorts a token's copies by expert.

    Returns counts_E (rows for each expert), order_R (position in the flattened [T, K] of each row), source_R (its
    token) and slot_TK (the row of each copy).
    """
    flat = experts_TK.flatten()
    order_R = torch.argsort(flat, stable=True)
    slot = torch.empty_like(order_R)
    slot[order_R] = torch.arange(len(order_R), device=order_R.device)
    counts_E = torch.bincount(flat, minlength=experts)
    return counts_E, order_R, order_R // experts_TK.shape[1], slot.view_as(experts_TK)


def host_counts(counts: Tensor) -> list[int]:
    """Numbers of rows, read by the host: the only place where routing makes it wait for the device."""
    return counts.tolist()


class Nothing:
    """The work of a communication that is none."""

    def wait(self) -> None:
        """Nothing to wait for."""


class LocalExperts:
    """Dispatcher of an expert group of one."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.log: list[Tag] = []

    def _turn(self, tag: Tag) -> Comm:
        return Comm(tag.operation, Nothing(), 0, None)

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, Layout]]:
        """Sort the tokens' copies by expert."""
        counts_E, order_R, source_R, slot_TK = sort_by_expert(experts_TK, self.experts)
        layout = Layout(host_counts(counts_E), source_R, slot_TK, [], [])
        yield self._turn(tag)
        return gather_rows(x_TD, source_R, slot_TK), weights_TK.flatten()[order_R], layout

    def dispatch_backward(
        self, layout: Layout, drows_RD: Tensor, dweights_R: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor]]:
        """Sum the gradients of a token's copies."""
        yield self._turn(tag)
        return combine_rows(drows_RD, layout.source_R, layout.slot_TK), dweights_R[layout.slot_TK]

    def combine(self, layout: Layout, rows_RD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Sum a token's rows."""
        yield self._turn(tag)
        return combine_rows(rows_RD, layout.source_R, layout.slot_TK)

    def combine_backward(self, layout: Layout, dy_TD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Copy a token's gradient to its rows."""
        yield self._turn(tag)
        return gather_rows(dy_TD, layout.source_R, layout.slot_TK)
