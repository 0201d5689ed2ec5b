"""Rows 21 and 22: gradients that are not finite, and losses that jump. Steps are left out, or undone."""

import json

import pytest
import torch

from tests.commands import ONE_RANK, TWO_RANKS, course, records, tensors
from tests.train.test_trainer import fit_spoiled, skip_one
from train.compose import compose
from train.trainer import Trainer


@pytest.mark.fault(21)
def test_a_nan_on_one_rank_moves_nothing_anywhere(workers):
    for rank, found in enumerate(workers(4).run(skip_one, "dense", 3, float("nan"))):
        assert all(found.values()), f"rank {rank}: {found}"


@pytest.mark.fault(21)
def test_steps_in_a_row_without_a_finite_gradient_end_in_a_dump_that_names_the_rank(workers, small, tmp_path):
    words = [*small, *TWO_RANKS, "train.steps=8", "train.max_skips=2", "checkpoint.every=0", f"run.dir={tmp_path}"]
    for message, reached in workers(2).run(fit_spoiled, [*words, "run.name=bad"], {2, 4, 5}, timeout=300):
        assert message.startswith(
            "step 5: 2 steps in a row had a gradient that is not finite, before any sum in rank 1:"
        )
        assert reached == 5
    dumps = [json.loads(path.read_text()) for path in sorted((tmp_path / "bad/dump/step-00000005").iterdir())]
    assert [dump["rank"] for dump in dumps] == [0, 1]
    assert not dumps[0]["not_finite"] and dumps[1]["not_finite"], "only the guilty rank's own gradients"


SPIKY = ["train.spike.factor=20", "train.spike.window=6", "train.spike.patience=2", "checkpoint.every=4"]


def fit_on_noise(words: list[str], noisy: list[range], stop: int = 0) -> str:
    """A run whose loss triples at some positions of its data, in rows; asked to stop in step `stop`. What ended it."""
    trainer = Trainer(compose(words), torch.device("cpu"))
    length, honest = trainer.recipe.train.sequence_length, trainer.engine.forward_backward

    def forward_backward(*arguments, **named):
        totals = honest(*arguments, **named | {"asked": trainer.step + 1 == stop})
        first = trainer.spikes.position(trainer.tokens) // length
        if any(first in positions for positions in noisy):
            totals.losses["loss"] *= 3
        return totals

    trainer.engine.forward_backward = forward_backward
    try:
        trainer.fit()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.fault(22)
def test_a_spike_that_persists_rolls_back_and_the_window_is_never_seen_again(workers, small, tmp_path):
    words = [*small, *ONE_RANK, *SPIKY, "train.steps=16", f"run.dir={tmp_path}", "train.spike.policy=rollback"]
    noise = [range(9 * 4, 11 * 4)]  # steps 10 and 11, of 4 rows each
    pool = workers(1)
    for name in ("one", "again"):
        pool.run(fit_on_noise, [*words, f"run.name={name}"], noise)
    [rollback] = records(tmp_path / "one", "rollbacks.jsonl")
    assert rollback == {"step": 8, "tokens": 8 * 128, "spike": [10, 11], "window": [8 * 128, 11 * 128]}
    assert course(tmp_path / "one") == course(tmp_path / "again") and len(course(tmp_path / "one")) == 16
    assert records(tmp_path / "one")[-1]["rollbacks"] == 1

    for stop in (10, 13):  # the next start goes on in the middle of the spike, or after the rollback
        name = f"stopped-{stop}"
        pool.run(fit_on_noise, [*words, f"run.name={name}"], noise, stop)
        pool.run(fit_on_noise, [*words, f"run.name={name}"], noise)
        assert course(tmp_path / name) == course(tmp_path / "one")
        assert tensors(tmp_path / name, 16) == tensors(tmp_path / "one", 16)


@pytest.mark.fault(22)
def test_the_run_ends_when_rollbacks_do_not_help(workers, small, tmp_path):
    words = [*small, *ONE_RANK, *SPIKY, "train.steps=40", f"run.dir={tmp_path}", "run.name=hopeless"]
    words += ["train.spike.policy=rollback", "train.spike.max_rollbacks=1"]
    [ended] = workers(1).run(fit_on_noise, words, [range(9 * 4, 1000)])
    assert "spikes in a row" in ended and "after 1 rollbacks" in ended
    assert len(records(tmp_path / "hopeless", "rollbacks.jsonl")) == 1


@pytest.mark.fault(22)
def test_a_spike_may_be_skipped_instead(workers, small, tmp_path):
    words = [*small, *ONE_RANK, *SPIKY, "train.steps=14", f"run.dir={tmp_path}", "run.name=skips"]
    workers(1).run(fit_on_noise, [*words, "train.spike.policy=skip"], [range(9 * 4, 10 * 4)])
    assert [each["step"] for each in records(tmp_path / "skips") if each.get("spike")] == [10]
    assert records(tmp_path / "skips")[-1]["dropped_steps"] == 1
