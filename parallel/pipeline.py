"""The executor: runs one rank's share of a lowered program. It decides nothing; the program does.

Sends and receives are posted in the program's order and never batched. Only the instruction that consumes a message
waits for its receive; a send is never waited for, only reaped. There is one process group for each direction of travel,
so that a message to the right never queues behind one to the left. What an instruction holds is given back when it
ends: its message with the send, its tape with the backward, its weight gradients' operands one by one.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.linear import WeightGrads
from parallel.mesh import Mesh
from parallel.passes import Microbatch, Pass, Stage, Tape, backward, forward, merge
from parallel.schedule import lower
from parallel.schedule.program import Instruction, Message, Program, makes, needs, passes, spell
from parallel.trace import OFF, Trace

SENDS_IN_FLIGHT = 4  # more than these, and the oldest is waited for, so that its memory returns


@dataclass
class Messages:
    """What travels between the pipeline ranks of one pipeline, and within this rank from stage to stage."""

    mesh: Mesh
    dtype: torch.dtype
    device: torch.device
    trace: Trace
    made: dict[Message, Tensor] = field(default_factory=dict)
    arriving: dict[Message, tuple[Any, Tensor]] = field(default_factory=dict)
    leaving: deque[tuple[Any, Tensor]] = field(default_factory=deque)

    def send(self, message: Message, peer: int) -> None:
        """Post; the tensor is held until the send is done. Safe: the program also finishes if every send blocks."""
        tensor = self.made.pop(message).contiguous()
        work = self.mesh.travel(self.mesh.pipeline_rank, peer).send([tensor], peer, 0)
        self.trace.post("pipeline", f"send {spell(message)}", work, tensor.nbytes)
        self.leaving.append((work, tensor))
        while self.leaving and (len(self.leaving) > SENDS_IN_FLIGHT or self.leaving[0][0].is_completed()):
            self.trace.wait("pipeline", "send", self.leaving.popleft()[0])

    def receive(self, message: Message, peer: int, shape: tuple[int, ...]) -> None:
        """Post a receive of a tensor of `shape`."""
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        work = self.mesh.travel(peer, self.mesh.pipeline_rank).recv([tensor], peer, 0)
        self.trace.post("pipeline", f"receive {spell(message)}", work, tensor.nbytes)
        self.arriving[message] = work, tensor

    def take(self, message: Message) -> Tensor:
        """What a pass starts from: handed over on this rank, or received; only the consumer waits."""
        if message in self.made:
            return self.made.pop(message)
        work, tensor = self.arriving.pop(message)
        self.trace.wait("pipeline", "receive", work)
        return tensor

    def finish(self) -> None:
        """Wait for the sends that are left."""
        while self.leaving:
            self.trace.wait("pipeline", "send", self.leaving.popleft()[0])


class Pipeline:
    """One rank of one pipeline: its stages, and the programs that it has run so far, lowered once each.

    After a step `peak_tapes` and `peak_deferred` say how many micro-batches' activations, and how many groups of
    deferred weight gradients, it held at most: what the program's own counts promise.
    """

    def __init__(
        self,
        mesh: Mesh,
        stages: Mapping[int, Stage],
        weights: WeightGrads,
        dtype: torch.dtype,
        device: torch.device,
        reduce: Callable[[int], None] = lambda stage: None,
        trace: Trace = OFF,
    ) -> None:
        """stages: those held here, by number. dtype: of every message. reduce: starts to sum a stage's gradients."""
        self.mesh, self.stages, self.weights, self.reduce, self.trace = mesh, stages, weights, reduce, trace
        self.dtype, self.device = dtype, device
        self.peak_tapes = self.peak_deferred = 0
        self._lowered: dict[Program, list[Instruction]] = {}

    def step(self, program: Program, batches: Mapping[int, Microbatch]) -> None:
        """Run `program` on the micro-batches; losses are in the batches afterwards, gradients in `main_grad`.

        batches: all micro-batches of this pipeline by number (tokens where a first or last stage needs them).
        """
        if program not in self._lowered:
            self._lowered[program] = lower(program)[self.mesh.pipeline_rank]
        self.messages = Messages(self.mesh, self.dtype, self.device, self.trace)
        self.tapes: dict[tuple[int, int], Tape] = {}
        self.peak_tapes = self.peak_deferred = 0
        for instruction in self._lowered[program]:
            match instruction:
                case ("SEND", kind, stage, mb, peer):
                    self.messages.send((kind, stage, mb), peer)
                case ("RECV", kind, stage, mb, peer):
                    self.messages.receive((kind, stage, mb), peer, batches[mb].shape)
                case ("R", stage):
                    self._run_weights()
                    self.reduce(stage)
                case _:
                    self._run_weights()
                    with self.trace.span("instruction", spell(instruction)):
                        self._compute(program, instruction, batches)
        self._run_weights()
        self.messages.finish()
        assert not (self.tapes or self.messages.made or self.messages.arriving or self.weights.groups)

    def _run_weights(self) -> None:
        """The weight gradients that the last instruction left until its messages were posted."""
        if self.weights.now:
            with self.trace.span("compute", "weights.W"):
                self.weights.run()

    def _compute(self, program: Program, instruction: Instruction, batches: Mapping[int, Microbatch]) -> None:
        """Run one instruction: its passes, merged if it is a pair, or its stage's oldest group of weight gradients."""
        if instruction[0] == "W":
            self.weights.pop(instruction[1])
            return
        todo = passes(instruction)[::-1]  # of a pair the backward goes first: its communication is ready at once
        running = [self._start(program, kind, stage, batches[mb]) for kind, stage, mb in todo]
        results = merge(*running, trace=self.trace)
        for (kind, stage, mb), result in zip(todo, results, strict=True):
            for message in makes(program, (kind, stage, mb)):
                self.messages.made[message] = result
            if kind != "F" or program.kind == "eval":
                del self.tapes[stage, mb]
            if kind == "I":
                self.weights.defer(stage)
                self.peak_deferred = max(self.peak_deferred, len(self.weights.groups))

    def _start(self, program: Program, kind: str, number: int, batch: Microbatch) -> Pass:
        """The pass of a one-pass instruction, with what it starts from."""
        stage = self.stages[number]
        received = [self.messages.take(message) for message in needs(program, (kind, number, batch.index))]
        source = received[0] if received else None
        if kind == "F":
            tape = self.tapes[number, batch.index] = []
            self.peak_tapes = max(self.peak_tapes, len(self.tapes))
            return forward(stage, source, batch, tape)
        return backward(stage, source, batch, self.tapes[number, batch.index], self.weights, split=kind == "I")
