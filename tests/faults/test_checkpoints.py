"""Faults that meet a checkpoint: kills at every step of a commit, damage, full disks, and runs that do not fit.

Real processes are killed where the disk is touched, files are really damaged, file systems really full. What is
expected afterwards is always the same: some whole checkpoint, exactly as it was saved, or a message and an exit code.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from launch import cli
from parallel.errors import UserError
from tests.train.checkpoint import states
from tests.train.checkpoint.states import checkpoints, killed_at, resumes, save, state_at, world
from tests.train.layouts import LAYOUTS, SMALL
from train import __main__ as worker
from train.checkpoint import checkpoints as saving
from train.checkpoint import directory as names
from train.checkpoint import disk, manifest
from train.compose import compose
from train.trainer import Trainer

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------- kills
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


# ---------------------------------------------------------------- damage
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


# ---------------------------------------------------------------- runs of one process
@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Overrides that make `tiny` a run of one process that takes seconds, on a text of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = [json.dumps({"text": path.read_text()}) for path in sorted((ROOT / "train").rglob("*.py"))]
    (folder / "sources.jsonl").write_text("\n".join(sources) + "\n")
    sizes = {f"model.{key}": value for key, value in (SMALL | {"vocab_size": 509, "num_hidden_layers": 3}).items()}
    data = {"data.path": folder / "sources.jsonl", "data.heldout": 0.1, "data.cache": folder / "cache"}
    train = {"train.sequence_length": 32, "train.eval_rows": 0, "train.threads": 1, "optim.lr.warmup_tokens": 512}
    values = {"data.vocab_size": 500, **sizes, **data, **train, "checkpoint.every": 1, "checkpoint.keep_last": 5}
    return ["recipe=tiny", "data=hf", "precision=fp32", *ONE, *(f"{key}={value}" for key, value in values.items())]


ONE = ["parallel.pipeline=1", "parallel.data=1", "parallel.expert=1", "parallel.schedule=1f1b"]


def train(*words: object) -> tuple[int, str]:
    """`python -m train` in this process: exit code and what it says on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            return worker.main([str(word) for word in words]), said.getvalue()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> tuple[list[str], Path]:
    """Overrides and folder of a run of two steps, both saved."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*corpus, f"run.dir={folder}", "run.name=first"]
    assert train(*words, "train.steps=2")[0] == 0
    return words, folder / "first"


@pytest.fixture
def run(trained, tmp_path) -> tuple[list[str], Path]:
    """A copy of it that a test may spoil; three steps are wanted now."""
    words, folder = trained
    shutil.copytree(folder, tmp_path / "first")
    return [*words, f"run.dir={tmp_path}", "train.steps=3"], tmp_path / "first"


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


# ---------------------------------------------------------------- nothing is executed
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


@pytest.mark.fault(12)
def test_a_recipe_that_names_code_is_refused_on_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = f"touch {tmp_path / 'executed'}"
    written = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text())
    for name, place in (("top", written), ("deep", written["train"])):
        place["_target_"] = "os.system"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(written))
        del place["_target_"]
    lines = [
        [*command, *words]
        for command in (["train"], ["schedule"], ["simulate"], ["plan"], ["data", "prepare"])
        for words in (
            ["+_target_=os.system", f"+command={target}"],
            ["+train._target_=os.system"],
            ["model={_target_:os.system}"],
            ["recipe=top.yaml"],
            ["recipe=deep.yaml"],
            ["hydra.callbacks.mine._target_=os.system"],
            ["--multirun", "train.seed=1,2", "+optim._target_=os.system"],
        )
    ]
    for words in lines:
        assert cli.main(words) == 2, words
        assert "_target_ is refused" in capsys.readouterr().err
    for words in (["+train._target_=os.system"], ["recipe=deep.yaml"], ["--config", "top.yaml"]):
        code, said = train(*words)
        assert code == 2 and "_target_" in said, words
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- runs that do not fit
@pytest.mark.fault(15)
def test_another_model_is_refused_and_its_fields_are_named(run):
    words, folder = run
    code, said = train(*words, "model.intermediate_size=128", "model.v_head_dim=32")
    assert code == 2 and said.startswith(
        "weft: model.intermediate_size=128 (saved with 96), model.v_head_dim=32 (saved with 16): expected what "
        f"checkpoint {folder}/checkpoints/step-00000002 was saved with"
    )
    code, said = train(*words, "model.intermediate_size=128", "checkpoint.allow=[model]")
    assert code == 2 and "mlp.gate_proj.weight: shape [96, 64] in the checkpoint, [128, 64] in this run" in said


@pytest.mark.fault(16)
def test_another_learning_rate_or_batch_needs_a_word_and_is_logged(run):
    words, folder = run
    changed = ["optim.lr.peak=0.002", "train.batch.start=16"]
    code, said = train(*words, *changed)
    keys = "optim.lr.peak,train.batch.end,train.batch.multiple_of,train.batch.start"
    assert code == 2 and f"checkpoint.allow=[{keys}] to go on with what is new" in said
    assert "optim.lr.peak=0.002 (saved with 0.0015), train.batch.end=16 (saved with 8)" in said
    code, said = train(*words, *changed, f"checkpoint.allow=[{keys.replace('train.batch.end,', '')}]")
    assert code == 2 and "train.batch.end=16 (saved with 8): expected" in said
    code, said = train(*words, *changed, "checkpoint.allow=[optim.lr,train.batch]")
    assert code == 0 and "weft: optim.lr.peak changes from 0.0015 to 0.002 after step 2\n" in said
    assert [each["batch_tokens"] for each in records(folder)] == [256, 256, 512]


@pytest.mark.fault(30)
def test_changed_data_is_refused_unless_allowed(run, tmp_path):
    words, _ = run
    text = (ROOT / "parallel/mesh.py").read_text()
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text + str(i)}) + "\n" for i in range(20)))
    words += [f"data.path={tmp_path}/other.jsonl"]
    code, said = train(*words)
    assert code == 2 and "weft: data.fingerprint=" in said
    assert said.endswith("checkpoint.allow=[data.fingerprint] to go on with what is new\n")
    code, said = train(*words, "checkpoint.allow=[data]")
    assert code == 0 and "weft: data.fingerprint changes from " in said


@pytest.mark.fault(31)
def test_a_clock_that_goes_back_changes_nothing(run):
    words, folder = run
    for step in (1, 2):
        os.utime(folder / f"checkpoints/step-0000000{step}", (10**9 - 3600 * step,) * 2)
    assert train(*words)[0] == 0
    assert names.committed(folder / "checkpoints") == [1, 2, 3]
    assert [each["step"] for each in records(folder)] == [1, 2, 3], "it went on from step 2"


@pytest.mark.fault(31)
def test_starts_in_one_second_have_ids_of_their_own_and_a_resumed_run_keeps_its_own(corpus, trained, run, tmp_path):
    def run_id(folder: Path) -> str:
        newest = names.path_of(folder / "checkpoints", names.committed(folder / "checkpoints")[-1])
        return manifest.Manifest.read(newest).meta["run_id"]

    assert train(*corpus, f"run.dir={tmp_path}", "run.name=other", "train.steps=1")[0] == 0
    assert train(*run[0])[0] == 0
    assert run_id(tmp_path / "other") != run_id(trained[1]) == run_id(run[1])


# ---------------------------------------------------------------- bit for bit
BIG_ODD = ["model.vocab_size=509", "model.intermediate_size=97", "model.n_routed_experts=12", "model.n_group=3"]
ALL_KINDS = ["parallel.pipeline=2", "parallel.data=2", "parallel.expert=2", "parallel.schedule=dualpipe"]


def hashes(trainer: Trainer) -> dict[tuple, str]:
    """Of all that a checkpoint holds, as this rank has it, and of the parameters."""
    trainer.settle()
    held = {(part.name, part.start): part.local for part in states.parts_of(trainer.state(ema=True))}
    for stage in trainer.engine.stages.values():
        held |= {("parameter", name): value.detach().flatten() for name, value in stage.named_parameters()}
    return {
        place: hashlib.sha256(bytes(tensor.view(torch.uint8).numpy())).hexdigest() for place, tensor in held.items()
    }


def fit(words: list[str]) -> tuple[int, dict, list[list[int]]]:
    """A whole run on this rank: the step at which it began, hashes at the end, and the rows of each batch."""
    trainer, rows = Trainer(compose(words), torch.device("cpu")), []
    began, fetch = trainer.step, trainer.fetch
    trainer.fetch = lambda source, ids, batch: rows.append(list(ids)) or fetch(source, ids, batch)
    trainer.fit()
    return began, hashes(trainer), rows


def course(run: Path) -> list[tuple]:
    return [(each["step"], each["loss"], each["mtp_loss"], each["grad_norm"]) for each in records(run)]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([], marks=[pytest.mark.fault(17), pytest.mark.slow]),
        pytest.param(BIG_ODD, marks=pytest.mark.fault(20)),
    ],
    ids=["as it is", "sizes that do not divide"],
)
def test_a_run_that_stops_and_resumes_is_bitwise_the_one_that_did_not(workers, corpus, tmp_path, sizes):
    words = [
        *corpus,
        "precision=bf16",
        *ALL_KINDS,
        *sizes,
        "optim.ema_decay=0.9",
        f"run.dir={tmp_path}",
        "checkpoint.every=2",
    ]
    whole = workers(4).run(fit, [*words, "run.name=whole", "train.steps=4"], timeout=200)
    workers(4).run(fit, [*words, "run.name=parts", "train.steps=2"], timeout=200)
    parts = workers(4).run(fit, [*words, "run.name=parts", "train.steps=4"], timeout=200)
    for one, other in zip(whole, parts, strict=True):
        assert (one[0], other[0]) == (0, 2) and one[1] == other[1] and one[2][2:] == other[2]
    assert course(tmp_path / "whole") == course(tmp_path / "parts")


def take_up(words: list[str]) -> tuple[dict[str, str], list[int], float]:
    """From the newest checkpoint: a hash of each tensor of all ranks together; the next rows, and their loss."""
    trainer, rows = Trainer(compose(words), torch.device("cpu")), []
    everyone = [None] * dist.get_world_size()
    mine = [(part.name, part.start, part.shape, part.local) for part in states.parts_of(trainer.state(ema=True))]
    dist.all_gather_object(everyone, mine)
    wholes: dict[str, torch.Tensor] = {}
    for name, start, shape, local in (part for each in everyone for part in each):
        whole = wholes.setdefault(name, torch.zeros(torch.Size(shape).numel(), dtype=local.dtype))
        whole[start : start + len(local)] = local
    found = {name: hashlib.sha256(bytes(t.view(torch.uint8).numpy())).hexdigest() for name, t in wholes.items()}
    fetch = trainer.fetch
    trainer.fetch = lambda source, ids, batch: rows.extend(ids) or fetch(source, ids, batch)
    totals = trainer.engine.forward_backward(trainer.load_batch(8), 8, 0.3)
    return found, rows, totals.losses["loss"]


@pytest.mark.slow
@pytest.mark.fault(18)
@pytest.mark.fault(19)
def test_other_layouts_take_up_the_same_state_the_same_rows_and_the_same_loss(workers, corpus, tmp_path):
    words = [*corpus, *ALL_KINDS, "model.num_hidden_layers=5", f"run.dir={tmp_path}", "run.name=first"]
    workers(4).run(fit, [*words, "train.steps=2"], timeout=200)
    [(hashes, rows, loss), *_] = workers(4).run(take_up, words, timeout=200)
    assert len(hashes) > 100 and len(rows) == 8
    for name in ("one process", "dualpipe 2", "1f1b 4", "data 4, expert 4"):
        layout = {"pipeline": 1, "data": 1, "expert": 1, "schedule": "1f1b"} | LAYOUTS[name]
        other = [f"parallel.{key}={value}" for key, value in layout.items()]
        for found in workers(layout["pipeline"] * layout["data"]).run(take_up, [*words, *other], timeout=200):
            assert found[:2] == (hashes, rows), name
            assert found[2] == pytest.approx(loss, rel=1e-5), name


# ---------------------------------------------------------------- asked to stop
def stopped_in_the_middle(directory: Path, then: str) -> None:
    """SIGTERM while a save waits for its disk: what the handler asks for is done at the next step's border."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    disk.observer = lambda operation, path: operation == "create" and time.sleep(0.3)
    ours = checkpoints(directory)
    ours.save(20, state_at(20), {"tokens": 200})
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked and ours.writing.is_alive()
    getattr(ours, then)()


@pytest.mark.fault(25)
@pytest.mark.parametrize(("then", "steps"), [("wait", [10, 20]), ("discard", [10])])
def test_a_save_in_flight_at_sigterm_commits_or_is_discarded(workers, tmp_path, then, steps):
    workers(1).run(save, tmp_path, 10)
    assert world(2, stopped_in_the_middle, tmp_path, then) == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{step}" for step in steps]
    assert workers(1).run(resumes, tmp_path) == steps[-1:]
