"""Node-limited dispatch: a token crosses to a node once, however many of that node's experts it chose.

      rank (node m, place l)  --across-->  rank (node n, place l)  --inside-->  rank (node n, place j) of the expert

The first hop goes over the slow link to the rank at the same place of each node that the token chose, with the token's
experts and routing weights; that rank hands a copy to each expert over the fast link. On the way back it adds a node's
rows up in FP32, so that one partial sum crosses for each (token, node), and partial sums are added in the order of
nodes. Hops are pipelined in chunks of the tokens: while a chunk makes its second hop, the next ones make their first.
Source: report section 3.2.2.

C chunks, N nodes, L ranks of a node, W ranks of the group; P copies of tokens that leave for nodes, Q that arrive and
are passed on as S rows for experts of this node, R rows that this rank's experts receive, B bytes of a row.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.permute import combine_forward, gather_forward
from parallel.experts.all_to_all import room, unsorted
from parallel.experts.dispatch import Layout, Limit, Tag, Traffic, no_limit
from parallel.experts.local import by_key, count, host_counts, padded
from parallel.experts.wire import Channel, encode, pack, received, row_bytes, unpack
from parallel.passes import Comm, Effect, HostSync


@dataclass(frozen=True)
class Hop:
    """One hop of one direction. gives[c][i], takes[c][i]: rows of chunk c to and from rank i. width: bytes of a row."""

    channel: Channel
    gives: list[list[int]]
    takes: list[list[int]]
    width: int


@dataclass
class NodeLayout(Layout):
    """The ways of all chunks' tokens, out and back.

    Of copy p that leaves: token_P. Of token t: copy_TM, its copies in the order of nodes (P where there are fewer). Of
    chunk c: source_S, the arrived copy that each row passed on is made of, and slot_QK, the row passed on for the k-th
    choice of each arrived copy (S where that expert is on another node). arrival_R sorts what comes by expert, and pads
    it (`padded`).
    """

    across_out: list[list[int]]
    across_in: list[list[int]]
    inside_out: list[list[int]]
    inside_in: list[list[int]]
    token_P: Tensor
    copy_TM: Tensor
    arrival_R: Tensor
    source_S: list[Tensor]
    slot_QK: list[Tensor]

    @property
    def rows(self) -> int:
        """Those that this rank's experts receive, without padding."""
        return sum(map(sum, self.inside_in))


Hops = Generator[Any, None, tuple[Tensor, list[tuple[Any, Tensor]]]]


class Relay:
    """The work of a communication of two hops: a thread passes on what arrives, while the host computes.

    hops: yields the works that it must have waited for to go on; returns what arrives, and the works that bring it
    with what they send. One thread runs the relays of a dispatcher one after the other, so their collectives come in
    one order on every rank.
    """

    arrived: Tensor

    def __init__(self, hops: Hops, thread: ThreadPoolExecutor) -> None:
        self._posted = thread.submit(run, hops)

    def wait(self) -> None:
        """Until all has arrived."""
        self.arrived, last = self._posted.result()
        while last:
            work, _ = last.pop()
            work.wait()


