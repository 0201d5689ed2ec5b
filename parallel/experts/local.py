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


def padded(order_R: Tensor, counts_E: Tensor, counts: list[int], align: int) -> tuple[Tensor, list[int]]:
    """`order_R`, which sorts rows by expert, with the rows of each expert padded to a multiple of `align`.

    counts_E, counts: rows of each expert, on the device and on the host. Returns order_P, with R (one beyond the last
    row) for rows of padding, and the padded counts.
    """
    if align == 1:
        return order_R, counts
    counts = [-(-each // align) * align for each in counts]
    padding_E = -counts_E % align
    shift_E = padding_E.cumsum(0) - padding_E
    rows = torch.arange(len(order_R), device=order_R.device)
    shift_R = torch.repeat_interleave(shift_E, counts_E, output_size=len(order_R))
    order_P = order_R.new_full((sum(counts),), len(order_R))
    return order_P.index_copy_(0, rows + shift_R, order_R), counts


def places(order_P: Tensor, rows: int) -> Tensor:
    """Where `order_P` puts each of so many rows."""
    place = order_P.new_empty(rows + 1)  # the last for those of padding
    return place.index_copy_(0, order_P, torch.arange(len(order_P), device=order_P.device))[:-1]


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
    """source_R and slot_TK describe one permutation: row r holds token source[r]; token t's k-th copy is slot[t, k].

    The source of a row of padding is T, one beyond the last token.
    """

    source_R: Tensor
    slot_TK: Tensor


class LocalExperts:
    """Dispatcher of an expert group of one, which gets as many rows as its tokens make."""

    def __init__(self, experts: int, align: int = 1) -> None:
        """align: each expert's number of rows becomes a multiple of it."""
        self.experts, self.align = experts, align
        self.log: list[Tag] = []
        self.traffic = Traffic()

    def issues(self, operation: str) -> Sequence[str]:
        """Nothing."""
        return ()

    def _turn(self, tag: Tag) -> Comm:
        return Comm(tag.operation, Nothing(), 0, 0, None)

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, LocalLayout]]:
        """Sort the tokens' copies by expert."""
        counts_E, order_R, source_R, slot_TK = sort_by_expert(experts_TK, self.experts)
        counts, weights_R = host_counts(counts_E), weights_TK.flatten()
        if self.align > 1:
            order_R, counts = padded(order_R, counts_E, counts, self.align)
            source_R, slot_TK = order_R // experts_TK.shape[1], places(order_R, slot_TK.numel()).view_as(slot_TK)
            weights_R = and_zeros(weights_R)
        yield self._turn(tag)
        layout = LocalLayout(counts, source_R, slot_TK)
        return self._gather(x_TD, layout), weights_R[order_R], layout

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
        return self._gather(dy_TD, layout)

    def _gather(self, x_TD: Tensor, layout: LocalLayout) -> Tensor:
        return gather_rows(x_TD if self.align == 1 else and_zeros(x_TD), layout.source_R, layout.slot_TK)


def and_zeros(rows: Tensor) -> Tensor:
    """The rows and one of zeros, for those of padding."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
