"""What DeepEP's documentation promises of `Buffer`, over gloo on a CPU, refusing what it does not allow.

Sources: docstrings of deep_ep/buffer.py (version 1.2.1), the checks in the C++ beneath, docs/legacy.md of version 2.
What arrives is garbage until its event has been waited for. `installed` lets `import deep_ep` find it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
LANES = 32 * 16  # bytes of a token that a combine takes at once
HALF_TOKEN = 8192 - 8  # bytes that a dispatch can hold


class EventOverlap:
    """`then` makes valid what the call has returned."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.then: Callable[[], None] | None = then

    def current_stream_wait(self) -> None:
        if self.then:
            self.then()
        self.then = None


class Config:
    """Sizes of buffers."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks in RANKS
        return 128 * num_ranks * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks in RANKS
        return 0 if num_ranks <= Buffer.nvl_peers else 128 * num_ranks * hidden_bytes


class Handle(tuple):
    """Opaque: (buffer, rows of x to each rank in order, tokens to and from each rank, tokens of this rank)."""


class Buffer:
    """Of a group of gloo ranks, `nvl_peers` to a node."""

    num_sms = 20
    nvl_peers = 8
    host_waits = 0

    def __init__(
        self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, *, num_qps_per_rank: int = 24
    ) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        assert self.size in RANKS and (self.size <= self.nvl_peers or self.size % self.nvl_peers == 0)
        self.nodes = max(self.size // self.nvl_peers, 1)
        assert (num_rdma_bytes > 0) == (self.nodes > 1) and num_nvl_bytes % 128 == num_rdma_bytes % 128 == 0
        assert num_qps_per_rank >= self.num_sms, "a queue pair for each SM"
        self.num_nvl_bytes = num_nvl_bytes
        sizes: list[Any] = [None] * self.size
        dist.all_gather_object(sizes, (num_nvl_bytes, num_rdma_bytes), group)
        assert len(set(sizes)) == 1

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in RANKS
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: EventOverlap | None = None, async_finish: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        assert topk_idx.dtype == torch.int64 and topk_idx.dim() == 2 and topk_idx.is_contiguous()
        assert previous_event is None or isinstance(previous_event, EventOverlap)
        assert num_experts % self.size == 0 and bool((topk_idx >= -1).all() and (topk_idx < num_experts).all())
        chosen = topk_idx[topk_idx >= 0]
        per_expert = torch.bincount(chosen, minlength=num_experts).int()
        in_rank = torch.zeros(len(topk_idx), self.size + 1, dtype=torch.bool)
        rank = torch.where(topk_idx < 0, self.size, topk_idx // (num_experts // self.size))
        in_rank = in_rank.scatter_(1, rank, True)[:, : self.size].contiguous()
        in_node = in_rank.view(-1, self.nodes, self.size // self.nodes).any(2)
        per_node = in_node.sum(0).int() if self.nodes > 1 else None
        return in_rank.sum(0).int(), per_node, per_expert, in_rank, EventOverlap()

    def dispatch(
        self,
        x: Any,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        assert previous_event is None or isinstance(previous_event, EventOverlap)
        codes, scales = x if isinstance(x, tuple) else (x, None)
        T, D = codes.shape
        assert codes.is_contiguous() and D * codes.element_size() % 32 == 0
        assert D * codes.element_size() // 2 <= HALF_TOKEN and self.num_nvl_bytes >= 128 * self.size * 2 * D
        if scales is None:
            assert codes.dtype == torch.bfloat16
        else:
            assert codes.dtype == torch.float8_e4m3fn and D % 128 == 0
            assert scales.dtype == torch.float32 and scales.shape == (T, D // 128)
        sent = [part for part in (codes, scales) if part is not None]
        if handle is not None:
            assert topk_idx is None and topk_weights is None and is_token_in_rank is None
            assert handle[0] is self and handle[4] == T
            arrived, finish = self._exchange(sent, *handle[1:4])
            return (
                (tuple(arrived) if scales is not None else arrived[0]),
                None,
                None,
                None,
                None,
                event(finish, async_finish),
            )
        assert topk_idx is not None and topk_weights is not None and topk_weights.dtype == torch.float32
        assert topk_idx.shape == topk_weights.shape and len(topk_idx) == T and topk_weights.is_contiguous()
        assert topk_idx.shape[1] <= 32 and num_tokens_per_expert is not None
        assert is_token_in_rank is not None and is_token_in_rank.shape == (T, self.size)
        assert num_tokens_per_rank is not None and num_tokens_per_rank.dtype == torch.int32
        assert torch.equal(is_token_in_rank.sum(0).int(), num_tokens_per_rank)
        assert (num_tokens_per_rdma_rank is None) == (self.nodes == 1)
        local = len(num_tokens_per_expert) // self.size
        gives = num_tokens_per_rank.tolist()
        told = torch.cat([num_tokens_per_rank[:, None], num_tokens_per_expert.view(self.size, local)], 1)
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told.contiguous(), group=self.group)
        Buffer.host_waits += 1
        takes = heard[:, 0].tolist()
        counts = [-(-each // expert_alignment) * expert_alignment for each in heard[:, 1:].sum(0).tolist()]
        to_rank, token = is_token_in_rank.t().nonzero(as_tuple=True)
        mine = topk_idx[token] - to_rank[:, None] * local
        here = (mine >= 0) & (mine < local) & (topk_idx[token] >= 0)
        known = Handle((self, token, gives, takes, T))
        arrived, finish = self._exchange(sent, token, gives, takes)
        routing, finish_routing = self._exchange(
            [torch.where(here, mine, -1), torch.where(here, topk_weights[token], 0.0)], None, gives, takes
        )

        def both() -> None:
            finish()
            finish_routing()

        rows = tuple(arrived) if scales is not None else arrived[0]
        return rows, routing[0], routing[1], counts, known, event(both, async_finish)

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        _, token, gives, takes, T = handle
        assert handle[0] is self and (previous_event is None or isinstance(previous_event, EventOverlap))
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.dim() == 2
        assert len(x) == sum(takes) and 2 * x.shape[1] % LANES == 0
        sent = [x]
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous() and len(topk_weights) == len(x)
            sent.append(topk_weights)
        arrived, finish = self._exchange(sent, None, takes, gives)
        results = [torch.full((T, part.shape[1]), torch.nan, dtype=part.dtype) for part in sent]

        def add_up() -> None:
            finish()
            for part, result in zip(arrived, results, strict=True):
                total = torch.zeros(result.shape)
                for rows, of in zip(part.split(gives), token.split(gives), strict=True):
                    total.index_add_(0, of, rows.float())
                result.copy_(total)

        return results[0], results[1] if topk_weights is not None else None, event(add_up, async_finish)

    def _exchange(
        self, parts: list[Tensor], order: Tensor | None, gives: list[int], takes: list[int]
    ) -> tuple[list[Tensor], Callable[[], None]]:
        """What will have arrived when the function returned has been called; until then all bits are set."""
        arriving, works = [], []
        for part in parts:
            bytes_ = part.view(torch.uint8)
            leaving = (bytes_ if order is None else bytes_[order]).clone()
            hidden = leaving.new_empty(sum(takes), leaving.shape[1])
            work = dist.all_to_all_single(hidden, leaving, takes, gives, group=self.group, async_op=True)
            works.append((work, hidden, leaving))
            arriving.append(torch.full_like(hidden, 255).view(part.dtype))

        def finish() -> None:
            for (work, hidden, _), part in zip(works, arriving, strict=True):
                work.wait()
                part.view(torch.uint8).copy_(hidden)

        return arriving, finish


def event(finish: Callable[[], None], async_finish: bool) -> EventOverlap:
    """Without `async_finish` the current stream waits at once, and the event is not valid."""
    if async_finish:
        return EventOverlap(finish)
    finish()
    return EventOverlap(None)  # type: ignore[arg-type]


@contextmanager
def installed(nvl_peers: int = 8) -> Iterator[type[Buffer]]:
    """`import deep_ep` finds this, on nodes of so many GPUs."""
    from parallel.experts import deepep

    module: Any = ModuleType("deep_ep")
    module.Buffer, module.Config, module.EventOverlap, module.topk_idx_t = Buffer, Config, EventOverlap, torch.int64
    before = deepep.NODE, Buffer.num_sms
    sys.modules["deep_ep"], deepep.NODE, Buffer.nvl_peers, Buffer.host_waits = module, nvl_peers, nvl_peers, 0
    try:
        yield Buffer
    finally:
        del sys.modules["deep_ep"]
        (deepep.NODE, Buffer.num_sms), Buffer.nvl_peers = before, 8
