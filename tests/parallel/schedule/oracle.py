"""The oracle: runs a program on threads, one a rank, and looks at what comes out. It shares no code with the verifier.

Every pass computes an exact integer from its stage, its micro-batch and what it starts from, so work that is lost,
doubled, misplaced or fed with the wrong input gives other losses or gradients than plain loops over the model do.
Lowered lists run in `rendezvous`: a send, a receive or a reduction goes on only when all its sides have come, and they
are paired by who meets whom, never by the name of the message. Programs that are not lowered run in `mailboxes`, where
a message waits for whoever needs it. A deadlock is seen at once and for certain: all that still run are blocked.
"""

import hashlib
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from parallel.schedule import Instruction, Program


class Broken(Exception):
    """The run deadlocked, used what is not there, or came to a wrong result."""


def digest(*parts: object) -> int:
    """An integer that stands for a value and all it was made of. Sums of Python's own hashes of tuples do collide."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


class Crossing:
    """Where threads meet and leave messages, and where all of them stop as soon as one breaks or none can move."""

    def __init__(self, threads: int) -> None:
        self.lock = threading.Lock()
        self.wake = [threading.Semaphore(0) for _ in range(threads)]
        self.running, self.blocked = threads, 0
        self.waiting: defaultdict[Hashable, dict[int, Any]] = defaultdict(dict)  # place: who waits, with what in hand
        self.results: dict[int, Any] = {}
        self.boxes: dict[Hashable, Any] = {}
        self.broken: str | None = None

    def meet(self, me: int, where: Hashable, parties: int, offer: Any) -> list[Any]:
        """Wait until so many threads stand at `where`; the offers of all, by thread."""
        with self.lock:
            self.waiting[where][me] = offer
            if len(self.waiting[where]) == parties:
                offers = self.waiting.pop(where)
                self._release(offers, [offers[each] for each in sorted(offers)], me)
            else:
                self._block(f"{where}")
        return self._resume(me)

    def put(self, me: int, name: Hashable, value: Any) -> None:
        """Leave a message; there is no second of its name."""
        with self.lock:
            if name in self.boxes:
                raise Broken(f"{name} is made twice")
            self.boxes[name] = value
            if self.waiting[name]:
                taker = next(iter(self.waiting.pop(name)))
                self._release([taker], self.boxes.pop(name), me)

    def take(self, me: int, name: Hashable) -> Any:
        """Wait for a message, which is then gone."""
        with self.lock:
            if name in self.boxes:
                self._release([me], self.boxes.pop(name), me)
            else:
                self.waiting[name][me] = None
                self._block(f"{name}")
        return self._resume(me)

    def leave(self, reason: str | None = None) -> None:
        """A thread is done, or broke for a reason."""
        with self.lock:
            self.running -= 1
            if reason is not None:
                self._stop(reason)
            elif self.running and self.blocked == self.running:
                self._stop("deadlock")

    def _block(self, reason: str) -> None:
        self.blocked += 1
        if self.blocked == self.running:
            self._stop(f"deadlock, lastly at {reason}")

    def _release(self, who: Sequence[int] | dict[int, Any], result: Any, me: int) -> None:
        for each in who:
            self.results[each] = result
            self.blocked -= each != me
            self.wake[each].release()

    def _stop(self, reason: str) -> None:
        self.broken = self.broken or reason
        for semaphore in self.wake:
            semaphore.release()

    def _resume(self, me: int) -> Any:
        self.wake[me].acquire()
        if self.broken is not None:
            raise Broken(self.broken)
        return self.results.pop(me)


class Worker:
    """One rank: the stages that it holds, and what it has at the moment. A subclass says how messages travel."""

    def __init__(self, program: Program, rank: int, crossing: Crossing) -> None:
        self.program, self.rank, self.crossing = program, rank, crossing
        self.last = program.stages - 1
        self.loss = self.peak_tapes = self.peak_deferred = 0
        self.gradients = dict.fromkeys(program.placement[rank], 0)
        self.inputs: dict[tuple[int, int], int] = {}
        self.deferred: dict[int, deque[tuple[int, int]]] = {stage: deque() for stage in program.placement[rank]}

    def fetch(self, kind: str, stage: int, mb: int) -> int:
        raise NotImplementedError

    def hand_over(self, kind: str, stage: int, mb: int, value: int) -> None:
        raise NotImplementedError

    def run(self, ins: Instruction) -> None:
        """One instruction. The halves of a pair run at once, so the backward needs what is there before the forward."""
        match ins:
            case ("F", stage, mb):
                self.forward(stage, mb, self.input(stage, mb))
            case ("B" | "I" as kind, stage, mb):
                self.backward(kind, stage, mb, self.output_gradient(stage, mb))
            case ("FB", stage, mb, other, behind):
                x, dy = self.input(stage, mb), self.output_gradient(other, behind)
                assert (other, behind) in self.inputs
                self.forward(stage, mb, x)
                self.backward("B", other, behind, dy)
            case ("W", stage, mb):
                self.gradients[stage] += digest("W", stage, mb, *self.deferred[stage].popleft())
            case _:
                raise Broken(f"{ins}: unknown")

    def input(self, stage: int, mb: int) -> int:
        return self.fetch("F", stage - 1, mb) if stage > 0 else digest("tokens", range(self.program.microbatches)[mb])

    def output_gradient(self, stage: int, mb: int) -> int:
        return self.fetch("B", stage + 1, mb) if stage < self.last else digest("loss", mb)

    def forward(self, stage: int, mb: int, x: int) -> None:
        assert stage in self.gradients and (stage, mb) not in self.inputs
        y = digest("F", stage, mb, x)
        if self.program.kind == "train":
            self.inputs[stage, mb] = x
            self.peak_tapes = max(self.peak_tapes, len(self.inputs))
        if stage < self.last:
            self.hand_over("F", stage, mb, y)
        else:
            self.loss += y

    def backward(self, kind: str, stage: int, mb: int, dy: int) -> None:
        x = self.inputs.pop((stage, mb))
        if kind == "I":
            self.deferred[stage].append((x, dy))
            self.peak_deferred = max(self.peak_deferred, sum(map(len, self.deferred.values())))
        else:
            self.gradients[stage] += digest("W", stage, mb, x, dy)
        if stage > 0:
            self.hand_over("B", stage, mb, digest("B", stage, mb, x, dy))

    def is_empty(self) -> bool:
        return not self.inputs and not any(self.deferred.values())


class Buffered(Worker):
    """Messages are left in mailboxes, which hold any number."""

    def fetch(self, kind: str, stage: int, mb: int) -> int:
        return self.crossing.take(self.rank, (kind, stage, mb))

    def hand_over(self, kind: str, stage: int, mb: int, value: int) -> None:
        self.crossing.put(self.rank, (kind, stage, mb), value)


class Blocking(Worker):
    """Messages stay on the rank until it meets the other side of a transfer; queues between ranks hold nothing."""

    def __init__(self, program: Program, rank: int, crossing: Crossing) -> None:
        super().__init__(program, rank, crossing)
        self.here: dict[tuple[str, int, int], int] = {}

    def fetch(self, kind: str, stage: int, mb: int) -> int:
        return self.here.pop((kind, stage, mb))

    def hand_over(self, kind: str, stage: int, mb: int, value: int) -> None:
        assert (kind, stage, mb) not in self.here
        self.here[kind, stage, mb] = value

    def run(self, ins: Instruction) -> None:
        match ins:
            case ("SEND", kind, stage, mb, peer):
                self.crossing.meet(self.rank, ("from", self.rank, "to", peer), 2, self.here.pop((kind, stage, mb)))
            case ("RECV", kind, stage, mb, peer):
                offers = self.crossing.meet(self.rank, ("from", peer, "to", self.rank), 2, None)
                self.hand_over(kind, stage, mb, next(offer for offer in offers if offer is not None))
            case ("R", stage):
                holders = tuple(rank for rank, stages in enumerate(self.program.placement) if stage in stages)
                parts = self.crossing.meet(self.rank, ("among", *holders), len(holders), self.gradients[stage])
                self.gradients[stage] = digest("R", stage, sum(parts))
            case _:
                super().run(ins)

    def is_empty(self) -> bool:
        return super().is_empty() and not self.here


def by_loops(program: Program) -> tuple[int, dict[int, int]]:
    """(loss, {stage: gradient}) of the step, computed in two plain loops."""
    loss, gradients = 0, dict.fromkeys(range(program.stages), 0)
    for mb in range(program.microbatches):
        x, inputs = digest("tokens", mb), []
        for stage in range(program.stages):
            inputs.append(x)
            x = digest("F", stage, mb, x)
        loss += x
        dy = digest("loss", mb)
        for stage in reversed(range(program.stages) if program.kind == "train" else ()):
            gradients[stage] += digest("W", stage, mb, inputs[stage], dy)
            dy = digest("B", stage, mb, inputs[stage], dy)
    return loss, gradients


def on_threads(
    program: Program, rows: Sequence[Sequence[Instruction]], kind: Callable[[Program, int, Crossing], Worker]
) -> list[Worker]:
    """The workers after each has run its row on a thread of its own; Broken if they could not, or something is left."""
    crossing = Crossing(program.ranks)
    workers = [kind(program, rank, crossing) for rank in range(program.ranks)]

    def work(worker: Worker) -> None:
        try:
            for ins in rows[worker.rank]:
                worker.run(ins)
            crossing.leave()
        except Exception as error:
            crossing.leave(f"rank {worker.rank}: {error!r}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if crossing.broken is not None:
        raise Broken(crossing.broken)
    if crossing.boxes or not all(worker.is_empty() for worker in workers):
        raise Broken("something is left over")
    if sum(worker.loss for worker in workers) != by_loops(program)[0]:
        raise Broken("another loss")
    return workers


def mailboxes(program: Program) -> None:
    """Run a program that is not lowered; Broken if it is not one sound step."""
    total: Counter[int] = Counter()
    for worker in on_threads(program, program.program, Buffered):
        total.update(worker.gradients)
    if total != by_loops(program)[1]:
        raise Broken("other gradients")


def rendezvous(program: Program, lowered: Sequence[Sequence[Instruction]]) -> list[Worker]:
    """The workers after running lowered lists, of which `program` gives kind, sizes and placement.

    Broken if they are not one sound step.
    """
    _, expected = by_loops(program)
    workers = on_threads(program, lowered, Blocking)
    for worker in workers:
        for stage, gradient in worker.gradients.items():
            whole = digest("R", stage, expected[stage]) if program.kind == "train" else 0
            if gradient != whole:
                raise Broken(f"rank {worker.rank}, stage {stage}: another gradient")
    return workers