class StreamRelay:
    """The same on a GPU: all is posted at once, and a stream of its own waits from hop to hop."""

    def __init__(self, hops: Hops, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.arrived, last = run(hops)
            for work, _ in last:
                work.wait()
            self._done = stream.record_event()

    def wait(self) -> None:
        """The current stream waits until all has arrived."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        self.arrived.record_stream(stream)


@torch.no_grad()
def run(hops: Hops) -> tuple[Tensor, list[tuple[Any, Tensor]]]:
    """Exhaust the hops."""
    while True:
        try:
            next(hops).wait()
        except StopIteration as end:
            return end.value


class Hierarchical:
    """Dispatcher over an expert group of N nodes with L ranks each; rank g = n * L + l holds experts as `AllToAll`."""

    def __init__(
        self,
        experts: int,
        group: dist.ProcessGroup,
        across: dist.ProcessGroup,
        inside: dist.ProcessGroup,
        chunks: int = 1,
        fp8: bool = False,
        align: int = 1,
        limit: Limit = no_limit,
    ) -> None:
        """group: all ranks. across: those at this rank's place of each node. inside: those of this rank's node.

        fp8: rows go to their experts in FP8. align: each expert's number of rows becomes a multiple of it. limit: is
        told of rows that are going to arrive, or to pass through.
        """
        self.experts, self.chunks, self.fp8, self.align, self.limit = experts, chunks, fp8, align, limit
        self.nodes, self.node = across.size(), across.rank()
        self.places, self.place = inside.size(), inside.rank()
        self.in_node, self.in_rank = experts // self.nodes, experts // group.size()
        self.log: list[Tag] = []
        self.traffic = Traffic()
        self.all = Channel(group, [n for n in range(self.nodes) for _ in range(self.places)], self.traffic)
        self.across = Channel(across, range(self.nodes), self.traffic, "across")
        self.inside = Channel(inside, [self.node] * self.places, self.traffic, "inside")
        self.thread = ThreadPoolExecutor(1, "relay")

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The GPU's part of what the thread does for a CPU."""
        return torch.cuda.Stream()

    def issues(self, operation: str) -> Sequence[str]:
        """Of all chunks the first hop, then the second; before a dispatch the numbers of rows."""
        out = operation in ("dispatch", "combine.B")
        hops = [f"{operation}.{name}" for name in (("across", "inside") if out else ("inside", "across"))]
        each = [hop for hop in hops for _ in range(self.chunks)]
        return ["counts", *each] if operation == "dispatch" else each

    # -- the four directions
    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, NodeLayout]]:
        """Tokens cross to nodes with their routing, and go on to the ranks of their experts."""
        layout = yield from self._agree(experts_TK, tag)
        values, choices_TK = encode(x_TD, self.fp8), experts_TK.to(torch.int16)
        payload = row_bytes(*values)
        first = self._out(layout, payload + row_bytes(choices_TK, weights_TK))
        second = self._on(layout, payload + weights_TK.element_size())

        def pass_on(chunk: int, copies_QB: Tensor) -> Tensor:
            rows, routing = copies_QB[:-1].split([payload, first.width - payload], 1)
            choices_QK, weights_QK = unpack(routing.contiguous(), (choices_TK, weights_TK))
            order_S, slot_QK = self._rows_of_node(choices_QK.long(), sum(layout.inside_out[chunk]))
            source_S = order_S // weights_TK.shape[1]
            layout.source_S.append(source_S)
            layout.slot_QK.append(slot_QK)
            return pack(rows.index_select(0, source_S), weights_QK.flatten()[order_S])

        copies = pack(*values, choices_TK, weights_TK)
        rows = yield from self._two_hops(gather_forward(copies, layout.token_P), first, pass_on, second, tag)
        rows_RD, weights_R = received(rows, layout.arrival_R, values, x_TD.dtype, weights_TK[:, 0])
        return rows_RD, weights_R, layout

    def combine_backward(self, layout: NodeLayout, dy_TD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Gradients go where the rows had gone."""
        values = encode(dy_TD, self.fp8)
        hops = [hop(layout, row_bytes(*values)) for hop in (self._out, self._on)]

        def pass_on(chunk: int, copies_QB: Tensor) -> Tensor:
            return gather_forward(copies_QB, layout.source_S[chunk])

        copies = gather_forward(pack(*values), layout.token_P)
        rows = yield from self._two_hops(copies, hops[0], pass_on, hops[1], tag)
        (drows_RD,) = received(rows, layout.arrival_R, values, dy_TD.dtype)
        return drows_RD

    def combine(self, layout: NodeLayout, rows_RD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """A node's rows of a token are summed in the order of its choices, then the sums in the order of nodes."""
        hops = [hop(layout, row_bytes(rows_RD)) for hop in (self._on, self._out)]

        def add_up(chunk: int, rows_SB: Tensor) -> Tensor:
            (rows,) = unpack(rows_SB, [rows_RD])
            return pack(combine_forward(rows, layout.slot_QK[chunk]))

        leaving = unsorted(pack(rows_RD), layout.arrival_R, layout.rows)
        arrived = yield from self._two_hops(leaving, back(hops[0]), add_up, back(hops[1]), tag)
        (sums,) = unpack(arrived, [rows_RD])
        return combine_forward(sums, layout.copy_TM)

    def dispatch_backward(
        self, layout: NodeLayout, drows_RD: Tensor, dweights_R: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor]]:
        """As `combine`, and the gradients of a token's routing weights travel with the sums."""
        like = drows_RD, dweights_R
        dweights_TK = dweights_R.new_empty(0, layout.slot_QK[0].shape[1])
        first, second = self._on(layout, row_bytes(*like)), self._out(layout, row_bytes(drows_RD, dweights_TK))

        def add_up(chunk: int, rows_SB: Tensor) -> Tensor:
            drows, dweights = unpack(rows_SB, like)
            slot_QK = layout.slot_QK[chunk]
            return pack(combine_forward(drows, slot_QK), dweights[slot_QK])

        leaving = unsorted(pack(*like), layout.arrival_R, layout.rows)
        arrived = yield from self._two_hops(leaving, back(first), add_up, back(second), tag)
        sums, dweights = unpack(arrived, (drows_RD, dweights_TK))
        return combine_forward(sums, layout.copy_TM), combine_forward(dweights, layout.copy_TM)

    # -- the layout
    def _agree(self, experts_TK: Tensor, tag: Tag) -> Generator[Effect, None, NodeLayout]:
        """Tell every rank what its node is going to get, and work out who sends how much to whom on either hop."""
        (T, K), device = experts_TK.shape, experts_TK.device
        C, N, L = self.chunks, self.nodes, self.places
        chunk_T = torch.arange(T, device=device) * C // max(T, 1)
        reached_TN = torch.zeros(T, N, dtype=torch.bool, device=device).scatter_(1, experts_TK // self.in_node, True)
        copies_CN = count(
            torch.where(reached_TN, chunk_T[:, None] * N + torch.arange(N, device=device), C * N), C * N + 1
        )
        rows_CE = count(chunk_T[:, None] * self.experts + experts_TK, C * self.experts)
        table = [copies_CN[:-1].view(C, N, 1), rows_CE.view(C, N, self.in_node)]
        table_NCX = torch.cat(table, 2).transpose(0, 1)  # of each node: its copies, and the rows of its experts
        leaving = table_NCX.repeat_interleave(L, 0).flatten(1)
        arriving = torch.empty_like(leaving)
        even = [1] * (N * L)
        self.log.append(replace(tag, operation="counts"))
        yield HostSync("counts", self.all.post("counts", leaving, even, even, arriving))

        seen_NLCX = arriving.view(N, L, C, 1 + self.in_node)  # what each rank sends to this node
        through_CX = seen_NLCX[:, self.place, :, 1:].sum(0)  # and which part of it comes through this rank
        mine_NLCE = seen_NLCX[..., 1 + self.place * self.in_rank :][..., : self.in_rank]
        hops = (
            table_NCX[:, :, 0].t(),
            seen_NLCX[:, self.place, :, 0].t(),
            through_CX.view(C, L, self.in_rank).sum(2),
            mine_NLCE.sum((0, 3)).t(),
        )
        read = host_counts(torch.cat([*(hop.flatten() for hop in hops), mine_NLCE.sum((0, 1, 2))]))
        across_out, across_in, inside_out, inside_in, (counts,) = _cut(
            read, [(C, N), (C, N), (C, L), (C, L), (1, self.in_rank)]
        )
        self.limit(sum(counts), "receive", tag)
        self.limit(sum(map(sum, inside_out)), "pass on", tag)

        P = sum(map(sum, across_out))
        order, place_NT = by_key(torch.where(reached_TN.t(), chunk_T, C))  # by chunk, node, token
        nodes_TM = torch.argsort((~reached_TN).to(torch.uint8), dim=1, stable=True)[:, : min(N, K)]
        copy_TM = place_NT.t().gather(1, nodes_TM).clamp_(max=P)
        # Rows come by (chunk, place of the rank that passes them on, expert, node of the token), and are wanted by
        # (expert, rank of the token, chunk): the order of tokens and choices within those is right already.
        wanted_ENLC = torch.arange(mine_NLCE.numel(), device=device).view(self.in_rank, N, L, C)
        blocks = mine_NLCE.permute(2, 1, 3, 0).flatten()
        block_R = wanted_ENLC.permute(3, 2, 0, 1).flatten().repeat_interleave(blocks, output_size=sum(counts))
        arrival_R, counts = padded(torch.argsort(block_R, stable=True), mine_NLCE.sum((0, 1, 2)), counts, self.align)
        return NodeLayout(
            counts,
            across_out,
            across_in,
            inside_out,
            inside_in,
            order[:P] % max(T, 1),
            copy_TM,
            arrival_R,
            [],
            [],
        )

    def _rows_of_node(self, choices_QK: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """The S choices that are experts of this node, sorted by expert, and the place of each (S: on another node)."""
        expert_QK = choices_QK - self.node * self.in_node
        here = (expert_QK >= 0) & (expert_QK < self.in_node)
        order, place_QK = by_key(torch.where(here, expert_QK, self.in_node))
        return order[:S], place_QK.clamp_(max=S)

    # -- communication
    def _out(self, layout: NodeLayout, width: int) -> Hop:
        return Hop(self.across, layout.across_out, layout.across_in, width)

    def _on(self, layout: NodeLayout, width: int) -> Hop:
        return Hop(self.inside, layout.inside_out, layout.inside_in, width)

    def _two_hops(
        self, leaving: Tensor, first: Hop, between: Callable[[int, Tensor], Tensor], second: Hop, tag: Tag
    ) -> Generator[Effect, None, Tensor]:
        """Rows make the first hop, become others by `between(chunk, what arrived)`, and make the second.

        A row of zeros follows what arrives on either hop: it stands for a copy that a token does not have.
        """
        for hop in (first, second):
            self.log.extend([replace(tag, operation=f"{tag.operation}.{hop.channel.name}")] * self.chunks)
        hops = _relay(leaving, first, between, second, tag.operation)
        relay = StreamRelay(hops, self.stream) if leaving.is_cuda else Relay(hops, self.thread)
        sent = [hop.channel.leaving(list(map(sum, zip(*hop.gives, strict=True))), hop.width) for hop in (first, second)]
        inside, across = map(sum, zip(*sent, strict=True))
        yield Comm(tag.operation, relay, inside, across, self.all.group)
        return relay.arrived


def _relay(leaving: Tensor, first: Hop, between: Callable[[int, Tensor], Tensor], second: Hop, operation: str) -> Hops:
    """The hops of all chunks; see `Relay`."""
    halfway, works = [], []
    for part, gives, takes in zip(_parts(leaving, first.gives), first.gives, first.takes, strict=True):
        halfway.append(room(leaving, sum(takes), first.width))
        works.append(first.channel.post(operation, part, gives, takes, halfway[-1][:-1]))
    arrived = room(leaving, sum(map(sum, second.takes)), second.width)
    rest = []
    for chunk, part in enumerate(_parts(arrived[:-1], second.takes)):
        yield works[chunk]
        passed_on = between(chunk, halfway[chunk])
        work = second.channel.post(operation, passed_on, second.gives[chunk], second.takes[chunk], part)
        rest.append((work, passed_on))
    return arrived, rest


def back(hop: Hop) -> Hop:
    """The same way in the other direction."""
    return replace(hop, gives=hop.takes, takes=hop.gives)


def _parts(rows: Tensor, numbers: Sequence[Sequence[int]]) -> list[Tensor]:
    """The rows of each chunk."""
    return [rows[start:end] for start, end in pairwise(accumulate(map(sum, numbers), initial=0))]


def _cut(numbers: list[int], shapes: Sequence[tuple[int, int]]) -> list[list[list[int]]]:
    """Tables of these shapes, one after the other in `numbers`."""
    tables, start = [], 0
    for rows, columns in shapes:
        tables.append([numbers[start + row * columns :][:columns] for row in range(rows)])
        start += rows * columns
    return tables
