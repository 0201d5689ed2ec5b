"""A pass is a generator: the forward or backward of one micro-batch through one stage.

It yields an effect each time it has put a communication in flight or needs the host; whoever runs it waits for that
before it resumes it. Running one pass = exhausting it; running an `F&B` pair = `merge`, by a fixed table. A stage is a
list of segments with named inputs and outputs: `Local` ones compute, each in an autograd graph of its own; `Dispatch`
and `Combine` (parallel/experts) move tokens to their experts and back. The tape remembers what backward needs, segment
by segment.

      B   combine(B)>| mlp(B)      dispatch(B)> mlp(W) | attention(B)  combine(B)> attention(W) | ...
      F               attention(F) dispatch(F)>        | mlp(F)       combine(F)>              | attention(F) ...

(`>`: in flight, waited for at the start of the same pass's next turn.) Both passes share one communicator; each
turn ends with the next communication in flight, so every rank of an expert group issues the same collectives in the
same order whatever the timing. Source: report section 3.2.1 and figure 4.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kernels.linear import WeightGrads
from parallel.trace import OFF, Trace


# ---------------------------------------------------------------- effects
@dataclass(frozen=True)
class Comm:
    """A communication is in flight; the pass is resumed when `work` is done.

    inside, across: bytes that leave this rank for it, to ranks of its own node and to those of others.
    """

    name: str
    work: Any
    inside: int
    across: int
    group: Any

    @property
    def bytes(self) -> int:
        """All that leaves this rank."""
        return self.inside + self.across


@dataclass(frozen=True)
class HostSync:
    """The host is about to read what `work` brings; the pass keeps its turn."""

    name: str
    work: Any


@dataclass(frozen=True)
class Compute:
    """A compute segment begins."""

    name: str
    layer: int


Effect = Comm | HostSync | Compute
Pass = Generator[Effect, None, Any]


# ---------------------------------------------------------------- what a pass works on
@dataclass
class Microbatch:
    """One micro-batch on its way through the stages.

    tokens: [sequences, T+1] int64 where the first or last stage needs them. shape: of its hidden states between stages,
    [sequences, T, D]. seeds: gradient of the step's objective with respect to each raw loss sum. losses: those sums by
    (name, layer), FP64. training: False runs forward only, without tape, leaving router counts untouched.
    """

    index: int
    tokens: Tensor | None
    shape: tuple[int, ...] = ()
    seeds: Mapping[str, float] = field(default_factory=dict)
    losses: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    training: bool = True


Values = dict[str, Any]


class Segment(Protocol):
    """A piece of a stage. `forward` reads and writes `values` by name; it returns what its backward needs."""

    name: str
    layer: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def forward(self, values: Values, batch: Microbatch, stage: int) -> Pass: ...

    def backward(self, record: Any, grads: Values, batch: Microbatch, stage: int) -> Pass: ...


class Stage(Protocol):
    """What the executor needs of a stage: its number, its place and its segments."""

    index: int
    is_first: bool
    is_last: bool
    segments: Sequence[Segment]


def add_grad(grads: Values, name: str, grad: Tensor | None) -> None:
    """Add one consumer's gradient of the value called `name`."""
    if grad is not None:
        grads[name] = grads[name] + grad if name in grads else grad


@dataclass(slots=True)
class _Gradient:
    """Where the gradient of a segment's input ends, when no leaf takes it."""

    grad: Tensor | None = None


