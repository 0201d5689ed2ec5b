"""FP8 health against counting by hand, on what the linears of a layer really quantise."""

import numpy as np
import pytest
import torch

from kernels import fp8
from kernels.fp8.health import Health, shares
from kernels.linear import Numerics, linear
from tests.kernels.test_kept import weight

CPU = torch.device("cpu")


def figures(health: Health, layers: list[int]) -> dict:
    return shares(layers, *health.tables(layers, CPU))


def by_hand(x: torch.Tensor, power_of_two: bool) -> dict[str, float | list[float]]:
    """The same figures from the values that come back, tile by tile."""
    codes, scales = fp8.fp8_quantize(x, fp8.ROWS, power_of_two)
    back = fp8.fp8_dequantize(codes, scales, fp8.ROWS, torch.float32).numpy()
    values = x.float().numpy()
    crowded, reaches = 0, []
    for row, scale_row in zip(back, scales.numpy(), strict=True):
        for tile, scale in zip(np.split(row, range(128, len(row), 128)), scale_row, strict=True):
            crowded += max(int((np.abs(tile) == np.float32(448) * scale).sum()) - 1, 0)
            reaches += [np.abs(tile).max()] if tile.any() else []
    count = int((values != 0).sum())
    lost = int(((values != 0) & (back == 0)).sum())
    return {
        "underflow": lost / count,
        "saturation": crowded / count,
        "amax": [float(min(reaches)), float(max(reaches))],
    }


def agrees(found: dict, expected: dict) -> None:
    assert found == {name: pytest.approx(value) for name, value in expected.items()}


@pytest.mark.parametrize("power_of_two", [False, True])
def test_figures_are_those_of_counting_tile_by_tile(power_of_two):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 200, generator=generator) * torch.logspace(-6, 2, 37).unsqueeze(1)
    x[:, ::7] *= 1e-5  # lost beside the others
    x[3], x[4, :128], x[:, 5] = 0, 0, 0
    x[5, 10:20] = x[5].abs().max()  # a crowd at the top
    x = x.bfloat16()
    health = Health()
    health.begin(on=True)
    health.record(2, "gradient", x, *fp8.fp8_quantize(x, fp8.ROWS, power_of_two))
    found = figures(health, [0, 2])
    assert found.keys() == {"2"} and found["2"].keys() == {"gradient"}
    agrees(found["2"]["gradient"], by_hand(x, power_of_two))
    assert found["2"]["gradient"]["underflow"] > 0.05
    assert found["2"]["gradient"]["saturation"] >= 9 / x.numel() or power_of_two


def test_a_linears_input_and_gradient_are_counted_for_the_layer_of_its_forward():
    numerics, up = Numerics("fp8"), [weight(96, 200), weight(40, 200, seed=1)]
    x = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    numerics.health.begin(on=True)
    numerics.health.look(7)
    y, z = linear(x, up, numerics)
    numerics.health.look(None)
    (other,) = linear(x.detach().requires_grad_(), up[:1], numerics)
    numerics.health.look(8)  # backward of an earlier layer
    (2 * y.float().square().sum() + z.float().sum() + other.float().sum()).backward()
    found = figures(numerics.health, [7, 8])
    assert found.keys() == {"7"}
    agrees(found["7"]["activation"], by_hand(x.detach(), False))
    dy = (4 * y.detach().float()).bfloat16()
    assert found["7"]["gradient"]["amax"][1] == pytest.approx(float(dy.abs().max()), rel=0.01)


def test_counts_of_ranks_add_up_and_extremes_are_the_outermost():
    halves = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)).bfloat16().split(32)
    tables = []
    for part in (*halves, torch.cat(halves)):
        health = Health()
        health.begin(on=True)
        health.record(0, "activation", part, *fp8.fp8_quantize(part, fp8.ROWS, False))
        tables.append(health.tables([0], CPU))
    (one, low), (other, high), whole = tables
    assert shares([0], one + other, torch.maximum(low, high)) == shares([0], *whole)


def test_without_being_told_nothing_is_looked_at_and_a_new_step_forgets():
    health, x = Health(), torch.ones(2, 128).bfloat16()
    health.look(0)
    assert health.layer is None
    health.begin(on=True)
    health.look(0)
    health.record(health.layer, "activation", x, *fp8.fp8_quantize(x, fp8.ROWS, False))
    health.record(health.layer, "gradient", x[:0], *fp8.fp8_quantize(x[:0], fp8.ROWS, False))
    assert figures(health, [0])["0"].keys() == {"activation"}
    health.begin(on=True)
    assert figures(health, [0]) == {}


def test_what_is_not_finite_reaches_the_largest_amax():
    health, x = Health(), torch.ones(2, 128).bfloat16()
    x[1, 3] = float("nan")
    health.begin(on=True)
    health.record(0, "gradient", x, *fp8.fp8_quantize(x, fp8.ROWS, False))
    assert figures(health, [0])["0"]["gradient"]["amax"][1] == float("inf")
