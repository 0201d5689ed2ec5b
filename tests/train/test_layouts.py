"""Every parallel layout is the one-process run: losses, gradients, router loads, biases and initial parameters."""

from functools import cache

import pytest
import torch

from tests.train.layouts import LAYOUTS, gather, small_recipe, train_small

OTHERS = [name for name in LAYOUTS if name != "one process"]


@pytest.fixture(scope="module")
def run(workers):
    """run(layout name, precision, steps, gradients) -> results of all ranks, computed once."""

    @cache
    def results(name: str, precision: str, steps: int, gradients: bool) -> list[dict]:
        size = small_recipe(LAYOUTS[name], precision).parallel.world_size
        return workers(size).run(train_small, LAYOUTS[name], precision, steps, gradients)

    return results


@pytest.mark.parametrize("name", OTHERS)
def test_one_step_in_fp64_equals_one_process(run, name):
    expected, parts = run("one process", "fp64", 1, True), run(name, "fp64", 1, True)
    start, grads = gather(expected, "start"), gather(expected, "grads")
    for key, value in gather(parts, "start").items():
        assert torch.equal(value, start[key]), key
    one, other = expected[0]["history"][0], parts[0]["history"][0]
    for loss in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert other[loss] == pytest.approx(one[loss], rel=1e-12), loss
    for number, load in one["loads"].items():
        assert torch.equal(other["loads"][number], load), f"router of layer {number}"
    got = gather(parts, "grads")
    assert got.keys() == grads.keys()
    for key, grad in grads.items():
        assert grad.norm() > 0, f"{key} has no gradient: the comparison would prove nothing"
        assert (got[key] - grad).norm() <= 1e-10 * grad.norm(), key


@pytest.mark.parametrize("name", OTHERS)
def test_five_steps_in_fp32_follow_one_process(run, name):
    """To 1e-5, unless rounding tips a token between two experts of nearly equal affinity: 1e-4 more for each."""
    expected, parts = run("one process", "fp32", 5, False), run(name, "fp32", 5, False)
    tipped = 0.0
    for step, (one, other) in enumerate(zip(expected[0]["history"], parts[0]["history"], strict=True)):
        tipped += sum(float((other["loads"][n] - load).abs().sum()) / 2 for n, load in one["loads"].items())
        for loss in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert other[loss] == pytest.approx(one[loss], rel=1e-5 + 1e-4 * tipped), f"step {step}: {loss}"
    assert tipped <= 3, "of 25,600 choices"
    biases = {number: bias for part in parts for number, bias in part["biases"].items()}
    for number, bias in expected[0]["biases"].items():
        sure = torch.ones_like(bias, dtype=torch.bool)
        for one, other in zip(expected[0]["history"], parts[0]["history"], strict=True):
            load, theirs = one["loads"][number], other["loads"][number]
            differing = (load - theirs).abs().sum() / 2
            sure &= (load - load.mean()).abs() > differing
        assert torch.equal(bias[sure], biases[number][sure]), f"bias of layer {number}"


def test_every_rank_reports_the_same_totals(run):
    first, *rest = run("dualpipe 2, data 2, expert 2", "fp32", 5, False)
    for other in rest:
        for one, two in zip(first["history"], other["history"], strict=True):
            assert one["loss"] == two["loss"] and one["grad_norm"] == two["grad_norm"]


def test_live_activations_are_those_of_the_program(run):
    for part in run("dualpipe 4", "fp32", 5, False):
        assert part["peak"] == 5  # P + 1


def test_expert_ranks_issue_the_same_collectives_in_the_same_order(run):
    logs = [part["log"] for part in run("dualpipe 2, data 2, expert 2", "fp32", 5, False)]
    assert logs[0] and logs[0] == logs[1] and logs[2] == logs[3]
