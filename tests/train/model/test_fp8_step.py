"""One step in FP8 beside the same step in BF16: equal weights, equal batch, all forms of FP8 in play."""

from collections import defaultdict

import pytest
import torch

from parallel.passes import backward, forward, merge
from tests.train.model.test_recompute import batch_of, stage_of


def step(precision: str) -> tuple[dict[tuple[str, int], float], dict[str, torch.Tensor]]:
    """Losses, and the gradient of each layer in a row."""
    stage, numerics = stage_of(precision, ("norms", "mla_up", "swiglu"))
    batch, tape = batch_of(0), []
    merge(forward(stage, None, batch, tape))
    merge(backward(stage, None, batch, tape, numerics.weight_grads, split=False))
    numerics.weight_grads.run()
    layers = defaultdict(list)
    for name, parameter in stage.named_parameters():
        words = name.removeprefix("model.").split(".")
        layers[".".join(words[:2]) if words[0] == "layers" else words[0]].append(parameter.main_grad.flatten().double())
    return {key: float(loss) for key, loss in batch.losses.items()}, {key: torch.cat(of) for key, of in layers.items()}


@pytest.fixture(scope="module")
def steps():
    return step("bf16"), step("fp8")


def test_losses_are_within_a_quarter_of_a_percent(steps):
    (expected, _), (found, _) = steps
    assert found != expected
    for key, loss in expected.items():
        assert found[key] == pytest.approx(loss, rel=0.0025), key


def test_each_layers_gradient_points_the_same_way_and_is_as_long(steps):
    (_, expected), (_, found) = steps
    for layer, gradient in expected.items():
        assert torch.cosine_similarity(found[layer], gradient, dim=0) > 0.965, layer
        assert float(found[layer].norm() / gradient.norm()) == pytest.approx(1, abs=0.03), layer
