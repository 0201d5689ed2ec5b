"""One process on a GPU takes the steps that one process on the CPU takes. Needs a GPU: `make test-gpu`."""

import pytest
import torch

from tests.train.layouts import batch_of, small_recipe
from train.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def history(precision: str, device: str, steps: int = 3) -> list[dict[str, float]]:
    """Losses and gradient norms of a few steps of the small recipe in one process."""
    recipe = small_recipe({}, precision)
    engine = Engine(recipe, torch.device(device))
    seen = []
    for step in range(steps):
        rows, size = batch_of(step, recipe), recipe.train.batch.start
        tokens = {mb: rows[list(ids)].to(device) for mb, ids in engine.sequences(size).items()}
        totals = engine.forward_backward(tokens, size, mtp_weight=0.3)
        applied, norm = engine.update(1e-3, 1e-3, totals)
        assert applied
        seen.append({**totals.losses, "grad_norm": norm})
    return seen


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-4), ("bf16", 2e-2), ("fp8", 2e-2)])
def test_steps_on_a_gpu_follow_those_on_the_cpu(precision, tolerance):
    expected, seen = both(precision)
    for one, other in zip(expected, seen, strict=True):
        for key in ("loss", "mtp_loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=tolerance), key


def both(precision: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The same steps on CPU and GPU, in a world of one that has a backend for each."""
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        return history(precision, "cpu"), history(precision, "cuda")
    finally:
        torch.distributed.destroy_process_group()
