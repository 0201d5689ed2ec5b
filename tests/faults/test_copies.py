"""Row 23: a bit flips in one of the copies that must be equal. It is named and mended, or ends the run."""

import random

import pytest
import torch
import torch.distributed as dist

from tests.commands import course, fit, records, tensors
from train.compose import compose
from train.safety.replicas import digest
from train.trainer import Trainer


def fit_flipped(words: list[str], guilty: int, flips: dict[int, tuple[str, int]]) -> tuple[str, list[str]]:
    """A run in which bits of one rank's parameters flip while a step runs: by step, the kind of bucket and the bit.

    Returns what ended it, and the names of what was hit here.
    """
    trainer = Trainer(compose(words), torch.device("cpu"))
    honest, hit = trainer.engine.pipeline.step, []

    def step(program, batches):
        honest(program, batches)
        kind, bit = flips.pop(trainer.step + 1, ("", 0))
        if kind == "bias" and dist.get_rank() == guilty:
            bias = next(iter(trainer.engine.routers().values())).e_score_correction_bias
            bias.view(torch.int32)[0] ^= 1 << bit
        elif kind and dist.get_rank() == guilty:
            bucket = next(bucket for bucket in trainer.engine.buckets if bucket.kind == kind)
            name, parameter = list(bucket.parameters.items())[-1]
            parameter.data.view(torch.int16).view(-1)[-1] ^= 1 << bit
            hit.append(name)

    trainer.engine.pipeline.step = step
    try:
        trainer.fit()
    except RuntimeError as error:
        return str(error), hit
    return "", hit


EVERYTHING = ["train.batch.start=8", "train.steps=5", "checkpoint.every=5"]


@pytest.mark.fault(23)
def test_a_flipped_bit_is_named_and_mended_and_the_run_ends_as_if_it_had_not_been(workers, small, tmp_path):
    """DualPipe with data and expert parallelism: mirrored copies and data-parallel ones."""
    words = [*small, *EVERYTHING, f"run.dir={tmp_path}"]
    workers(4).run(fit, [*words, "run.name=whole"], timeout=300)
    found = workers(4).run(
        fit_flipped, [*words, "run.name=flipped"], 2, {2: ("dense", 0), 4: ("experts", 9)}, timeout=300
    )
    assert [ended for ended, _ in found] == [""] * 4
    [dense, expert] = found[2][1]
    assert records(tmp_path / "flipped", "corruptions.jsonl") == [
        {"step": 1, "wrong": [{"rank": 2, "parameter": dense}]},
        {"step": 3, "wrong": [{"rank": 2, "parameter": expert}]},
    ]
    assert course(tmp_path / "flipped") == course(tmp_path / "whole")
    assert tensors(tmp_path / "flipped", 5) == tensors(tmp_path / "whole", 5)


@pytest.mark.fault(23)
def test_a_router_bias_that_differs_ends_the_run_for_it_has_no_master(workers, small, tmp_path):
    words = [*small, *EVERYTHING, f"run.dir={tmp_path}", "run.name=bias"]
    for ended, _ in workers(4).run(fit_flipped, words, 1, {2: ("bias", 3)}, timeout=300):
        assert "the router's bias differs between ranks 0, 2, 3 and rank 1" in ended


@pytest.mark.fault(23)
def test_the_hash_sees_every_bit_and_every_swap():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(4099, generator=generator).bfloat16()
    whole = digest(tensor)
    for place in random.Random(0).sample(range(4099 * 16), 200):
        tensor.view(torch.int16)[place // 16] ^= torch.tensor(1 << place % 16).to(torch.int16)
        assert digest(tensor) != whole
        tensor.view(torch.int16)[place // 16] ^= torch.tensor(1 << place % 16).to(torch.int16)
    assert digest(tensor) == whole == digest(tensor[:].clone())
