"""Rows 1 to 3: a rank is killed while a checkpoint is written. Some whole one is left, exactly as it was saved.

Ranks are real processes, killed where the disk is touched; `launch` kills those of running jobs.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.train.checkpoint import states
from tests.train.checkpoint.states import checkpoints, killed_at, save, state_at, world
from train.checkpoint import directory as names
from train.checkpoint import disk


def save_watched(directory: Path, rank: int, boundary: int, log: Path) -> None:
    """Save step 20 anew, with other contents; rank `rank` dies at its so-manieth step on the disk (0: never)."""
    seen = killed_at(rank, boundary)
    ours = checkpoints(directory)
    ours.save(20, state_at(21), {"tokens": 210})
    ours.wait()
    (log / str(dist.get_rank())).write_text("\n".join(seen))
    os._exit(0)


def found(directory: Path) -> list[str]:
    """Of each committed checkpoint, read by its explicit step: whether all of it is the old or the new contents."""
    ours, kinds = checkpoints(directory), []
    for step in names.committed(directory):
        saved, state = ours.find(step), states.blank()
        ours.load(saved, state)
        [kind] = [at for at in (step, step + 1) if states.same(state, state_at(at))]
        assert saved.meta["tokens"] == 10 * kind, "the description belongs to the state"
        kinds.append(f"{step}: {'old' if kind == step else 'new'}")
    return kinds


@pytest.fixture(scope="module", params=[False, True], ids=["a new step", "a step that exists"])
def history(request, workers, tmp_path_factory):
    """A folder with the steps 10 and perhaps 20, and what each of two ranks does to the disk to save step 20."""
    folder = tmp_path_factory.mktemp("history")
    workers(1).run(save, folder / "checkpoints", 10, *([20] if request.param else []))
    shutil.copytree(folder / "checkpoints", folder / "whole")
    assert world(2, save_watched, folder / "whole", -1, 0, folder) == [0, 0]
    return folder / "checkpoints", request.param, [(folder / str(rank)).read_text().split("\n") for rank in (0, 1)]


def kill_everywhere(history, folder: Path, workers, boundaries) -> None:
    """One try for each of these boundaries; afterwards the step is old (or not there) or new, and saving works."""
    origin, exists, steps = history
    before = ["10: old", "20: old"] if exists else ["10: old"]
    commit = steps[0].index("renamed step-00000020")
    for rank, number in boundaries(steps, commit):
        copy = folder / f"{rank}-{number}"
        shutil.copytree(origin, copy)
        codes = world(2, save_watched, copy, rank, number, folder)
        assert codes[rank] == -9, f"rank {rank} was killed at {steps[rank][number - 1]}"
        [left] = workers(1).run(found, copy)
        if rank == 0:
            assert left == (["10: old", "20: new"] if number > commit else before), steps[0][number - 1]
        assert left in (before, ["10: old", "20: new"]), f"rank {rank} at {steps[rank][number - 1]}"
        if number % 4 == 1:
            workers(1).run(save, copy, 30)
            assert sorted(path.name for path in copy.iterdir())[-1] == "step-00000030"
            assert not [path.name for path in copy.iterdir() if not path.name.removeprefix("step-").isdecimal()]
        shutil.rmtree(copy)


@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.fault(3)
def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_old_or_the_new(history, workers, tmp_path):
    """At the start, in the middle of a file, and on both sides of each rename of rank 0."""

    def some(steps, commit):
        renames = [number for number, step in enumerate(steps[0], 1) if step.startswith("rename")]
        return [(0, 3), (1, 2), *((0, number) for number in renames if abs(number - commit) < 4)][:6]

    kill_everywhere(history, tmp_path, workers, some)


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.fault(3)
def test_a_rank_killed_at_any_step_of_a_save_leaves_the_old_or_the_new(history, workers, tmp_path):
    def every(steps, commit):
        return [(rank, number) for rank in (0, 1) for number in range(1, len(steps[rank]) + 1)]

    kill_everywhere(history, tmp_path, workers, every)


def read_while_written(directory: Path) -> list[str]:
    """What is committed at each step of a save on the disk: never half of a checkpoint, never none."""
    seen, ours = [], checkpoints(directory)
    before = {path: path.read_bytes() for path in (directory / "step-00000020").iterdir()}

    def observer(operation: str, path: Path) -> None:
        kept = names.path_of(directory, 20)
        contents = {each.name: each.read_bytes() for each in kept.iterdir()}
        old = contents == {path.name: data for path, data in before.items()}
        seen.append("old" if old else json.loads(contents["manifest.json"])["meta"]["tokens"])

    disk.observer = observer
    try:
        ours.save(20, state_at(21), {"tokens": 210})
        ours.finish()
    finally:
        disk.observer = disk.ignore
    return seen


@pytest.mark.fault(2)
def test_a_committed_checkpoint_is_never_written_into_and_at_each_instant_one_is_whole(workers, tmp_path):
    workers(1).run(save, tmp_path, 20)
    [seen] = workers(1).run(read_while_written, tmp_path)
    change = seen.index(210)
    assert seen[:change] == ["old"] * change and seen[change:] == [210] * (len(seen) - change) and change > 5
