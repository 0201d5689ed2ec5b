"""Programs of all schedules, for tests of what every schedule must have."""

from parallel.errors import UserError
from parallel.schedule import SCHEDULES, Program, build


def of_every_schedule(*sizes: tuple[int, int]) -> list[Program]:
    """A program of every schedule for each (ranks, micro-batches) that it can serve."""
    programs = []
    for name in SCHEDULES:
        for ranks, microbatches in sizes:
            try:
                programs.append(build(name, ranks, microbatches))
            except UserError:
                continue
    return programs
