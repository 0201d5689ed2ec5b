"""Row 32: all tokens to one expert, none to the others. Nothing breaks, and the metrics tell."""

import math

import pytest
import torch

from tests.commands import records
from train.compose import compose
from train.trainer import Trainer


def fit_biased(words: list[str], experts: list[int]) -> None:
    """A run whose tokens all choose the same experts."""
    trainer = Trainer(compose(words), torch.device("cpu"))
    for router in trainer.engine.routers().values():
        router.e_score_correction_bias[experts] = 100.0
    trainer.fit()


@pytest.mark.fault(32)
def test_experts_with_all_tokens_and_with_none_are_told_and_nothing_breaks(workers, small, tmp_path):
    words = [
        *small,
        "train.batch.start=8",
        "train.steps=5",
        "checkpoint.every=0",
        "model.n_group=1",
        "model.topk_group=1",
        f"run.dir={tmp_path}",
    ]
    words += ["model.num_experts_per_tok=1", "log.starving_steps=3", "run.name=one"]
    workers(4).run(fit_biased, words, [5], timeout=300)
    last = records(tmp_path / "one")[-1]
    assert math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"]) and last["dropped_steps"] == 0
    assert last["max_violation"] == pytest.approx(7.0), "eight times the mean load"
    assert last["starving"] == 7 * len(last["layer_max_violation"])
