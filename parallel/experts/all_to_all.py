"""Flat all-to-all: one copy of a token for each expert that it chose goes straight to that expert's rank.

Uneven, asynchronous, never dropping a token. Ranks first tell each other how many rows to expect (the one read by the
host), then rows and routing weights travel packed in one buffer of bytes. An exchange in which this rank has nothing to
send is still issued: the group's ranks issue the same collectives in the same order.
"""

import math
from collections.abc import Generator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.permute import combine_rows, gather_rows
from parallel.experts.dispatch import Layout, Tag
from parallel.experts.local import host_counts, sort_by_expert
from parallel.passes import Comm, Effect, HostSync


class AllToAll:
    """Dispatcher over an expert group; rank g of the group holds experts g*E/size up to (g+1)*E/size."""

    def __init__(self, experts: int, group: dist.ProcessGroup) -> None:
        self.experts, self.group, self.size = experts, group, group.size()
        self.log: list[Tag] = []

    # -- the four directions
    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, Layout]]:
        """Rows go to the ranks of their experts."""
        counts_E, order_R, source_R, slot_TK = sort_by_expert(experts_TK, self.experts)
        sends, receives, counts, arrival_R = yield from self._agree(counts_E, tag)
        layout = Layout(counts, source_R, slot_TK, sends, receives, arrival_R)
        leaving = gather_rows(x_TD, source_R, slot_TK), weights_TK.flatten()[order_R]
        rows_RD, weights_R = yield from self._exchange(leaving, sends, receives, tag)
        return rows_RD[arrival_R], weights_R[arrival_R], layout

    def dispatch_backward(
        self, layout: Layout, drows_RD: Tensor, dweights_R: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor]]:
        """Gradients of rows and weights return to the tokens' rank and are summed there."""
        leaving = _unsorted(drows_RD, layout), _unsorted(dweights_R, layout)
        drows, dweights = yield from self._exchange(leaving, layout.receives, layout.sends, tag)
        return combine_rows(drows, layout.source_R, layout.slot_TK), dweights[layout.slot_TK]

    def combine(self, layout: Layout, rows_RD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Rows return to the tokens' rank and are summed there."""
        (rows,) = yield from self._exchange((_unsorted(rows_RD, layout),), layout.receives, layout.sends, tag)
        return combine_rows(rows, layout.source_R, layout.slot_TK)

    def combine_backward(self, layout: Layout, dy_TD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Gradients go where the rows had gone."""
        leaving = (gather_rows(dy_TD, layout.source_R, layout.slot_TK),)
        (drows,) = yield from self._exchange(leaving, layout.sends, layout.receives, tag)
        return drows[layout.arrival_R]

    # -- communication
    def _agree(
        self, counts_E: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[list[int], list[int], list[int], Tensor]]:
        """Exchange row counts: (rows sent to each rank, received from each, of each local expert, arrival order)."""
        self.log.append(Tag("counts", tag.stage, tag.microbatch, tag.layer))
        local = self.experts // self.size
        arriving = torch.empty_like(counts_E)  # [source rank, local expert], flattened
        work = dist.all_to_all_single(arriving, counts_E, group=self.group, async_op=True)
        yield HostSync("counts", work)
        by_rank = arriving.view(self.size, local)
        totals = [counts_E.view(self.size, local).sum(1), by_rank.sum(1), by_rank.sum(0)]
        read = host_counts(torch.cat(totals))
        sends, receives, counts = read[: self.size], read[self.size : 2 * self.size], read[2 * self.size :]
        expert_of_block = torch.arange(local, device=arriving.device).repeat(self.size)
        expert_R = torch.repeat_interleave(expert_of_block, arriving, output_size=sum(receives))
        return sends, receives, counts, torch.argsort(expert_R, stable=True)

    def _exchange(
        self, tensors: Sequence[Tensor], gives: list[int], takes: list[int], tag: Tag
    ) -> Generator[Effect, None, list[Tensor]]:
        """Rows of several tensors (equal in number) to and from every rank, as one buffer of bytes a row."""
        self.log.append(tag)
        leaving = _pack(tensors)
        arriving = leaving.new_empty(sum(takes), leaving.shape[1])
        work = dist.all_to_all_single(arriving, leaving, takes, gives, group=self.group, async_op=True)
        yield Comm(tag.operation, work, leaving.numel(), self.group)
        return _unpack(arriving, tensors)


def _unsorted(rows: Tensor, layout: Layout) -> Tensor:
    """Rows sorted by expert, put back into the order in which they arrived."""
    assert layout.arrival_R is not None
    return torch.empty_like(rows).index_copy_(0, layout.arrival_R, rows)


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [R, ...] side by side as bytes [R, bytes of a row]; one tensor alone is only viewed."""
    pieces = [tensor.contiguous().view(len(tensor), _width(tensor)).view(torch.uint8) for tensor in tensors]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _unpack(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that `_pack` put together, with the number of rows that arrived."""
    sizes = [_width(tensor) * tensor.element_size() for tensor in like]
    pieces = [rows]
    if len(like) > 1:  # cloned: of one row or none, `contiguous` would keep an offset that no wider dtype can view
        pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in rows.split(sizes, 1)]
    return [
        piece.view(tensor.dtype).view(len(rows), *tensor.shape[1:]) for piece, tensor in zip(pieces, like, strict=True)
    ]


def _width(tensor: Tensor) -> int:
    """Elements in a row."""
    return math.prod(tensor.shape[1:])
