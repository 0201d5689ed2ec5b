"""Lockstep: every rank of an expert group issues the same collectives in the same order, known before they are issued.

What a rank issues in a step is a function of the program and of the layers of its stages only. `predict` finds it by
walking the passes symbolically, through the very `merge` that runs them. `agree` compares logs over an expert group by
their digests. Why: two collectives of equal size that ranks issue in opposite order swap their data in silence.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from parallel.experts.dispatch import Combine, Dispatch, Tag, issues_once
from parallel.experts.local import Nothing
from parallel.passes import Comm, Pass, Segment, merge
from parallel.schedule.program import Program, passes

Exchange = tuple[str, int]  # ("dispatch" | "combine", global layer number)
Issues = Callable[[str], Sequence[str]]  # `Dispatcher.issues`


def exchanges(segments: Iterable[Segment]) -> list[Exchange]:
    """What a stage sends to its experts and back, in the order of its forward."""
    return [(segment.name, segment.layer) for segment in segments if isinstance(segment, Dispatch | Combine)]


def predict(
    program: Program, rank: int, stages: Mapping[int, Sequence[Exchange]], issues: Issues = issues_once
) -> list[Tag]:
    """What pipeline rank `rank` issues on its expert group in a step; stages: the exchanges of those that it holds."""
    log: list[Tag] = []
    for instruction in program.program[rank]:
        halves = [half for half in passes(instruction) if half[0] != "W"]
        merge(*(_walk(kind, stage, mb, stages[stage], issues, log) for kind, stage, mb in reversed(halves)))
    return log


def _walk(kind: str, stage: int, mb: int, visits: Sequence[Exchange], issues: Issues, log: list[Tag]) -> Pass:
    """A pass that only logs what it would issue. Backward visits the exchanges in reverse."""
    for name, layer in visits if kind == "F" else reversed(visits):
        operation = name if kind == "F" else f"{name}.B"
        log.extend(Tag(each, stage, mb, layer) for each in issues(operation))
        yield Comm(operation, Nothing(), 0, 0, None)


def digest(log: Iterable[Tag]) -> str:
    """SHA-256 of a log: the same in every process."""
    text = "\n".join(f"{tag.operation} {tag.stage} {tag.microbatch} {tag.layer}" for tag in log)
    return hashlib.sha256(text.encode()).hexdigest()


def agree(group: dist.ProcessGroup, log: Sequence[Tag]) -> None:
    """Compare this rank's log with those of the group, whose ranks all call this at the same time.

    Raises RuntimeError, on all of them, that names the first entry in which two ranks differ.
    """
    digests = _gather(group, digest(log))
    if len(set(digests)) == 1:
        return
    ranks, logs = dist.get_process_group_ranks(group), _gather(group, list(log))
    for position, entries in enumerate(zip_longest(*logs)):
        if len(set(entries)) > 1:
            who = {entry: [rank for rank, one in zip(ranks, entries, strict=True) if one == entry] for entry in entries}
            said = "; ".join(f"{_spell(entry)} on ranks {ranks}" for entry, ranks in who.items())
            raise RuntimeError(f"an expert group is out of step: its collective number {position} is {said}")


def _gather(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """The values of all ranks of the group, in its order."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _spell(tag: Tag | None) -> str:
    """An entry of a log in words."""
    if tag is None:
        return "none"
    return f"{tag.operation} of stage {tag.stage}, micro-batch {tag.microbatch}, layer {tag.layer}"
