"""Rows 9 and 10: file systems that are full, or cannot be written. Real ones, of 1 MB."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.commands import records, train
from tests.train.checkpoint.states import checkpoints, state_at
from train.checkpoint import checkpoints as saving
from train.checkpoint import directory as names


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, mounted here."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill_the_disk(directory: Path) -> list:
    """Three saves of which the disk holds two, room made, and a fourth."""
    saving.PAUSE_SECONDS, told = 0.01, []
    ours = checkpoints(directory)
    for step in (1, 2, 3, 4):
        if step == 4 and dist.get_rank() == 0:
            shutil.rmtree(directory / "step-00000001")
        dist.barrier()
        state = state_at(step) | {"padding": {f"rank {dist.get_rank()}": torch.full((50_000,), float(step))}}
        ours.save(step, state, {"tokens": 10 * step})
        ours.wait()
        dist.barrier()
        figures, warnings = ours.take()
        left = sorted(path.name for path in directory.iterdir())
        told.append((step, names.committed(directory), len(left), figures.get("checkpoint_failures", 0), warnings))
        dist.barrier()
    return told


@pytest.mark.fault(9)
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(workers, small_disk):
    answers = workers(2).run(fill_the_disk, small_disk / "checkpoints")
    assert answers[0] == answers[1], "all ranks agree"
    one, two, full, four = answers[0]
    assert (one[:4], two[:4]) == ((1, [1], 1, 0), (2, [1, 2], 2, 0))
    assert full[:4] == (3, [1, 2], 2, 3), "three tries, and what was written is gone"
    assert all("No space left on device" in warning for warning in full[4]) and len(full[4]) == 3
    assert four[:4] == (4, [2, 4], 2, 3), "with room again it works; the failures are remembered"


@pytest.mark.fault(9)
def test_training_goes_on_when_nothing_can_be_saved_and_says_so_in_the_end(corpus, small_disk, monkeypatch):
    monkeypatch.setattr(saving, "PAUSE_SECONDS", 0.01)
    code, said = train(*corpus, f"run.dir={small_disk}", "run.name=full", "train.steps=3")
    assert code == 2 and "the last checkpoint could not be written: rank 0: [Errno 28] No space left" in said
    course = records(small_disk / "full")
    assert [each["step"] for each in course] == [1, 2, 3], "lines that met the full disk come later"
    assert course[-1]["checkpoint_failures"] >= 3
    assert list((small_disk / "full/checkpoints").iterdir()) == []


@pytest.mark.fault(10)
def test_a_run_directory_that_cannot_be_written_is_refused_before_training(corpus, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for place in (small_disk, small_disk / "absent", "/dev/null"):
        code, said = train(*corpus, f"run.dir={place}", "run.name=new", "train.steps=1")
        assert code == 2 and said.startswith(f"weft: run.dir={place}: expected a folder to write into; ")
        assert len(said.splitlines()) == 1


@pytest.mark.fault(10)
def test_a_folder_of_checkpoints_that_cannot_be_written_is_refused_before_training(corpus, tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/checkpoints").symlink_to(small_disk)
    code, said = train(*corpus, f"run.dir={tmp_path}", "run.name=new", "train.steps=1")
    assert code == 2 and "expected a folder to write checkpoints into" in said and "Read-only file system" in said
    assert not (tmp_path / "new/metrics.jsonl").exists()
