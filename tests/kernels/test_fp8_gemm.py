"""The reference GEMMs against FP64 GEMMs of what the NumPy model says their operands mean."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.fp8 import (
    BLOCKS,
    ROWS,
    formats,
    fp8_grouped_dgrad,
    fp8_grouped_linear,
    fp8_grouped_wgrad,
    fp8_linear,
    fp8_linear_dgrad,
    fp8_linear_wgrad,
    fp8_requantize,
)
from kernels.fp8.backends import reference
from tests.kernels import numpy_fp8

REFERENCE = "reference"
FP32 = torch.float32


def assert_fp32_close(result: torch.Tensor, a: np.ndarray, b: np.ndarray) -> None:
    """result = a @ b up to FP32 roundings: an error of a few units of 2^-24 of sum |a| |b|."""
    bound = (np.abs(a) @ np.abs(b)) * 2.0**-22
    assert result.dtype == FP32
    assert (np.abs(result.double().numpy() - a @ b) <= bound + 1e-30).all()


def quantised(
    generator: torch.Generator, *shape: int, tile: tuple[int, int] = ROWS, power_of_two: bool = False
) -> tuple[tuple, np.ndarray]:
    """A random matrix as (codes, scales), and what it means in FP64."""
    x = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[-1])
    codes, scales = formats.quantize(x, tile, power_of_two)
    if len(shape) == 2:
        return (codes, scales), numpy_fp8.dequantize(codes.view(torch.uint8).numpy(), scales.numpy(), *tile)
    pairs = zip(codes.view(torch.uint8).numpy(), scales.numpy(), strict=True)
    return (codes, scales), np.stack([numpy_fp8.dequantize(c, s, *tile) for c, s in pairs])


def columns(pair: tuple[torch.Tensor, torch.Tensor], rows: slice = slice(None)) -> np.ndarray:
    codes, scales = pair
    return numpy_fp8.to_columns(codes.view(torch.uint8).numpy()[rows], scales.numpy()[rows])


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("M", "K", "widths"), [(256, 256, (128, 160)), (1, 128, (1,)), (77, 300, (40, 257, 128))])
def test_linear_gemms_equal_fp64(M, K, widths, power_of_two):
    g = torch.Generator().manual_seed(M)
    x, x_64 = quantised(g, M, K, power_of_two=power_of_two)
    weights, weights_64 = zip(*(quantised(g, N, K, tile=BLOCKS) for N in widths), strict=True)
    dys, dys_64 = zip(*(quantised(g, M, N) for N in widths), strict=True)
    w_codes, w_scales = map(list, zip(*weights, strict=True))
    dy_codes, dy_scales = map(list, zip(*dys, strict=True))

    for y, w in zip(fp8_linear(*x, w_codes, w_scales, FP32, REFERENCE), weights_64, strict=True):
        assert_fp32_close(y, x_64, w.T)
    dx = fp8_linear_dgrad(dy_codes, dy_scales, w_codes, w_scales, FP32, REFERENCE)
    assert_fp32_close(dx, np.concatenate(dys_64, 1), np.concatenate(weights_64, 0))
    before = [torch.randn(N, K, generator=g) for N in widths]
    main_grads = [b.clone() for b in before]
    fp8_linear_wgrad(*x, dy_codes, dy_scales, main_grads, REFERENCE)
    for dy, start, main_grad in zip(dys, before, main_grads, strict=True):
        one = np.concatenate([columns(dy).T, start.double().numpy()], 1)
        assert_fp32_close(main_grad, one, np.concatenate([columns(x), np.eye(K)], 0))


@pytest.mark.parametrize("counts", [[64, 0, 130, 128], [0, 0, 0, 300], [0, 0, 0, 0], [1, 2, 3, 4]])
def test_grouped_gemms_equal_fp64_and_tiles_begin_anew_at_every_expert(counts):
    g = torch.Generator().manual_seed(sum(counts))
    R, K, N = sum(counts), 192, 136
    x, x_64 = quantised(g, R, K)
    dy, dy_64 = quantised(g, R, N)
    w, w_64 = quantised(g, len(counts), N, K, tile=BLOCKS)
    y = fp8_grouped_linear(*x, *w, counts, FP32, REFERENCE)
    dx = fp8_grouped_dgrad(*dy, *w, counts, FP32, REFERENCE)
    main_grad = torch.zeros(len(counts), N, K)
    fp8_grouped_wgrad(*x, *dy, main_grad, counts, REFERENCE)
    assert y.shape == (R, N) and dx.shape == (R, K)
    start = 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        if count == 0:
            assert not main_grad[e].any()
            continue
        assert_fp32_close(y[rows], x_64[rows], w_64[e].T)
        assert_fp32_close(dx[rows], dy_64[rows], w_64[e])
        assert_fp32_close(main_grad[e], columns(dy, rows).T, columns(x, rows))


def test_weight_gradients_read_what_requantising_gives():
    g = torch.Generator().manual_seed(0)
    counts = [100, 0, 160]
    (x, _), (dy, _) = quantised(g, 260, 192, power_of_two=True), quantised(g, 260, 136)
    main_grad = torch.zeros(3, 136, 192)
    fp8_grouped_wgrad(*x, *dy, main_grad, counts, REFERENCE)
    x_64, dy_64 = (formats.dequantize(*fp8_requantize(*each, counts), ROWS).double().numpy() for each in (x, dy))
    for e, rows in enumerate((slice(0, 128), slice(0, 0), slice(128, 384))):
        assert_fp32_close(main_grad[e], dy_64[:, rows], x_64[:, rows].T)


def test_widened_weights_give_the_same_bits_as_codes():
    g = torch.Generator().manual_seed(0)
    x, _ = quantised(g, 40, 256)
    (codes, scales), _ = quantised(g, 130, 256, tile=BLOCKS)
    operands = ([codes], [scales]), ([formats.widen(codes)], [scales])
    (y,), (y_widened,) = (fp8_linear(*x, *w, FP32, REFERENCE) for w in operands)
    assert torch.equal(y, y_widened)


class Shapes(TorchDispatchMode):
    """The rows, inner and outer widths of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.seen.add((*args[0].shape, args[1].shape[1]))
        return func(*args, **(kwargs or {}))


def test_experts_with_any_number_of_rows_need_few_shapes_of_products():
    """oneDNN compiles one kernel for each, and forgets the oldest of a thousand."""
    g, shapes = torch.Generator().manual_seed(0), Shapes()
    counts = list(range(1, 40))
    (x, _), (dy, _) = quantised(g, sum(counts), 128), quantised(g, sum(counts), 128)
    (codes, scales), _ = quantised(g, 128, 128, tile=BLOCKS)
    weights = codes.expand(len(counts), -1, -1), scales.expand(len(counts), -1, -1)
    with shapes:
        reference.grouped_linear(*x, *weights, counts)
        reference.grouped_wgrad(*x, *dy, torch.zeros(len(counts), 128, 128), counts)
    assert shapes.seen == {(rows, 128, 128) for rows in (16, 32, 48)} | {(128, rows, 128) for rows in (16, 32, 48)}


def test_the_callers_precision_setting_survives():
    g = torch.Generator().manual_seed(0)
    x, _ = quantised(g, 8, 128)
    w, _ = quantised(g, 8, 128, tile=BLOCKS)
    before = torch.backends.mkldnn.matmul.fp32_precision
    fp8_linear(*x, [w[0]], [w[1]], FP32, REFERENCE)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
