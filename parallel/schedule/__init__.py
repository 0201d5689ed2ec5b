"""Pipeline schedules by name: `build` writes and proves a program, `lower` turns it into what each rank issues.

To add one, write a function of (ranks, microbatches) that returns a `Program`, and name it here.
"""

import difflib
from collections.abc import Callable

from parallel.errors import UserError
from parallel.schedule.dualpipe import dualpipe
from parallel.schedule.lowering import lower
from parallel.schedule.one_f_one_b import one_f_one_b
from parallel.schedule.program import Instruction, Message, Program, ProgramError
from parallel.schedule.verifier import verify

__all__ = ["SCHEDULES", "Instruction", "Message", "Program", "ProgramError", "build", "lower", "verify"]

SCHEDULES: dict[str, Callable[[int, int], Program]] = {"1f1b": one_f_one_b, "dualpipe": dualpipe}


def build(name: str, ranks: int, microbatches: int) -> Program:
    """The verified program of schedule `name` (`parallel.schedule`) for so many ranks and micro-batches a step.

    Raises UserError for an unknown name, or for numbers that the schedule cannot serve.
    """
    if name not in SCHEDULES:
        close = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"parallel.schedule={name}: expected one of {', '.join(sorted(SCHEDULES))}{hint}")
    program = SCHEDULES[name](ranks, microbatches)
    verify(program)
    return program
