"""The interface of a dispatcher, and the two segments of a MoE layer that use it.

T tokens of this rank, K experts chosen by each, E experts in all, R rows that this rank's experts receive, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from parallel.passes import Effect, Microbatch, Pass, Values, add_grad


@dataclass(frozen=True)
class Tag:
    """Which collective this is: the same on every rank of an expert group, in the same order."""

    operation: str
    stage: int
    microbatch: int
    layer: int


OPERATIONS = ("counts", "dispatch", "combine", "combine.B", "dispatch.B")

Limit = Callable[[int, str, Tag], None]
"""Told how many rows a dispatch is about to "receive" or "pass on", before there is memory for them; it may raise."""


def no_limit(rows: int, doing: str, tag: Tag) -> None:
    """As many as come."""


@dataclass
class Traffic:
    """Bytes that this rank has sent since `clear`, by operation, to ranks of its own node and to those of others.

    What stays on the rank is neither.
    """

    inside: Counter[str] = field(default_factory=Counter)
    across: Counter[str] = field(default_factory=Counter)

    def add(self, operation: str, inside: int, across: int) -> None:
        """Count bytes that are being sent."""
        self.inside[operation] += inside
        self.across[operation] += across

    def clear(self) -> None:
        """Begin anew."""
        self.inside.clear()
        self.across.clear()


@dataclass
class Layout:
    """Where each row of one dispatch came from, so that combine and both backwards need no routing.

    counts: rows of each expert of this rank, on the host, with those that pad it. A dispatcher's own layout extends
    this by what it knows.
    """

    counts: list[int]


class Dispatcher(Protocol):
    """Moves tokens to their experts and back. Each method is a part of a pass: it yields effects, then returns.

    The rows of an expert are padded with zeros to a multiple of what its GEMMs want; these rows travel nowhere, and
    nobody counts them. log: the collectives issued since whoever reads it has cleared it. traffic: what they sent,
    likewise.
    """

    log: list[Tag]
    traffic: Traffic

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, Any]]:
        """Rows [R, D] sorted by local expert, their routing weights [R], and the layout."""
        ...

    def dispatch_backward(
        self, layout: Any, drows_RD: Tensor, dweights_R: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor]]:
        """Gradients of the tokens [T, D] and of their routing weights [T, K]."""
        ...

    def combine(self, layout: Any, rows_RD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Each token's rows, summed in FP32 in one order: [T, D]."""
        ...

    def combine_backward(self, layout: Any, dy_TD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Gradients of the rows [R, D]."""
        ...

    def issues(self, operation: str) -> Sequence[str]:
        """The operations of the tags that a turn called `operation` logs."""
        ...


def issues_once(operation: str) -> Sequence[str]:
    """`Dispatcher.issues` of one that exchanges rows once; before a dispatch it also exchanges their numbers."""
    return ("counts", operation) if operation == "dispatch" else (operation,)


@dataclass
class Dispatch:
    """Segment: tokens `normed` with `weights` and `experts` become `rows`, `row_weights` and a `layout`."""

    dispatcher: Dispatcher
    layer: int
    name: str = "dispatch"
    reads: tuple[str, ...] = ("normed", "weights", "experts")
    writes: tuple[str, ...] = ("rows", "row_weights", "layout")

    def forward(self, values: Values, batch: Microbatch, stage: int) -> Pass:
        """Send; returns the shape of the input and the layout."""
        x = values["normed"]
        tag = Tag("dispatch", stage, batch.index, self.layer)
        with_routing = (values["weights"], values["experts"])
        rows, weights, layout = yield from self.dispatcher.dispatch(x.flatten(0, -2), *with_routing, tag)
        values.update(rows=rows, row_weights=weights, layout=layout)
        return x.shape, layout

    def backward(self, record: Any, grads: Values, batch: Microbatch, stage: int) -> Pass:
        """Return the gradients of rows and weights to the tokens' ranks."""
        shape, layout = record
        tag = Tag("dispatch.B", stage, batch.index, self.layer)
        sent = (grads.pop("rows"), grads.pop("row_weights"))
        dx_TD, dweights_TK = yield from self.dispatcher.dispatch_backward(layout, *sent, tag)
        add_grad(grads, "normed", dx_TD.view(shape))
        add_grad(grads, "weights", dweights_TK)


@dataclass
class Combine:
    """Segment: the experts' `out_rows` return and become `routed`, shaped like the residual stream."""

    dispatcher: Dispatcher
    layer: int
    name: str = "combine"
    reads: tuple[str, ...] = ("out_rows", "layout", "hidden")
    writes: tuple[str, ...] = ("routed",)

    def forward(self, values: Values, batch: Microbatch, stage: int) -> Pass:
        """Send back and sum."""
        layout = values["layout"]
        tag = Tag("combine", stage, batch.index, self.layer)
        y_TD = yield from self.dispatcher.combine(layout, values["out_rows"], tag)
        values["routed"] = y_TD.view(values["hidden"].shape)
        return layout

    def backward(self, record: Any, grads: Values, batch: Microbatch, stage: int) -> Pass:
        """Send each token's gradient to every expert that it chose."""
        tag = Tag("combine.B", stage, batch.index, self.layer)
        dy = grads.pop("routed")
        grads["out_rows"] = yield from self.dispatcher.combine_backward(record, dy.flatten(0, -2), tag)
