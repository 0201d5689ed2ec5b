"""DeepEP's buffers: a token goes once to each rank that has experts of it, by kernels over NVLink and InfiniBand.

Between nodes they go the way of `hierarchical`: a token crosses once for each node, and its node's sum crosses back.
What arrives are tokens with their choices; making a row for each choice, and adding a token's rows up before they
return, is done here. The backward of dispatch is a combine, and that of combine a dispatch by the forward's handle.
Written from the documentation of DeepEP's `Buffer` (version 1; version 2 still has it): it has never run on a GPU.

Q tokens that arrive from all ranks, K their choices, R rows of this rank's experts (with padding), D width.
"""

import importlib
import importlib.util
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.permute import combine_forward
from parallel.errors import UserError
from parallel.experts.dispatch import Layout, Limit, Tag, Traffic, no_limit
from parallel.experts.local import and_zeros, by_key, count, padded, places
from parallel.experts.wire import decode, encode, row_bytes
from parallel.passes import Comm, Effect, HostSync

NODE = 8  # GPUs of a node, where there are several
GROUPS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
WIDTHS = range(256, 8184, 256)  # a combine takes 32 lanes of 16 bytes; a dispatch holds half a token in 8 KiB, less 8
CHOICES = 32
SMS = range(4, 133, 2)  # even: half send, half receive


# ---------------------------------------------------------------- what it can serve
def check_group(expert: int, node_size: int) -> None:
    """Raise `UserError` for an expert group that the kernels do not serve."""
    whole_nodes = expert > NODE and node_size % NODE == 0
    in_a_node = expert <= NODE and node_size % expert == 0
    if expert not in GROUPS or not (whole_nodes or in_a_node):
        raise UserError(
            f"parallel.dispatch=deepep: parallel.expert={expert} on nodes of {node_size}; expected 2, 4 or 8 ranks of "
            f"one node, or {', '.join(map(str, GROUPS[3:]))} ranks on nodes of {NODE}"
        )


def check_model(width: int, chosen: int, precision: str, sms: int | None) -> None:
    """Raise `UserError` for what the kernels do not take: see `WIDTHS`, `CHOICES` and `SMS`; sums are made of BF16."""
    suffix = "with parallel.dispatch=deepep"
    if precision not in ("fp8", "bf16"):
        raise UserError(f"precision={precision}: expected fp8 or bf16 {suffix}")
    if width not in WIDTHS:
        raise UserError(f"model.hidden_size={width}: expected a multiple of 256 up to {WIDTHS[-1]} {suffix}")
    if chosen > CHOICES:
        raise UserError(f"model.num_experts_per_tok={chosen}: expected at most {CHOICES} {suffix}")
    if sms is not None and sms not in SMS:
        raise UserError(f"parallel.comm_sms={sms}: expected an even number from {SMS[0]} to {SMS[-1]} {suffix}")


def check_device(device: torch.device) -> None:
    """Raise `UserError` where DeepEP cannot run."""
    reason = None
    if device.type != "cuda":
        reason = "needs GPUs, and torch sees none here"
    elif importlib.util.find_spec("deep_ep") is None:
        reason = "needs the package deep_ep, which is not installed (github.com/deepseek-ai/DeepEP)"
    if reason:
        raise UserError(f"parallel.dispatch=deepep: {reason}; expected auto, all_to_all or hierarchical")


# ---------------------------------------------------------------- the dispatcher
class Counting:
    """The work of a call in which DeepEP makes the host wait, until all ranks have told it how many tokens come."""

    result: Any

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def wait(self) -> None:
        """Call, and keep the result."""
        self.result = self.call()


class Arrival:
    """The work of a kernel on DeepEP's stream."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        """The current stream waits for it, the host does not."""
        self.event.current_stream_wait()


@dataclass
class TokenLayout(Layout):
    """handle: DeepEP's own. source_R: the arrived token of each row (Q for padding). slot_QK: the row of each choice
    (R for those of other ranks). copies: of this rank's tokens, those that links of a node carry and that cross."""

    handle: Any
    source_R: Tensor
    slot_QK: Tensor
    copies: tuple[int, int]


