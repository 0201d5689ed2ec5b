"""What the passes of a stage consist of, seen by running them on fake tensors.

A stage is built as any rank of the simulated world builds it, and the passes of `parallel.passes` run through it.
Tensors have shapes and no values, and process groups are fake, so a rank of 2,048 is looked at on one CPU. What is
seen: the operators of each compute piece with their price (`kernels.ops.price`), each communication with its bytes, and
the memory that the tape, and after it the deferred weight gradients, keep. There is no routing to look at either:
whoever reads row counts on the host is told those of perfectly balanced experts (`launch.simulate.world`).
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.linear import Numerics
from kernels.ops import Cost, price
from parallel.experts.shard import share_of
from parallel.passes import Comm, Compute, HostSync, Microbatch, Pass, Stage, Tape, backward, forward


# ---------------------------------------------------------------- what is seen
@dataclass(frozen=True)
class Operator:
    """One call: its name and price."""

    name: str
    cost: Cost


@dataclass
class Piece:
    """Operators that run one after the other on the device, under one name of the pass."""

    name: str
    layer: int
    operators: list[Operator] = field(default_factory=list)


@dataclass(frozen=True)
class Exchange:
    """A communication in flight from here on, and waited for when the pass goes on. Bytes that leave this rank."""

    name: str
    inside: int
    across: int


@dataclass(frozen=True)
class Read:
    """The host waits for numbers of rows."""

    name: str


Event = Piece | Exchange | Read


@dataclass
class PassWork:
    """One pass: its events in order; bytes that it leaves behind for later passes, and most bytes that it held."""

    events: list[Event] = field(default_factory=list)
    kept: int = 0
    peak: int = 0

    @property
    def operators(self) -> list[Operator]:
        """All of its operators."""
        return [operator for event in self.events if isinstance(event, Piece) for operator in event.operators]


@dataclass(frozen=True)
class StageWork:
    """The passes of a stage on one micro-batch, by instruction, and what is done once a step.

    "F" keeps the activations of a micro-batch; "I" what its weight gradients wait for; "B" and "W" nothing. once: the
    first forward's operators that later ones do not repeat, which are those that quantise weights; cached: bytes of
    what they make. message: bytes of what travels to the next stage. dense, tied, experts: parameters on this
    rank, of `parameter_size` bytes each, their gradients of `gradient_size`; a rank holds one copy of what is tied.
    """

    passes: dict[str, PassWork]
    once: list[Operator]
    cached: int
    message: int
    dense: int
    tied: int
    experts: int
    parameter_size: int
    gradient_size: int


# ---------------------------------------------------------------- seeing it
class Memory:
    """Bytes of what is made while somebody tells of it, as long as anybody holds it. peak: the most at a time."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._held = self.peak = 0

    def see(self, given: Any, result: Any) -> None:
        """An operator has made `result` of `given`; trees of tensors and other things."""
        known = {each.untyped_storage()._cdata for each in tree_leaves(given) if isinstance(each, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                memory = leaf.untyped_storage()
                if memory._cdata in known:
                    continue  # a view
                if memory._cdata not in self._made or self._made[memory._cdata][0].expired():
                    self._made[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
                    self._held += memory.nbytes()
                    if self._held > self.peak:
                        self.peak = max(self.peak, self.alive())

    def alive(self) -> int:
        """Bytes that somebody still holds."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self._held = sum(size for _, size in self._made.values())
        return self._held


class Observer(TorchDispatchMode):
    """Notes every priced operator, and the memory that is alive of all that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.memory = Memory()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cost = price(func, args, kwargs or {}, result)
        if cost is not None:
            self.operators.append(Operator(func._opname, cost))
        self.memory.see((args, kwargs), result)
        return result

    def watch(self, one: Pass) -> tuple[list[Event], Any]:
        """Run a pass to its end; returns its events, and its result."""
        events: list[Event] = [Piece("", -1, self.operators)]
        self.operators.clear()
        effect: Any = None
        while True:
            self.operators = []
            if isinstance(effect, Compute):
                events.append(Piece(effect.name, effect.layer, self.operators))
            else:
                last = next(event for event in reversed(events) if isinstance(event, Piece))
                events.append(Piece(last.name, last.layer, self.operators))
            if isinstance(effect, Comm | HostSync):
                effect.work.wait()
            try:
                with self:
                    effect = next(one)
            except StopIteration as end:
                return [event for event in events if not isinstance(event, Piece) or event.operators], end.value
            if isinstance(effect, Comm):
                events.append(Exchange(effect.name, effect.inside, effect.across))
            elif isinstance(effect, HostSync):
                events.append(Read(effect.name))


def study(
    stage: Stage,
    numerics: Numerics,
    batch: Callable[[], Microbatch],
    shape: tuple[int, ...],
    tied: Collection[str] = (),
) -> StageWork:
    """Every kind of pass through `stage`, on micro-batches that `batch` makes, with hidden states of `shape`.

    tied: names of parameters that several stages use. Fake tensors are on. The first forward of all also quantises the
    weights.
    """
    weights, passes = numerics.weight_grads, {}

    def hidden() -> Tensor:
        return torch.empty(shape, dtype=numerics.dtype)

    def forwards() -> tuple[Microbatch, Tape, PassWork, int]:
        one, observer = batch(), Observer()
        tape: Tape = []
        given = None if stage.is_first else hidden()
        observer.memory.see((), given)  # backward needs what has arrived, too
        events, out = observer.watch(forward(stage, given, one, tape))
        sent = out.nbytes if out is not None else 0
        del out, given
        return one, tape, PassWork(events, observer.memory.alive(), observer.memory.peak), sent

    def backwards(one: Microbatch, tape: Tape, split: bool) -> PassWork:
        observer = Observer()
        grad = None if stage.is_last else hidden()
        events, _ = observer.watch(backward(stage, grad, one, tape, weights, split))
        if not split:
            events += run_weights(weights.run)
        return PassWork(events, observer.memory.alive(), observer.memory.peak)

    def run_weights(run: Callable[[], None]) -> list[Event]:
        observer = Observer()
        with observer:
            run()
        return [Piece("weights.W", -1, observer.operators)] if observer.operators else []

    one, tape, first, message = forwards()
    passes["B"] = backwards(one, tape, split=False)
    one, tape, passes["F"], _ = forwards()
    passes["I"] = backwards(one, tape, split=True)
    weights.defer(stage.index)
    passes["W"] = PassWork(run_weights(lambda: weights.pop(stage.index)))
    once = Counter(first.operators) - Counter(passes["F"].operators)
    sizes = {"dense": 0, "tied": 0, "experts": 0}
    for name, parameter in cast(nn.Module, stage).named_parameters():
        sizes["experts" if share_of(parameter) else "tied" if name in tied else "dense"] += parameter.numel()
    return StageWork(
        passes,
        list(once.elements()),
        first.kept - passes["F"].kept,
        message,
        **sizes,
        parameter_size=numerics.dtype.itemsize,
        gradient_size=numerics.main_grad_dtype.itemsize,
    )
