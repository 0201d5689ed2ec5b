"""Flat all-to-all: one copy of a token for each expert that it chose goes straight to that expert's rank.

Uneven, asynchronous, never dropping a token. Ranks first tell each other how many rows to expect (the one read by the
host), then rows and routing weights travel packed in one buffer of bytes. An exchange in which this rank has nothing to
send is still issued: the group's ranks issue the same collectives in the same order.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.permute import combine_rows, gather_rows
from parallel.experts.dispatch import Limit, Tag, Traffic, issues_once, no_limit
from parallel.experts.local import LocalLayout, host_counts, padded, sort_by_expert
from parallel.experts.wire import Channel, encode, pack, received, unpack
from parallel.passes import Comm, Effect, HostSync


@dataclass
class FlatLayout(LocalLayout):
    """sends, receives: rows to and from each rank of the group. arrival_R: the order that sorts what came by expert,
    and pads it (`padded`)."""

    sends: list[int]
    receives: list[int]
    arrival_R: Tensor


class AllToAll:
    """Dispatcher over an expert group; rank g of the group holds experts g*E/size up to (g+1)*E/size."""

    def __init__(
        self,
        experts: int,
        group: dist.ProcessGroup,
        nodes: Sequence[int] | None = None,
        fp8: bool = False,
        align: int = 1,
        limit: Limit = no_limit,
    ) -> None:
        """nodes: of each rank of the group, one for all unless told. fp8: rows go to their experts in FP8.

        align: each expert's number of rows becomes a multiple of it. limit: is told of rows that are going to arrive.
        """
        self.experts, self.size, self.fp8, self.align, self.limit = experts, group.size(), fp8, align, limit
        self.log: list[Tag] = []
        self.traffic = Traffic()
        self.channel = Channel(group, nodes or [0] * self.size, self.traffic)

    def issues(self, operation: str) -> Sequence[str]:
        """One exchange; before a dispatch also that of the numbers of rows."""
        return issues_once(operation)

    # -- the four directions
    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, FlatLayout]]:
        """Rows go to the ranks of their experts."""
        counts_E, order_R, source_R, slot_TK = sort_by_expert(experts_TK, self.experts)
        sends, receives, counts, arrival_R = yield from self._agree(counts_E, tag)
        layout = FlatLayout(counts, source_R, slot_TK, sends, receives, arrival_R)
        values, weights_R = encode(x_TD, self.fp8), weights_TK.flatten()[order_R]
        rows = pack(gather_rows(pack(*values), source_R, slot_TK), weights_R)
        rows = yield from self._exchange(rows, sends, receives, tag)
        rows_RD, weights_R = received(rows, arrival_R, values, x_TD.dtype, weights_R)
        return rows_RD, weights_R, layout

    def dispatch_backward(
        self, layout: FlatLayout, drows_RD: Tensor, dweights_R: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor]]:
        """Gradients of rows and weights return to the tokens' rank and are summed there."""
        rows = unsorted(pack(drows_RD, dweights_R), layout.arrival_R, sum(layout.receives))
        rows = yield from self._exchange(rows, layout.receives, layout.sends, tag)
        drows, dweights = unpack(rows, (drows_RD, dweights_R))
        return combine_rows(drows, layout.source_R, layout.slot_TK), dweights[layout.slot_TK]

    def combine(self, layout: FlatLayout, rows_RD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Rows return to the tokens' rank and are summed there."""
        rows = unsorted(pack(rows_RD), layout.arrival_R, sum(layout.receives))
        rows = yield from self._exchange(rows, layout.receives, layout.sends, tag)
        (rows,) = unpack(rows, [rows_RD])
        return combine_rows(rows, layout.source_R, layout.slot_TK)

    def combine_backward(self, layout: FlatLayout, dy_TD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Gradients go where the rows had gone."""
        values = encode(dy_TD, self.fp8)
        rows = gather_rows(pack(*values), layout.source_R, layout.slot_TK)
        rows = yield from self._exchange(rows, layout.sends, layout.receives, tag)
        (drows_RD,) = received(rows, layout.arrival_R, values, dy_TD.dtype)
        return drows_RD

    # -- communication
    def _agree(
        self, counts_E: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[list[int], list[int], list[int], Tensor]]:
        """Exchange row counts: (rows sent to each rank, received from each, of each local expert, arrival order).

        The last two with padding.
        """
        local = self.experts // self.size
        arriving = torch.empty_like(counts_E)  # [source rank, local expert], flattened
        even = [local] * self.size
        self.log.append(replace(tag, operation="counts"))
        work = self.channel.post("counts", counts_E, even, even, arriving)
        yield HostSync("counts", work)
        by_rank = arriving.view(self.size, local)
        arriving_E = by_rank.sum(0)
        read = host_counts(torch.cat([counts_E.view(self.size, local).sum(1), by_rank.sum(1), arriving_E]))
        sends, receives, counts = read[: self.size], read[self.size : 2 * self.size], read[2 * self.size :]
        self.limit(sum(receives), "receive", tag)
        expert_of_block = torch.arange(local, device=arriving.device).repeat(self.size)
        expert_R = torch.repeat_interleave(expert_of_block, arriving, output_size=sum(receives))
        arrival_R, counts = padded(torch.argsort(expert_R, stable=True), arriving_E, counts, self.align)
        return sends, receives, counts, arrival_R

    def _exchange(
        self, leaving: Tensor, gives: list[int], takes: list[int], tag: Tag
    ) -> Generator[Effect, None, Tensor]:
        """Rows of bytes to and from every rank; a row of zeros follows what arrives."""
        arriving = room(leaving, sum(takes), leaving.shape[1])
        self.log.append(tag)
        work = self.channel.post(tag.operation, leaving, gives, takes, arriving[:-1])
        yield Comm(tag.operation, work, *self.channel.leaving(gives, leaving.shape[1]), self.channel.group)
        return arriving


def room(like: Tensor, rows: int, width: int) -> Tensor:
    """Memory for rows of bytes, and a row of zeros: it stands for padding, or for what there is none of."""
    made = like.new_empty(rows + 1, width)
    made[-1].zero_()
    return made


def unsorted(rows: Tensor, arrival_R: Tensor, count: int) -> Tensor:
    """Rows sorted by expert, put back into the order in which so many arrived; padding stays behind."""
    return rows.new_empty(count + 1, rows.shape[1]).index_copy_(0, arrival_R, rows)[:-1]
