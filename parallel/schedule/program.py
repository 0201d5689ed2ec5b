"""A training step as plain data: for each pipeline rank, the list of instructions that it runs.

Generators (`dualpipe`, `one_f_one_b`, `zero_bubble`, ...) write a `Program`, `verifier` proves it, `lowering` adds the
sends and receives, the executor runs it and `launch.draw` draws it; none of them derives the order again. An
instruction is a tuple: `("F", stage, mb)` forward, `("B", stage, mb)` backward, `("I", stage, mb)` its input-gradient
half, `("W", stage, mb)` its weight-gradient half, `("FB", stage, mb, stage, mb)` a forward overlapped with a backward.
What passes between ranks is a message `(kind, stage, mb)`: `("F", s, m)` is what F(s, m) makes for F(s+1, m),
`("B", s, m)` what B or I(s, m) makes for the backward of (s-1, m). See docs/explanations/pipeline.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

from parallel.errors import UserError

Instruction = tuple[Any, ...]
Message = tuple[str, int, int]

# Units of the report's Figure 5: both halves of a backward cost as much as a forward; overlapping saves nothing.
UNIT_COSTS: Mapping[str, float] = {"F": 1, "B": 2, "I": 1, "W": 1, "FB": 3}


class ProgramError(ValueError):
    """A program that cannot run as written; the message says at which rank and position, and why."""


@dataclass(frozen=True)
class Program:
    """One step of one pipeline.

    kind: "train", or "eval" (forwards only); placement[rank]: the stages which that rank holds; program[rank]: its
    instructions, in order. Several ranks may hold a stage; the rank that runs F(s, m) also runs the backward of (s, m).
    """

    kind: str
    stages: int
    ranks: int
    microbatches: int
    placement: tuple[tuple[int, ...], ...]
    program: tuple[tuple[Instruction, ...], ...]

    @cached_property
    def _hosts(self) -> dict[tuple[int, int], int]:
        runs = ((rank, ins) for rank, instructions in enumerate(self.program) for ins in instructions)
        return {(ins[1], ins[2]): rank for rank, ins in runs if ins[0] in ("F", "FB")}

    def host(self, stage: int, mb: int) -> int:
        """The rank that runs F(stage, mb), and therefore its backward too."""
        return self._hosts[stage, mb]

    def holders(self, stage: int) -> list[int]:
        """The ranks that hold `stage`, and reduce its gradients together."""
        return [rank for rank, stages in enumerate(self.placement) if stage in stages]

    def evaluation(self) -> "Program":
        """The forwards of this program in the same order: a subsequence of a program that ends, ends."""
        forwards = tuple(tuple(p for ins in each for p in passes(ins) if p[0] == "F") for each in self.program)
        return replace(self, kind="eval", program=forwards)

    def ends(self, costs: Mapping[str, float] = UNIT_COSTS, delay: float = 0.0) -> list[list[float]]:
        """When each instruction ends, per rank, if messages take only `delay`: the ideal step.

        Raises ProgramError if the ranks wait for each other in a circle.
        """
        clock = [0.0] * self.ranks
        arrives: dict[Message, float] = {}
        ends: list[list[float]] = [[] for _ in range(self.ranks)]
        progress = True
        while progress:
            progress = False
            for rank, instructions in enumerate(self.program):
                while len(ends[rank]) < len(instructions):
                    ins = instructions[len(ends[rank])]
                    inputs = needs(self, ins)
                    if any(msg not in arrives for msg in inputs):
                        break
                    clock[rank] = max([clock[rank], *(arrives[msg] for msg in inputs)]) + costs[ins[0]]
                    for msg in makes(self, ins):
                        source, target = route(self, msg)
                        arrives[msg] = clock[rank] + (delay if source != target else 0)
                    ends[rank].append(clock[rank])
                    progress = True
        stuck = []
        for rank, instructions in enumerate(self.program):
            if (at := len(ends[rank])) < len(instructions):
                kind, stage, mb = next(msg for msg in needs(self, instructions[at]) if msg not in arrives)
                stuck.append(f"{place(rank, at, instructions[at])} for what {kind}({stage}, {mb}) makes")
        if stuck:
            raise ProgramError(f"the ranks wait for each other in a circle: {'; '.join(stuck)}")
        return ends

    def idle(self, costs: Mapping[str, float] = UNIT_COSTS) -> list[float]:
        """The bubble: how long each rank computes nothing in the ideal step."""
        makespan = max(ends[-1] for ends in self.ends(costs))
        return [makespan - sum(costs[ins[0]] for ins in instructions) for instructions in self.program]

    def peak_tapes(self) -> list[int]:
        """Most micro-batches whose activations each rank holds at once; a pair adds the new before it frees the old."""
        peaks = []
        for instructions in self.program:
            live = peak = 0
            for kind, *_ in (p for ins in instructions for p in passes(ins)):
                live += (kind == "F") - (kind in "BI")
                peak = max(peak, live)
            peaks.append(peak)
        return peaks

    def peak_deferred(self) -> list[int]:
        """Most groups of weight gradients that wait at once on each rank: made by an I, not yet run by their W."""
        waiting = (accumulate((ins[0] == "I") - (ins[0] == "W") for ins in row) for row in self.program)
        return [max(counts, default=0) for counts in waiting]

    def to_json(self) -> str:
        """The program as JSON text (version 1), one rank a line."""
        rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in self.program)
        head = {"version": 1, "kind": self.kind, "stages": self.stages, "ranks": self.ranks}
        head |= {"microbatches": self.microbatches, "placement": self.placement}
        return f'{json.dumps(head)[:-1]},\n "program": [\n{rows}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Program":
        """The inverse of `to_json`; UserError if the text is no program (whether it can run is for `verify` to say)."""
        try:
            data = json.loads(text)
            if data["version"] != 1:
                raise UserError(f"program JSON: version={data['version']!r}, but only version 1 is known")
            return cls(
                kind=str(data["kind"]),
                stages=int(data["stages"]),
                ranks=int(data["ranks"]),
                microbatches=int(data["microbatches"]),
                placement=tuple(tuple(stages) for stages in data["placement"]),
                program=tuple(tuple(tuple(ins) for ins in instructions) for instructions in data["program"]),
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"program JSON: not a program ({type(error).__name__}: {error})") from error


def passes(ins: Instruction) -> list[Instruction]:
    """The one-pass halves of an instruction, forward first."""
    return [("F", *ins[1:3]), ("B", *ins[3:])] if ins[0] == "FB" else [ins]


def needs(program: Program, ins: Instruction) -> list[Message]:
    """The messages that an instruction starts from; none for what a first forward reads or a last backward begins."""
    messages: list[Message] = []
    for kind, stage, mb in passes(ins):
        if kind == "F" and stage > 0:
            messages.append(("F", stage - 1, mb))
        if kind in ("B", "I") and stage < program.stages - 1:
            messages.append(("B", stage + 1, mb))
    return messages


def makes(program: Program, ins: Instruction) -> list[Message]:
    """The messages that an instruction leaves for others; in an evaluation too, forwards only."""
    messages: list[Message] = []
    for kind, stage, mb in passes(ins):
        if kind == "F" and stage < program.stages - 1:
            messages.append(("F", stage, mb))
        if kind in ("B", "I") and stage > 0:
            messages.append(("B", stage, mb))
    return messages


def route(program: Program, msg: Message) -> tuple[int, int]:
    """(sending rank, receiving rank) of a message; equal when it is handed over inside a rank."""
    kind, stage, mb = msg
    return program.host(stage, mb), program.host(stage + 1 if kind == "F" else stage - 1, mb)


@cache
def spell(ins: Instruction) -> str:
    """An instruction or a message in words: `F(0, 3)`."""
    return f"{ins[0]}({', '.join(map(str, ins[1:]))})"


def place(rank: int, position: int, ins: Instruction) -> str:
    """How refusals name an instruction: its rank, its position in the rank's list, and itself."""
    return f"rank {rank}, position {position}, {spell(ins)}"
