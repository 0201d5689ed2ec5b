"""What was seen of one rank or several, for people and for programs: tables, JSON, and whether the ranks agree."""

from collections.abc import Sequence
from typing import Any

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.ranks.communication import Call, disagreements, spans
from launch.simulate.ranks.rank import RankStep
from train.recipe import Recipe


def as_json(steps: Sequence[RankStep]) -> dict[str, Any]:
    """What is known of the ranks, and in what they do not agree."""
    return {"ranks": [one.as_json() for one in steps], "disagreements": disagreements(logs(steps))}


def logs(steps: Sequence[RankStep]) -> dict[int, list[Call]]:
    """Of each rank what it said."""
    return {one.rank: one.calls for one in steps}


def text(steps: Sequence[RankStep], recipe: Recipe, sheet: Sheet) -> str:
    """Tables for the terminal: everything of a single rank; a line each, and whether they agree, of several."""
    return _alone(steps[0], recipe, sheet) if len(steps) == 1 else _together(steps)


def _alone(one: RankStep, recipe: Recipe, sheet: Sheet) -> str:
    where = ", ".join(f"{name} {number}" for name, number in one.place.items())
    title = f"{sheet.name}: rank {one.rank:,} of {recipe.parallel.world_size:,}: {where}"
    stages = " and ".join(map(str, one.stages))
    kept = [(name, f"{each.elements:,}", f"{each.bytes:,}") for name, each in one.buffers.items()]
    said = [
        (
            group.use,
            f"{len(group.ranks):,}: {spans(group.ranks)}",
            what if peer is None else f"{what} {'to' if what == 'send' else 'from'} {peer}",
            f"{times:,}",
            f"{size / 1e9:,.3f}",
        )
        for (group, what, peer), (times, size) in one.spoken().items()
    ]
    return "\n".join(
        [
            title,
            f"stages {stages}, {one.microbatches} micro-batches",
            "",
            *table([("buffers", "elements", "bytes"), *kept]),
            "",
            *table([("communicator", "ranks", "operation", "times", "GB"), *said], left=3),
            "",
            f"most memory at a time: {one.peak / 2**30:.2f} GiB, an allocator's waste not counted",
            f"one step on fake tensors: {one.seconds:.1f} s",
        ]
    )


def _together(steps: Sequence[RankStep]) -> str:
    head = "rank", "position", "stages", "parameters", "optimizer GiB", "most memory GiB", "calls", "GB", "seconds"
    rows = [
        (
            f"{one.rank}",
            f"{one.place['pipeline']}",
            " ".join(map(str, one.stages)),
            f"{one.buffers['parameters'].elements:,}",
            f"{(one.buffers['masters'].bytes + one.buffers['moments'].bytes) / 2**30:.2f}",
            f"{one.peak / 2**30:.2f}",
            f"{len(one.calls):,}",
            f"{sum(call.bytes for call in one.calls) / 1e9:,.1f}",
            f"{one.seconds:.1f}",
        )
        for one in steps
    ]
    found = disagreements(logs(steps))
    groups = {call.group for one in steps for call in one.calls}
    calls = sum(len(one.calls) for one in steps)
    verdict = [f"these ranks agree: {calls:,} calls on {len(groups):,} communicators"]
    return "\n".join([*table([head, *rows], left=0), "", *(found or verdict)])


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of aligned columns, so many of them at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
