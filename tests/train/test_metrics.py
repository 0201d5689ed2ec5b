"""Where metrics go: JSON lines that survive a resume, a console that fits its stream, W&B that never harms."""

import io
import json
import math

import pytest

from train.compose import compose
from train.metrics import Console, Metrics


@pytest.fixture
def recipe():
    return compose(["recipe=tiny", "train.steps=20"])


def record(step: int, **more) -> dict:
    return {"step": step, "tokens": step * 2048, "loss": 8.0 - step / 10, "lr": 1e-3, "step_seconds": 0.5, **more}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_on_disk_as_soon_as_it_is_reported(recipe, tmp_path):
    metrics = Metrics(recipe, tmp_path)
    metrics.step(record(1, layer_max_violation={"1": 0.5, "5": 0.75}), {1: [0.001, -0.001]})
    (only,) = lines(tmp_path / "metrics.jsonl")
    assert only == record(1) | {"layer_max_violation": {"1": 0.5, "5": 0.75}, "router_bias": {"1": [0.001, -0.001]}}


def test_what_was_not_measured_is_absent_and_what_is_not_finite_is_null(recipe, tmp_path):
    Metrics(recipe, tmp_path).step(record(1, grad_norm=math.nan, mfu=None))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"grad_norm": null' in text and "mfu" not in text and "NaN" not in text


def test_a_resumed_run_keeps_one_record_a_step(recipe, tmp_path):
    first = Metrics(recipe, tmp_path)
    for step in range(1, 9):
        first.step(record(step, start=1))
    first.evaluation(4, 8192, 6.0, 6.5)
    first.evaluation(8, 16384, 5.9, 6.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed in the middle of a line
    second = Metrics(recipe, tmp_path, {"step": 5, "tokens": 5 * 2048})
    for step in range(6, 10):
        second.step(record(step, start=2))
    second.close()
    written = lines(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["start"]) for r in written] == [
        *((s, 1) for s in range(1, 6)),
        *((s, 2) for s in range(6, 10)),
    ]
    assert [r["step"] for r in lines(tmp_path / "evaluations.jsonl")] == [4]


def test_a_fresh_start_in_a_used_directory_begins_anew(recipe, tmp_path):
    Metrics(recipe, tmp_path).step(record(1))
    Metrics(recipe, tmp_path).step(record(1))
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_steps_are_printed_every_so_often_and_at_both_ends(recipe, tmp_path, capsys):
    recipe.log.every = 8
    metrics = Metrics(recipe, tmp_path)
    for step in range(1, 21):
        metrics.step(record(step))
    printed = [line.partition("  loss")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["step  1/20", "step  8/20", "step 16/20", "step 20/20"]


def test_the_held_out_loss_is_printed_beside_the_unigram_model_s(recipe, tmp_path, capsys):
    metrics = Metrics(recipe, tmp_path)
    metrics.evaluation(20, 40960, 5.75, 6.5)
    assert "held-out loss 5.7500 nat, 0.7500 below a unigram model's 6.5000" in capsys.readouterr().out
    assert lines(tmp_path / "evaluations.jsonl") == [
        {"step": 20, "tokens": 40960, "heldout_loss": 5.75, "unigram_loss": 6.5}
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_gets_a_bar_and_everyone_the_time_left(recipe):
    for stream, on_terminal in ((Terminal(), True), (io.StringIO(), False)):
        console = Console(recipe, 0, 0, stream)
        console.clock -= 30  # half a minute ago
        console.step(record(10))
        console.close()
        assert ("\r" in stream.getvalue()) == on_terminal
        assert "0:00:30 left" in stream.getvalue()


def test_time_left_counts_tokens_when_they_end_the_run(recipe):
    recipe.train.steps, recipe.train.tokens = None, 100
    console = Console(recipe, 0, 0, io.StringIO())
    assert console.fraction(7, 25) == 0.25
    recipe.train.steps = 10
    assert console.fraction(7, 25) == 0.7


def test_an_offline_wandb_run_keeps_its_id_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = compose(["recipe=tiny", "wandb.mode=offline"])
    first = Metrics(recipe, tmp_path)
    first.step(record(1))
    first.close()
    assert first.wandb_id
    second = Metrics(recipe, tmp_path, {"step": 1, "tokens": 2048, "wandb_id": first.wandb_id})
    second.close()
    assert second.wandb_id == first.wandb_id
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{first.wandb_id}"))) >= 1


def test_wandb_that_cannot_start_leaves_the_training_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    metrics = Metrics(compose(["recipe=tiny", "wandb.mode=online"]), tmp_path)
    metrics.step(record(1))
    metrics.close()
    assert "W&B stays off" in capsys.readouterr().err
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
