"""Rows 15 to 20, 30 and 31: runs that take up a checkpoint. What fits goes on bit for bit, what does not is named."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.commands import ROOT, course, records, train
from tests.train.checkpoint import states
from tests.train.layouts import LAYOUTS
from train.checkpoint import directory as names
from train.checkpoint import manifest
from train.compose import compose
from train.trainer import Trainer


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


def fit_watched(words: list[str]) -> tuple[int, dict, list[list[int]]]:
    """A whole run on this rank: the step at which it began, hashes at the end, and the rows of each batch."""
    trainer, rows = Trainer(compose(words), torch.device("cpu")), []
    began, fetch = trainer.step, trainer.fetch
    trainer.fetch = lambda source, ids, batch: rows.append(list(ids)) or fetch(source, ids, batch)
    trainer.fit()
    return began, hashes(trainer), rows


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
    whole = workers(4).run(fit_watched, [*words, "run.name=whole", "train.steps=4"], timeout=200)
    workers(4).run(fit_watched, [*words, "run.name=parts", "train.steps=2"], timeout=200)
    parts = workers(4).run(fit_watched, [*words, "run.name=parts", "train.steps=4"], timeout=200)
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
    workers(4).run(fit_watched, [*words, "train.steps=2"], timeout=200)
    [(hashes, rows, loss), *_] = workers(4).run(take_up, words, timeout=200)
    assert len(hashes) > 100 and len(rows) == 8
    for name in ("one process", "dualpipe 2", "1f1b 4", "data 4, expert 4"):
        layout = {"pipeline": 1, "data": 1, "expert": 1, "schedule": "1f1b"} | LAYOUTS[name]
        other = [f"parallel.{key}={value}" for key, value in layout.items()]
        for found in workers(layout["pipeline"] * layout["data"]).run(take_up, [*words, *other], timeout=200):
            assert found[:2] == (hashes, rows), name
            assert found[2] == pytest.approx(loss, rel=1e-5), name