class _Enter(torch.autograd.Function):
    """The input of a segment's own graph. Its gradient ends in `end`; unlike a leaf, the graph does not keep it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, end: _Gradient) -> Tensor:
        ctx.end = end
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.end.grad = grad
        return None, None, None


_ANCHOR = torch.empty((), requires_grad=True)  # that of which autograd believes all this to be a function


def enter(value: Any, lets_go: bool) -> tuple[Any, Tensor | _Gradient | None]:
    """A value cut from the graph that made it, and where its gradient will be; what has none is passed on.

    A leaf is quickest, and its graph keeps it; with `lets_go` the graph does not.
    """
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value, None
    if lets_go:
        end = _Gradient()
        return _Enter.apply(value.detach(), _ANCHOR, end), end
    leaf = value.detach().requires_grad_()
    return leaf, leaf


@dataclass(slots=True)
class _Root:
    """Where the backward of an output begins, and what its gradient has to look like; the output is not kept."""

    edge: GradientEdge
    dtype: torch.dtype
    device: torch.device


@dataclass
class Local:
    """A compute segment: one autograd graph from detached inputs to outputs and raw losses.

    run(batch, *inputs) returns one value for each name in `writes`, then one scalar for each name in `losses`. A loss
    is an extra root of the graph; its gradient is `batch.seeds[name]`. lets_go: the graph keeps inputs only as far as
    an operator saves them, which is worth its price where operators keep something smaller, such as their FP8 codes.
    """

    name: str
    layer: int
    run: Callable[..., Sequence[Any]]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    losses: tuple[str, ...] = ()
    lets_go: bool = False

    def forward(self, values: Values, batch: Microbatch, stage: int) -> Pass:
        """Compute; returns where the gradients of inputs will be, and the roots of those of the outputs."""
        yield Compute(self.name, self.layer)
        ends: list[Tensor | _Gradient | None] = []
        if batch.training:
            inputs = []
            for name in self.reads:
                entered, end = enter(values[name], self.lets_go)
                inputs.append(entered)
                ends.append(end)
            results = self.run(batch, *inputs)
        else:
            with torch.no_grad():
                results = self.run(batch, *(values[name] for name in self.reads))
        roots: dict[str, _Root] = {}
        for name, result in zip(self.writes + self.losses, results, strict=True):
            if isinstance(result, Tensor) and result.requires_grad:
                roots[name] = _Root(get_gradient_edge(result), result.dtype, result.device)
                result = result.detach()
            if name in self.losses:
                batch.losses[name, self.layer] = result.detach().double()
            else:
                values[name] = result
        return ends, roots

    def backward(self, record: Any, grads: Values, batch: Microbatch, stage: int) -> Pass:
        """Walk this segment's graph: take the gradients of the outputs from `grads`, add those of the inputs to it."""
        yield Compute(self.name + ".B", self.layer)
        ends, roots = record
        edges: list[GradientEdge] = []
        seeds: list[Tensor] = []
        for name in self.writes:
            grad = grads.pop(name, None)
            if grad is not None and name in roots:
                edges.append(roots[name].edge)
                seeds.append(grad.to(device=roots[name].device, dtype=roots[name].dtype))
        for name in self.losses:
            if name in roots:
                edges.append(roots[name].edge)
                seeds.append(torch.full((), batch.seeds[name], device=roots[name].device, dtype=roots[name].dtype))
        if edges:
            torch.autograd.backward(edges, seeds)
        for name, end in zip(self.reads, ends, strict=True):
            if end is not None:
                add_grad(grads, name, end.grad)


@dataclass
class Sum:
    """`writes` = the sum of `reads`: the residual stream takes up a layer's results. All inputs get its gradient."""

    name: str
    layer: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def forward(self, values: Values, batch: Microbatch, stage: int) -> Pass:
        """Add in the order of `reads`."""
        yield Compute(self.name, self.layer)
        first, *rest = (values[name] for name in self.reads)
        for value in rest:
            first = first + value
        values[self.writes[0]] = first

    def backward(self, record: Any, grads: Values, batch: Microbatch, stage: int) -> Pass:
        """Hand the gradient of the sum to every summand."""
        yield Compute(self.name + ".B", self.layer)
        grad = grads.pop(self.writes[0], None)
        for name in self.reads:
            add_grad(grads, name, grad)


# ---------------------------------------------------------------- passes
Tape = list[tuple[Segment, Any]]


