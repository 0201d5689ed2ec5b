"""Rows 4 to 8 and 11: files of a checkpoint are flipped, cut, deleted or forged. Nothing wrong is read or run."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from parallel.errors import UserError
from tests.commands import (
    records,
    train,
)
from tests.train.checkpoint.states import resumes, save
from train.checkpoint import manifest


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def resume_loudly(directory: Path, resume: str | int) -> tuple[int | str | None, str]:
    """The step or the error of a resume, and what was said meanwhile."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return resumes(directory, resume), said.getvalue()
        except UserError as error:
            return str(error), said.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip, marks=pytest.mark.fault(4)),
        pytest.param(truncate, marks=pytest.mark.fault(5)),
        pytest.param(Path.unlink, marks=pytest.mark.fault(6)),
    ],
)
def test_damage_to_any_file_is_named_and_the_last_whole_checkpoint_resumes(workers, tmp_path, damage):
    workers(2).run(save, tmp_path, 10, 20)
    files = sorted((tmp_path / "step-00000020").iterdir())
    assert [path.name for path in files] == [
        "manifest.json",
        "rank-00000-000.safetensors",
        "rank-00001-000.safetensors",
    ]
    for path in files:
        kept = path.read_bytes()
        damage(path)
        answers = workers(2).run(resume_loudly, tmp_path, "auto")
        assert [step for step, _ in answers] == [10, 10]
        said, nothing = (text for _, text in answers)
        assert str(path) in said and "from step 10" in said and nothing == ""
        for refused, _ in workers(2).run(resume_loudly, tmp_path, 20):
            assert str(refused).startswith(f"checkpoint.resume=20: {path}: ")
        path.write_bytes(kept)
    assert workers(1).run(resumes, tmp_path) == [20]


@pytest.mark.fault(7)
def test_when_every_checkpoint_is_bad_the_run_does_not_start_anew(run):
    words, folder = run
    for shard in folder.glob("checkpoints/*/*.safetensors"):
        flip(shard)
    code, said = train(*words)
    assert code == 2 and "checkpoint.resume=never starts anew" in said
    assert all(name in said for name in ("step-00000001/rank-00000-000", "step-00000002/rank-00000-000"))
    assert len(records(folder)) == 2, "and no step was made"
    assert train(*words, "checkpoint.resume=never", "train.steps=1")[0] == 0


@pytest.mark.fault(8)
def test_a_step_that_does_not_exist_is_answered_with_those_that_do(run):
    code, said = train(*run[0], "checkpoint.resume=7")
    assert code == 2 and "checkpoint.resume=7: expected auto, never or the step of a checkpoint" in said
    assert said.endswith(f"{run[1]}/checkpoints has 1, 2\n")


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)

    def __init__(self, marker: Path) -> None:
        self.marker = marker


def watched(directory: Path) -> tuple[list[str], str]:
    """Resume while Python's auditing listens for classes that a pickle asks for, and for commands."""
    heard: list[str] = []
    listening = True

    def listen(event: str, arguments: tuple) -> None:
        if listening and event in ("pickle.find_class", "os.system", "subprocess.Popen", "exec", "import"):
            heard.append(f"{event} {arguments}")

    sys.addaudithook(listen)
    try:
        return heard, str(resumes(directory))
    except UserError as error:
        return heard, str(error)
    finally:
        listening = False


@pytest.mark.fault(11)
def test_a_crafted_pickle_is_not_executed_wherever_it_lies(workers, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    pickle.loads(pickle.dumps(Bomb(tmp_path / "armed")))
    assert (tmp_path / "armed").exists(), "the bomb works"
    directory = tmp_path / "checkpoints"
    workers(1).run(save, directory, 10)
    folder = directory / "step-00000010"
    shard = folder / "rank-00000-000.safetensors"

    (folder / ".metadata").write_bytes(bomb)  # where torch.distributed.checkpoint would read it
    assert workers(1).run(watched, directory) == [([], "10")]

    contents = json.loads((folder / manifest.NAME).read_text())
    del contents["sha256"]
    shard.write_bytes(bomb)
    contents["files"][shard.name] = {"bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
    (folder / manifest.NAME).write_text(json.dumps({**contents, "sha256": manifest.digest(contents)}))
    [(heard, said)] = workers(1).run(watched, directory)  # all hashes are right
    assert heard == [] and said.startswith(f"{shard}: expected a safetensors file")

    (folder / manifest.NAME).write_bytes(bomb)
    [(heard, said)] = workers(1).run(watched, directory)
    assert heard == [] and f"{folder / manifest.NAME}: expected the manifest of a checkpoint" in said
    assert not (tmp_path / "executed").exists()
