"""Every schedule takes the one-process step: its losses to the bit, its gradients to rounding."""

from functools import cache

import pytest
import torch

from parallel.schedule import SCHEDULES
from tests.train.layouts import gather, small_recipe, train_small

ONE = {}
LOSSES = ("loss", "mtp_loss", "balance_loss")


@pytest.fixture(scope="module")
def run(workers):
    """run(layout, precision, layers, depths) -> results of all ranks after one step, computed once."""

    @cache
    def results(layout, precision, layers, depths):
        model = {"num_hidden_layers": layers, "num_nextn_predict_layers": depths}
        size = small_recipe(dict(layout), precision, **model).parallel.world_size
        return workers(size).run(train_small, dict(layout), precision, 1, True, **model)

    return lambda layout, *rest: results(tuple(layout.items()), *rest)


def assert_same_gradients(one, other, tolerance):
    expected, got = gather(one, "grads"), gather(other, "grads")
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.norm() > 0, f"{key} has no gradient: the comparison would prove nothing"
        assert (got[key] - gradient).norm() <= tolerance * gradient.norm(), key
    norms = (part[0]["history"][0]["grad_norm"] for part in (one, other))
    assert next(norms) == pytest.approx(next(norms), rel=tolerance)


# (ranks, layers, MTP depths): a layer for each stage where a rank holds two
SHAPES = [(2, 5, 1), (4, 8, 0), pytest.param(8, 16, 1, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("ranks", "layers", "depths"), SHAPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_is_that_of_one_process(run, name, ranks, layers, depths):
    one = run(ONE, "fp32", layers, depths)
    other = run({"schedule": name, "pipeline": ranks}, "fp32", layers, depths)
    expected = one[0]["history"][0]
    for part in other:
        got = part["history"][0]
        assert {loss: got[loss] for loss in LOSSES} == {loss: expected[loss] for loss in LOSSES}
        assert all(torch.equal(got["loads"][number], load) for number, load in expected["loads"].items())
    assert_same_gradients(one, other, 1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_expert_parallelism_a_step_is_that_of_one_process_to_rounding(run, name):
    one = run(ONE, "fp32", 5, 1)
    other = run({"schedule": name, "pipeline": 2, "data": 2, "expert": 2}, "fp32", 5, 1)
    for loss in LOSSES:
        assert other[0]["history"][0][loss] == pytest.approx(one[0]["history"][0][loss], rel=1e-6)
    assert_same_gradients(one, other, 1e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "1f1b"])
def test_in_fp8_the_schedules_agree(run, name):
    one = run({"schedule": "1f1b", "pipeline": 2}, "fp8", 5, 1)
    other = run({"schedule": name, "pipeline": 2}, "fp8", 5, 1)
    assert all(other[0]["history"][0][loss] == one[0]["history"][0][loss] for loss in LOSSES)
    assert_same_gradients(one, other, 1e-6)