def live_after(segments: Sequence[Segment]) -> list[set[str]]:
    """For each segment the names that somebody still reads after it; forward lets the others go."""
    live, needed = [], {"hidden"}
    for segment in reversed(segments):
        live.append(needed)
        needed = (needed - set(segment.writes)) | set(segment.reads)
    return live[::-1]


def forward(stage: Stage, hidden: Tensor | None, batch: Microbatch, tape: Tape) -> Pass:
    """Forward of one micro-batch through `stage`; returns what the next stage receives (None from the last).

    hidden: [sequences, T, D] from the stage before; None on the first. The tape grows by one entry a segment.
    """
    values: Values = {} if hidden is None else {"hidden": hidden}
    for segment, live in zip(stage.segments, live_after(stage.segments), strict=True):
        record = yield from segment.forward(values, batch, stage.index)
        if batch.training:
            tape.append((segment, record))
        for name in values.keys() - live:
            del values[name]
    return None if stage.is_last else values["hidden"]


def backward(
    stage: Stage, grad: Tensor | None, batch: Microbatch, tape: Tape, weights: WeightGrads, split: bool
) -> Pass:
    """Backward of one micro-batch through `stage`; returns the gradient that the stage before receives.

    Weight gradients run while a communication is in flight; with `split` (an `I`) they stay in `weights.now` for the
    caller to defer. Those made after the last communication are left there in either case: the executor first sends the
    result. The tape shrinks as the pass goes, so that memory comes back segment by segment.
    """
    grads: Values = {} if grad is None else {"hidden": grad}
    while tape:
        segment, record = tape.pop()
        for effect in segment.backward(record, grads, batch, stage.index):
            if isinstance(effect, Comm) and weights.now and not split:
                yield Compute("weights.W", segment.layer)
                weights.run()
            yield effect
    return grads.get("hidden")


# ---------------------------------------------------------------- running passes
def merge(*passes: Pass, trace: Trace = OFF) -> list[Any]:
    """Run the passes to their ends, taking turns; returns their results in the order given.

    A turn ends when the pass has put a communication in flight, or has ended; a host read or a segment border does not
    end it. Of a pair the backward comes first, which gives the order of the figure in this module's head. Passes of
    unequal length (layer counts that differ, MTP) take turns while both last; what is left of the longer one runs by
    itself. If a pass raises, all are closed and what they have in flight is waited for.
    """
    if len(passes) == 1:
        return [_alone(passes[0], trace)]
    results: list[Any] = [None] * len(passes)
    in_flight: dict[int, Comm] = {}
    live = dict(enumerate(passes))
    try:
        while live:
            for position, one in list(live.items()):
                effect: Effect | None = in_flight.pop(position, None)
                try:
                    while not isinstance(effect := _resume(one, effect, trace), Comm):
                        pass
                    in_flight[position] = effect
                    trace.post("experts", effect.name, effect.work, effect.bytes, across=effect.across)
                except StopIteration as end:
                    results[position] = end.value
                    del live[position]
    except BaseException:
        for one in passes:
            one.close()
        for comm in in_flight.values():
            with suppress(RuntimeError):
                comm.work.wait()
        raise
    return results


def _alone(one: Pass, trace: Trace) -> Any:
    """Exhaust a pass that takes turns with nobody."""
    effect: Effect | None = None
    try:
        while True:
            effect = _resume(one, effect, trace)
            if isinstance(effect, Comm):
                trace.post("experts", effect.name, effect.work, effect.bytes, across=effect.across)
    except StopIteration as end:
        return end.value
    finally:
        one.close()


def _resume(one: Pass, effect: Effect | None, trace: Trace) -> Effect:
    """Wait for what the pass has yielded last, and run it to its next effect."""
    if isinstance(effect, Compute):
        with trace.span("compute", effect.name, layer=effect.layer):
            return next(one)
    if effect is not None:
        trace.wait("experts", effect.name, effect.work)
    return next(one)
