"""Random damage to a checkpoint: it is refused, or it changes nothing; never loaded wrong, run, or a traceback.

Flipped bits, truncated, grown, exchanged and replaced files, edited JSON; also with hashes that fit again: what a hash
cannot tell must then be told by the contents.
"""

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from launch.verify import verify
from parallel.errors import UserError
from tests.train.checkpoint import states
from train.checkpoint import manifest
from train.checkpoint.manifest import Manifest


def flip(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 8, 100])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def grow(file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randrange(1, 50)))


def replace_block(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    begin = chance.randrange(len(data))
    data[begin : begin + chance.randrange(1, 512)] = chance.randbytes(chance.randrange(1, 512))
    file.write_bytes(data)


def exchange(file: Path, chance: random.Random) -> None:
    """With another file of this checkpoint, or the same one of another."""
    others = [path for folder in file.parent.parent.iterdir() for path in folder.iterdir() if path != file]
    other = chance.choice(sorted(others))
    other.rename(other.with_suffix(".x"))
    file.rename(other)
    other.with_suffix(".x").rename(file)


def turn_into(file: Path, chance: random.Random) -> None:
    file.unlink()
    kind = chance.randrange(4)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        os.mkfifo(file)
    elif kind == 2:
        file.symlink_to("/dev/zero")


def edit(file: Path, chance: random.Random, honest: bool = False) -> None:
    """Change a value somewhere in the manifest; honest: with the hash that belongs to it."""
    path = file.parent / manifest.NAME
    contents = json.loads(path.read_text())
    places: list[tuple] = []

    def walk(node, at):
        for key in node if isinstance(node, dict) else range(len(node)):
            if not (honest and at == () and key in ("sha256", "meta")):  # what those say is for the run to judge
                places.append((node, key))
                if isinstance(node[key], dict | list):
                    walk(node[key], (*at, key))

    walk(contents, ())
    node, key = chance.choice(places)
    before = node[key]
    wild = [None, -1, 0, 2**70, 1.5, "", "x", "../x", [], {}, [[]], True, "F64", "\ud800", "rank-00000-000.safetensors"]
    action = chance.randrange(3)
    if action == 0 and isinstance(node, dict):
        del node[key]
    elif action == 1 and type(before) is int:
        node[key] = before + chance.choice([-1, 1, 8])
    else:
        node[key] = chance.choice(wild)
    if honest and isinstance(contents, dict):
        contents["sha256"] = manifest.digest({key: value for key, value in contents.items() if key != "sha256"})
    path.write_text(json.dumps(contents))


def edit_honestly(file: Path, chance: random.Random) -> None:
    edit(file, chance, honest=True)


def spoil_the_header(file: Path, chance: random.Random) -> None:
    """Damage the beginning of a shard, with hashes that fit again."""
    if file.name == manifest.NAME:
        return edit_honestly(file, chance)
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for _ in range(chance.choice([1, 2, 8])):
        data[chance.randrange(8 + length)] = chance.choice(
            [0, 32, 34, 48, 57, 91, 123, 125, 255, chance.randrange(256)]
        )
    file.write_bytes(data)
    path = file.parent / manifest.NAME
    contents = json.loads(path.read_text())
    contents["files"][file.name]["sha256"] = manifest.hashlib.sha256(data).hexdigest()
    contents["sha256"] = manifest.digest({key: value for key, value in contents.items() if key != "sha256"})
    path.write_text(json.dumps(contents))


MUTATIONS = [flip, flip, truncate, grow, replace_block, exchange, turn_into, edit, edit_honestly, spoil_the_header]


def resume(directory: Path) -> str:
    """Which step is taken up, or why none: `resumes` makes sure that the state is that step's, to the bit."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return f"{states.resumes(directory)}"
        except UserError as error:
            return str(error)


def mutate(whole: Path, copy: Path, seeds: range) -> dict[str, int]:
    """One mutation for each seed; how many were refused, fell back, or changed nothing."""
    outcomes = {"refused": 0, "fell back": 0, "unaffected": 0}
    for seed in seeds:
        chance = random.Random(seed)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        file = chance.choice(sorted((copy / "checkpoints/step-00000020").iterdir()))
        mutation = chance.choice(MUTATIONS)
        mutation(file, chance)
        try:
            said = resume(copy / "checkpoints")
            verdicts = {each.step: not each.problems for each in verify(copy)}
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {mutation.__name__} of {file.name}") from error
        if said == "20":
            outcomes["unaffected"] += 1
            assert verdicts[20], f"seed {seed}: verify and resume disagree"
        elif said == "10":
            outcomes["fell back"] += 1
            assert not verdicts[20], f"seed {seed}: verify and resume disagree"
        else:
            outcomes["refused"] += 1
            assert str(copy) in said, f"seed {seed}: {said} names no file"
    return outcomes


@pytest.mark.parametrize("mutations", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_mutation_is_loaded_wrong(workers, tmp_path, mutations):
    workers(2).run(states.save, tmp_path / "whole/checkpoints", 10, 20)
    [outcomes] = workers(1).run(mutate, tmp_path / "whole", tmp_path / "copy", range(mutations))
    print(outcomes)
    assert sum(outcomes.values()) == mutations and outcomes["fell back"] > mutations / 3
    assert outcomes["unaffected"] < mutations / 3


def test_json_that_is_nested_too_deeply_is_refused(workers, tmp_path):
    workers(1).run(states.save, tmp_path, 10)
    (tmp_path / "step-00000010/manifest.json").write_text("[" * 10**6)
    with pytest.raises(UserError, match=r"manifest\.json: expected the manifest of a checkpoint"):
        workers(1).run(states.resumes, tmp_path)


def test_a_manifest_of_another_step_or_version_is_refused(workers, tmp_path):
    workers(1).run(states.save, tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000011")
    with pytest.raises(UserError, match=r"manifest\.json: it describes step 10"):
        Manifest.of(tmp_path / "step-00000011", 11)
    path = tmp_path / "step-00000011/manifest.json"
    contents = json.loads(path.read_text()) | {"version": 1}
    del contents["sha256"]
    path.write_text(json.dumps({**contents, "sha256": manifest.digest(contents)}))
    with pytest.raises(UserError, match=r"manifest\.json: checkpoint of version 1; expected 2"):
        Manifest.of(tmp_path / "step-00000011", 10)


def test_pieces_that_leave_a_gap_are_never_written(tmp_path):
    piece = manifest.Piece("rank-00000-000.safetensors", 0, 3)
    stored = manifest.Stored("F32", (4,), (piece,))
    found = Manifest(1, {}, {piece.file: manifest.File(8, "")}, {"x": stored})
    with pytest.raises(ValueError, match="the pieces of x are not its 4 elements"):
        found.write(tmp_path)
    assert list(tmp_path.iterdir()) == [] and manifest.NAMES[torch.float32] == "F32"
