"""The interface of a dispatcher, and the two segments of a MoE layer that use it.

T tokens of this rank, K experts chosen by each, E experts in all, R rows that this rank's experts receive, D width.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
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


@dataclass
class Layout:
    """Where each row of one dispatch came from, so that combine and both backwards need no routing.

    counts: rows of each expert of this rank, on the host. source_R and slot_TK describe the permutation on the sending
    side: row r holds token source[r]; token t's k-th copy is row slot[t, k]. sends, receives: rows to and from each
    rank of the group; arrival_R: the order that sorts received rows by expert (None: they are sorted as they come).
    """

    counts: list[int]
    source_R: Tensor
    slot_TK: Tensor
    sends: list[int]
    receives: list[int]
    arrival_R: Tensor | None = None


class Dispatcher(Protocol):
    """Moves tokens to their experts and back. Each method is a part of a pass: it yields effects, then returns."""

    log: list[Tag]

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor, Layout]]:
        """Rows [R, D] sorted by local expert, their routing weights [R], and the layout."""
        ...

    def dispatch_backward(
        self, layout: Layout, drows_RD: Tensor, dweights_R: Tensor, tag: Tag
    ) -> Generator[Effect, None, tuple[Tensor, Tensor]]:
        """Gradients of the tokens [T, D] and of their routing weights [T, K]."""
        ...

    def combine(self, layout: Layout, rows_RD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Each token's rows, summed in FP32 in the order of its choice: [T, D]."""
        ...

    def combine_backward(self, layout: Layout, dy_TD: Tensor, tag: Tag) -> Generator[Effect, None, Tensor]:
        """Gradients of the rows [R, D]."""
        ...


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