class DeepEP:
    """Dispatcher over an expert group; rank g of the group holds experts g*E/size up to (g+1)*E/size."""

    def __init__(
        self,
        experts: int,
        group: dist.ProcessGroup,
        fp8: bool = False,
        align: int = 1,
        limit: Limit = no_limit,
        sms: int | None = None,
    ) -> None:
        """fp8: rows go to their experts in FP8. align: each expert's number of rows becomes a multiple of it.

        limit: is told of rows before they are made; DeepEP has then taken memory for the tokens. sms: of the kernels,
        for all buffers of the process (None: 20).
        """
        self.experts, self.group, self.fp8, self.align, self.limit = experts, group, fp8, align, limit
        self.log: list[Tag] = []
        self.traffic = Traffic()
        self.library = importlib.import_module("deep_ep")
        if sms:
            self.library.Buffer.set_num_sms(sms)
        self.made: Any = None

    def issues(self, operation: str) -> Sequence[str]:
        """One call, which exchanges the numbers too."""
        return (operation,)

    def buffer(self, width: int) -> Any:
        """The buffers for tokens of `width` values in BF16, made once; the group's ranks make them together."""
        if self.made is None:
            make, size = self.library.Buffer, self.group.size()
            configs = make.get_dispatch_config(size), make.get_combine_config(size)
            nvlink = max(config.get_nvl_buffer_size_hint(2 * width, size) for config in configs)
            rdma = max(config.get_rdma_buffer_size_hint(2 * width, size) for config in configs)
            self.made = make(self.group, nvlink, rdma, num_qps_per_rank=make.num_sms)
        return self.made

    # -- the four directions
    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, TokenLayout]]:
        """Tokens go to the ranks of their experts, with their routing, and become rows there."""
        self.log.append(tag)
        buffer, values = self.buffer(x_TD.shape[1]), encode(x_TD, self.fp8)
        routing = experts_TK.to(getattr(self.library, "topk_idx_t", torch.int64)), weights_TK.float()
        routing = routing[0].contiguous(), routing[1].contiguous()
        sent = as_sent(values)  # before the layout, for which DeepEP's stream waits
        per_rank, per_node, per_expert, in_rank, laid_out = buffer.get_dispatch_layout(
            routing[0], self.experts, async_finish=True
        )
        on_host = [None if table is None else self._to_host(table, buffer) for table in (per_rank, per_node)]
        counting = Counting(
            lambda: buffer.dispatch(
                sent,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=routing[0],
                topk_weights=routing[1],
                previous_event=laid_out,
                async_finish=True,
            )
        )
        yield HostSync("counts", counting)
        arrived, choices_QK, weights_QK, counts, handle, event = counting.result
        self.limit(sum(counts), "receive", tag)
        copies = self._copies(*on_host)
        yield self._in_flight(tag, event, copies, row_bytes(*values, *routing))

        order_R, slot_QK, counts = self._rows(choices_QK, counts)
        layout = TokenLayout(counts, handle, order_R // max(choices_QK.shape[1], 1), slot_QK, copies)
        weights_R = and_zeros(weights_QK.flatten())[order_R].to(weights_TK.dtype)
        return self._copied(arrived, layout, x_TD.dtype), weights_R, layout

    def dispatch_backward(
        self, layout: TokenLayout, drows_RD: Tensor, dweights_R: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor]]:
        """As `combine`, with the gradients of the routing weights: each is there on one rank, and zero on others."""
        dweights_QK = and_zeros(dweights_R.float())[layout.slot_QK]
        dx_TD, dweights_TK = yield from self._combine(layout, drows_RD, tag, dweights_QK)
        return dx_TD, dweights_TK.to(dweights_R.dtype)

    def combine(self, layout: TokenLayout, rows_RD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """A rank's rows of a token are summed in the order of its choices, then the ranks' sums, each in FP32."""
        y_TD, _ = yield from self._combine(layout, rows_RD, tag)
        return y_TD

    def combine_backward(self, layout: TokenLayout, dy_TD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Gradients go where the tokens had gone."""
        self.log.append(tag)
        values = encode(dy_TD, self.fp8)
        arrived, *_, event = self.buffer(dy_TD.shape[1]).dispatch(
            as_sent(values), handle=layout.handle, async_finish=True
        )
        yield self._in_flight(tag, event, layout.copies, row_bytes(*values))
        return self._copied(arrived, layout, dy_TD.dtype)

    def _combine(
        self, layout: TokenLayout, rows_RD: Tensor, tag: Tag, weights_QK: Tensor | None = None
    ) -> Generator[Effect, None, tuple[Tensor, Any]]:
        self.log.append(tag)
        sums_QD = combine_forward(and_zeros(rows_RD), layout.slot_QK)
        y_TD, weights_TK, event = self.buffer(rows_RD.shape[1]).combine(
            sums_QD, layout.handle, topk_weights=weights_QK, async_finish=True
        )
        width = row_bytes(sums_QD) + (0 if weights_QK is None else row_bytes(weights_QK))
        yield self._in_flight(tag, event, layout.copies, width)
        return y_TD, weights_TK

    # -- tokens and rows
    def _rows(self, choices_QK: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Rows sorted by expert, padded: each one's position in the flattened choices (Q * K for padding), each
        choice's row (their number for choices of other ranks), and the rows of each expert."""
        local = self.experts // self.group.size()
        key_QK = torch.where(choices_QK < 0, local, choices_QK).long()
        order, place_QK = by_key(key_QK)
        counts_E, rows = count(key_QK, local + 1)[:-1], sum(counts)
        moved_R, counts = padded(torch.arange(rows, device=order.device), counts_E, counts, self.align)
        order_R = torch.cat([order[:rows], order.new_full((1,), len(order))])[moved_R]
        to_R = torch.cat([places(moved_R, rows), order.new_full((1,), len(moved_R))])
        return order_R, to_R[place_QK.clamp(max=rows)], counts

    def _copied(self, arrived: Any, layout: TokenLayout, dtype: torch.dtype) -> Tensor:
        """Arrived tokens as rows in `dtype`."""
        parts = [part.view(torch.uint8) for part in (arrived if isinstance(arrived, tuple) else (arrived,))]
        return decode(parts if self.align == 1 else [and_zeros(part) for part in parts], layout.source_R, dtype)

    # -- what is counted
    def _to_host(self, table: Tensor, buffer: Any) -> Tensor:
        """A copy on the host, complete when it has the counts: they come later on the same stream."""
        if not table.is_cuda:
            return table
        with torch.cuda.stream(buffer.get_comm_stream()):
            return torch.empty_like(table, device="cpu", pin_memory=True).copy_(table, non_blocking=True)

    def _copies(self, per_rank: Any, per_node: Any) -> tuple[int, int]:
        """See `TokenLayout`. A copy crosses to the rank at this one's place of a node, which hands it on to others."""
        ranks, here = per_rank.tolist(), self.group.rank()
        inside = sum(tokens for rank, tokens in enumerate(ranks) if rank % NODE != here % NODE)
        across = 0 if per_node is None else int(per_node.sum()) - int(per_node[here // NODE])
        return inside, across

    def _in_flight(self, tag: Tag, event: Any, copies: tuple[int, int], width: int) -> Comm:
        """Bytes of this rank's tokens, in whichever direction."""
        inside, across = (number * width for number in copies)
        self.traffic.add(tag.operation, inside, across)
        return Comm(tag.operation, Arrival(event), inside, across, self.group)


def as_sent(values: list[Tensor]) -> Any:
    """How DeepEP takes tokens: BF16, or codes and scales together."""
    values = [value.contiguous() for value in values]
    return tuple(values) if len(values) > 1 else values[0]
