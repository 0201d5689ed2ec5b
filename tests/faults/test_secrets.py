"""Row 33: keys and tokens stay out of logs, recipes and checkpoints, and W&B out of reach stops nobody."""

import sys

import pytest

from tests.commands import ONE_RANK, course, finish, fit, refused, start
from train.compose import compose

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.slow
@pytest.mark.fault(33)
def test_wandb_out_of_reach_leaves_training_alone_and_the_key_nowhere(workers, small, tmp_path):
    words = [*small, *ONE_RANK, "train.steps=3", "checkpoint.every=3", f"run.dir={tmp_path}"]
    variables = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    alone = [sys.executable, "-P", "-m", "train"]
    out, err = finish(start(alone, [*words, "run.name=online", "wandb.mode=online"], **variables))
    workers(1).run(fit, [*words, "run.name=off"])
    assert course(tmp_path / "online") == course(tmp_path / "off")
    assert SECRET not in out + err
    for file in (tmp_path / "online").rglob("*"):
        assert not (file.is_file() and SECRET.encode() in file.read_bytes()), file


@pytest.mark.fault(33)
def test_a_recipe_cannot_take_a_secret_out_of_the_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    told = refused(capsys, "train", "run.dir=${oc.env:SCRATCH}", "wandb.project=x-${oc.env:HF_TOKEN}")
    assert told.startswith("weft: wandb.project: holds the value of the variable HF_TOKEN") and SECRET not in told
    assert compose(["run.dir=${oc.env:SCRATCH}"]).run.dir == str(tmp_path)
