"""Codes and scales, bit for bit, against the NumPy model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.fp8 import BLOCKS, COLUMNS, ROWS, formats
from tests.kernels import numpy_fp8


def same_bits(codes: torch.Tensor, expected: np.ndarray) -> bool:
    return np.array_equal(codes.view(torch.uint8).numpy(), expected)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (130, 257), (300, 64), (5, 576)])
def test_codes_and_scales_equal_the_numpy_model_bit_for_bit(shape, tile, power_of_two):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * torch.logspace(-6, 5, shape[1])
    x[:, ::7] = 0
    for dtype in (torch.bfloat16, torch.float32):
        values = x.to(dtype)
        codes, scales = formats.quantize(values, tile, power_of_two)
        expected_codes, expected_scales = numpy_fp8.quantize(values.float().numpy(), *tile, power_of_two)
        assert codes.shape == shape and same_bits(codes, expected_codes)
        assert np.array_equal(scales.numpy(), expected_scales)
        expected = numpy_fp8.dequantize(expected_codes, expected_scales, *tile).astype(np.float32)
        assert np.array_equal(formats.dequantize(codes, scales, tile).numpy(), expected)


def test_every_bfloat16_in_the_range_of_e4m3_rounds_like_the_numpy_model():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= 448]
    expected = numpy_fp8.encode(x.numpy())
    assert same_bits(x.to(torch.float8_e4m3fn), expected)
    assert np.array_equal(formats.round_to_e4m3(x).numpy(), numpy_fp8.decode(expected))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=50))
def test_rounding_any_fp32_value_equals_the_numpy_model(values):
    x = torch.tensor(values, dtype=torch.float32)
    assert np.array_equal(formats.round_to_e4m3(x).numpy(), numpy_fp8.decode(numpy_fp8.encode(x.numpy())))


def test_widening_is_exact_for_all_finite_codes():
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    assert np.array_equal(formats.widen(codes.view(torch.float8_e4m3fn)).numpy(), numpy_fp8.decode(codes.numpy()))


def test_power_of_two_scales_make_regrouping_lossless():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    codes, scales = formats.quantize(x, ROWS, power_of_two=True)
    once = formats.dequantize(codes, scales, ROWS)
    again = formats.dequantize(*formats.quantize(once, COLUMNS, power_of_two=True), COLUMNS)
    # Only values that become subnormal under a neighbour's larger scale may move.
    coarse = formats.quantize(once, COLUMNS, power_of_two=True)[1].repeat_interleave(128, 0) * 2.0**-6
    assert torch.equal(once[once.abs() >= coarse], again[once.abs() >= coarse])


def test_a_ragged_edge_has_the_scale_of_what_exists():
    x = torch.full((129, 130), 2.0)
    x[128, 129] = 4.0
    _, scales = formats.quantize(x, BLOCKS)
    assert torch.equal(scales, torch.tensor([[2.0, 2.0], [2.0, 4.0]]) / 448)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_visible(poison, power_of_two):
    x = torch.ones(2, 256)
    x[1, 200] = poison
    back = formats.dequantize(*formats.quantize(x, ROWS, power_of_two), ROWS)
    assert not back[1, 200].isfinite()
    assert back[0].isfinite().all() and back[1, :128].isfinite().all()


def test_empty_matrices_have_no_tiles():
    codes, scales = formats.quantize(torch.empty(0, 256), ROWS)
    assert codes.shape == (0, 256) and scales.shape == (0, 2)


def test_stacked_experts_are_quantised_one_by_one():
    w = torch.randn(3, 130, 140, generator=torch.Generator().manual_seed(0))
    codes, scales = formats.quantize(w, BLOCKS)
    for e in range(3):
        expected_codes, expected_scales = numpy_fp8.quantize(w[e].numpy(), *BLOCKS)
        assert same_bits(codes[e], expected_codes) and np.array_equal(scales[e].numpy(), expected_scales)
