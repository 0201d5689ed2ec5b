"""What the passes of a stage consist of, seen by running them on fake tensors.

A stage is built as any rank of the simulated world builds it, and the passes of `parallel.passes` run through it.
Tensors have shapes and no values, and process groups are fake, so a rank of 2,048 is looked at on one CPU. What is
seen: the operators of each compute piece with their price (`kernels.ops.price`), each communication with its bytes, and
the memory that the tape, and after it the deferred weight gradients, keep. There is no routing to look at either:
whoever reads row counts on the host is told those of perfectly balanced experts (`launch.simulate.stages.world`).
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.linear import Numerics
from kernels.ops import Cost, price
from launch.simulate.stages.storage import Bytes, Parts, difference
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
    """Operators that run one after the other on the device, under one name of the pass.

    fullest, left: bytes by part that are held at the fullest and at the end, beyond those at its beginning.
    """

    name: str
    layer: int
    operators: list[Operator] = field(default_factory=list)
    fullest: Bytes = field(default_factory=Bytes)
    left: Bytes = field(default_factory=Bytes)


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
    """One pass: its events in order; afterwards: weight gradients that are left until its message is on its way."""

    events: list[Event] = field(default_factory=list)
    afterwards: Piece | None = None

    @property
    def left(self) -> Bytes:
        """Bytes by part after it, beyond those before it."""
        found = Bytes()
        for piece in self.pieces:
            found.update(piece.left)
        return found

    @property
    def pieces(self) -> list[Piece]:
        """All that is computed."""
        found = [event for event in self.events if isinstance(event, Piece)]
        return [*found, self.afterwards] if self.afterwards else found

    @property
    def operators(self) -> list[Operator]:
        """All of its operators."""
        return [operator for piece in self.pieces for operator in piece.operators]


@dataclass(frozen=True)
class StageWork:
    """The passes of a stage on one micro-batch, by instruction, and what is done once a step.

    "F" leaves the activations of a micro-batch, which "B" and "I" take away; "I" leaves the operands of its weight
    gradients, which "W" takes away. once: the first forward's operators that later ones do not repeat, which are those
    that quantise weights; cached: bytes of what they make; turned: bytes that the first backward adds to them. message:
    bytes of what travels to the next stage. dense, tied, experts: parameters on this rank, of `parameter_size` bytes
    each, their gradients of `gradient_size`; a rank holds one copy of what is tied.
    """

    passes: dict[str, PassWork]
    once: list[Operator]
    cached: int
    turned: int
    message: int
    dense: int
    tied: int
    experts: int
    parameter_size: int
    gradient_size: int


# ---------------------------------------------------------------- seeing it
PASSING = "working", "communication buffers"  # parts that have another name if they outlast their pass


class Observer(TorchDispatchMode):
    """Notes every priced operator, and in `memory` what is alive of all that is made meanwhile."""

    def __init__(self, memory: Parts) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.memory = memory
        self.start = self.ended = Bytes()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and to skip it would import it, which takes two seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cost = price(func, args, kwargs or {}, result)
        if cost is not None:
            self.operators.append(Operator(func._opname, cost))
        self.memory.see((args, kwargs), result, cost.workspace if cost else 0)
        if func.namespace == "c10d":
            self.memory.mark(args, "communication buffers")
        return result

    def watch(self, one: Pass, before: Bytes) -> tuple[list[Event], Any]:
        """Run a pass to its end; returns its events, and its result. before: what was alive before its input came.

        What is made in the head is called `logits`, what takes part in a collective `communication buffers`.
        """
        events: list[Event] = []
        name, layer, told, effect, ended = "", -1, -1, None, False
        while True:
            if isinstance(effect, Compute):
                name, layer = effect.name, effect.layer
            elif isinstance(effect, Comm | HostSync):
                effect.work.wait()
            self.memory.name = "logits" if name.startswith("head") else "working"
            piece = self._begin(name, layer)
            self.start = before if not events else self.start
            try:
                with self:
                    effect = next(one)
            except StopIteration as end:
                ended, result = True, end.value
            self._end(piece)
            if piece.operators or piece.left or ended or layer != told:
                events.append(piece)
                told = layer
            if ended:
                return events, result
            if isinstance(effect, Comm):
                events.append(Exchange(effect.name, effect.inside, effect.across))
            elif isinstance(effect, HostSync):
                events.append(Read(effect.name))

    def weights(self, run: Callable[[], None]) -> Piece:
        """Compute weight gradients that have waited."""
        piece = self._begin("weights.W", -1)
        with self:
            run()
        self._end(piece)
        return piece

    def let_go(self, name: str = "", of: Collection[str] = ()) -> Piece:
        """What has been let go since the last piece; what is left `of` these parts is called `name`."""
        self.memory.rename(of, name)
        return Piece("", -1, [], left=difference(self.memory.parts(), self.ended))

    def _begin(self, name: str, layer: int) -> Piece:
        self.operators = []
        self.start = self.memory.begin()
        return Piece(name, layer, self.operators)

    def _end(self, piece: Piece) -> None:
        piece.fullest = difference(self.memory.fullest, self.start)
        self.ended = self.memory.parts()
        piece.left = difference(self.ended, self.start)


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
    weights, passes, memory = numerics.weight_grads, dict[str, PassWork](), Parts("working")

    def arrives(none: bool) -> tuple[Tensor | None, Bytes]:
        before = memory.parts()
        given = None if none else torch.empty(shape, dtype=numerics.dtype, device="meta")
        memory.see((), given)  # a pass holds what it has been given
        return given, before

    def forwards() -> tuple[Microbatch, Tape, PassWork, int]:
        one, observer, tape = batch(), Observer(memory), Tape()
        given, before = arrives(stage.is_first)
        events, out = observer.watch(forward(stage, given, one, tape), before)
        sent = out.nbytes if out is not None else 0
        del given, out
        return one, tape, PassWork([*events, observer.let_go("activations", PASSING)]), sent

    def backwards(one: Microbatch, tape: Tape, split: bool) -> PassWork:
        observer = Observer(memory)
        given, before = arrives(stage.is_last)
        events, out = observer.watch(backward(stage, given, one, tape, weights, split), before)
        del given, out
        of = (*PASSING, "activations", "logits") if split else ()
        events.append(observer.let_go("deferred weights", of))
        return PassWork(events, observer.weights(weights.run) if weights.now and not split else None)

    one, tape, first, message = forwards()
    passes["B"] = backwards(one, tape, split=False)
    memory.rename(("activations",), "quantised weights")  # nothing else has outlasted both passes
    cached = memory.parts()["quantised weights"]
    one, tape, passes["F"], _ = forwards()
    passes["I"] = backwards(one, tape, split=True)
    weights.defer(stage.index)
    observer = Observer(memory)
    passes["W"] = PassWork([observer.weights(lambda: weights.pop(stage.index))])
    once = Counter(first.operators) - Counter(passes["F"].operators)
    sizes = {"dense": 0, "tied": 0, "experts": 0}
    for name, parameter in cast(nn.Module, stage).named_parameters():
        sizes["experts" if share_of(parameter) else "tied" if name in tied else "dense"] += parameter.numel()
    return StageWork(
        passes,
        list(once.elements()),
        cached,
        numerics.turned,
        message,
        **sizes,
        parameter_size=numerics.dtype.itemsize,
        gradient_size=numerics.main_grad_dtype.itemsize,
    )
