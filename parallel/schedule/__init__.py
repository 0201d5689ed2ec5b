"""Pipeline schedules by name: `build` writes and proves a program, `lower` turns it into what each rank issues.

To add one, write a function of (ranks, microbatches) that returns a `Program`, and name it in `SCHEDULES`. What it
cannot serve it refuses with a `UserError`; everything else follows from the program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from parallel.errors import UserError
from parallel.schedule.dualpipe import dualpipe, dualpipev
from parallel.schedule.gpipe import gpipe
from parallel.schedule.lowering import lower
from parallel.schedule.one_f_one_b import interleaved, one_f_one_b
from parallel.schedule.program import Instruction, Message, Program, ProgramError
from parallel.schedule.verifier import verify
from parallel.schedule.zero_bubble import zb_h1, zbv

__all__ = [
    "SCHEDULES",
    "Instruction",
    "Message",
    "Program",
    "ProgramError",
    "Schedule",
    "build",
    "generate",
    "lower",
    "named",
    "verify",
]


@dataclass(frozen=True)
class Schedule:
    """A generator of programs, a function of (ranks, microbatches).

    multiple: what it wants micro-batches to be a multiple of. chunked: it also takes the number of stages a rank.
    """

    generator: Callable[..., Program]
    multiple: int = 1
    chunked: bool = False


SCHEDULES = {
    "gpipe": Schedule(gpipe),
    "1f1b": Schedule(one_f_one_b),
    "interleaved": Schedule(interleaved, chunked=True),
    "zb-h1": Schedule(zb_h1),
    "zbv": Schedule(zbv),
    "dualpipe": Schedule(dualpipe, multiple=2),
    "dualpipev": Schedule(dualpipev),
}


def named(name: str) -> Schedule:
    """The schedule `name` (`parallel.schedule`). Raises UserError for an unknown one."""
    if name not in SCHEDULES:
        near = get_close_matches(name, SCHEDULES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"parallel.schedule={name}: expected one of {', '.join(SCHEDULES)}{hint}")
    return SCHEDULES[name]


def generate(name: str, ranks: int, microbatches: int, chunks: int = 2) -> Program:
    """The program of schedule `name` for so many ranks and micro-batches a step, as its generator writes it.

    chunks: stages a rank, where the schedule leaves them open. Raises UserError for what the schedule cannot serve.
    """
    schedule = named(name)
    for key, value in (("pipeline", ranks), ("microbatches", microbatches), ("chunks", chunks)):
        if value < 1:
            raise UserError(f"parallel.{key}={value}: expected at least 1")
    return schedule.generator(ranks, microbatches, *([chunks] if schedule.chunked else []))


def build(name: str, ranks: int, microbatches: int, chunks: int = 2) -> Program:
    """`generate`, verified."""
    program = generate(name, ranks, microbatches, chunks)
    verify(program)
    return program
