"""Codes and scales, bit for bit, against the NumPy model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.fp8 import BLOCKS, COLUMNS, ROWS, e5m6, formats
from tests.kernels import numpy_fp8
from tests.kernels.numpy_fp8 import E4M3, E5M6

TILES = [ROWS, COLUMNS, BLOCKS]
SIDES = st.one_of(st.sampled_from([0, 1, 7, 8, 127, 128, 129, 256, 300]), st.integers(0, 300))
POISONS = {"nothing": [], "inf": [math.inf], "-inf": [-math.inf], "nan": [math.nan], "both": [math.inf, math.nan]}


def random_values(generator: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """FP32 values of every sort: any bits at all, one exponent, halfway between two codes, subnormal, zero."""
    bits = generator.integers(0, 2**32, shape, dtype=np.uint32)
    exponent = generator.integers(1, 255)
    ranges = {"any": (0, 255), "near": (max(exponent - 20, 1), exponent + 1), "tiny": (0, 110), "huge": (230, 255)}
    if kind == "zero":
        return np.where(bits % 2, np.float32(0), np.float32(-0.0))
    if kind == "subnormal":
        return (bits & 0x807FFFFF).view(np.float32)
    low, high = ranges["near" if kind == "ties" else kind]
    fields = generator.integers(low, high, shape, dtype=np.uint32)
    values = (bits & 0x807FFFFF | fields << 23).view(np.float32)
    if kind == "ties":  # a power-of-two amax, and one bit more than the format keeps: exact halves abound
        values = (values.view(np.uint32) & np.uint32(0xFFF80000)).view(np.float32)
        values[:, ::128] = np.float32(448 * 2.0 ** (exponent - 135)) if 10 < exponent < 240 else values[:, ::128]
    return values


@st.composite
def matrices(draw) -> torch.Tensor:
    rows, columns = draw(SIDES), draw(SIDES)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["any", "near", "tiny", "huge", "ties", "subnormal", "zero"]))
    values = random_values(generator, kind, (rows, columns))
    values[generator.random(values.shape) < draw(st.sampled_from([0.0, 0.5]))] = 0
    for poison in POISONS[draw(st.sampled_from(sorted(POISONS)))]:
        if values.size:
            values.flat[generator.integers(values.size)] = poison
    return torch.from_numpy(values).to(draw(st.sampled_from([torch.bfloat16, torch.float32])))


def bits(codes: torch.Tensor) -> np.ndarray:
    """Our codes as integers; the sign of a NaN means nothing."""
    return unsigned_nan(codes.view(torch.uint8).numpy().astype(np.uint16), E4M3)


def unsigned_nan(codes: np.ndarray, form: numpy_fp8.Format) -> np.ndarray:
    return np.where(codes & form.sign - 1 == form.nan, form.nan, codes)


def assert_same_codes_and_scales(ours, expected) -> None:
    codes, scales = ours
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert np.array_equal(bits(codes), unsigned_nan(expected[0], E4M3))
    assert np.array_equal(scales.numpy(), expected[1], equal_nan=True)


def assert_same_where_finite(ours: torch.Tensor, expected: np.ndarray) -> None:
    expected = expected.astype(np.float32)
    finite = np.isfinite(expected)
    assert np.array_equal(ours.isfinite().numpy(), finite)
    assert np.array_equal(ours.numpy()[finite], expected[finite])


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from(TILES), st.booleans())
def test_codes_scales_and_their_meaning_equal_the_numpy_model(x, tile, power_of_two):
    with np.errstate(invalid="ignore", over="ignore"):
        expected = numpy_fp8.quantize(x.float().numpy(), *tile, power_of_two)
        meaning = numpy_fp8.dequantize(*expected, *tile)
        codes, scales = formats.quantize(x, tile, power_of_two)
        assert codes.shape == x.shape
        assert_same_codes_and_scales((codes, scales), expected)
        assert_same_where_finite(formats.dequantize(codes, scales, tile), meaning)


@settings(max_examples=100, deadline=None)
@given(matrices(), st.booleans())
def test_e5m6_words_scales_and_their_meaning_equal_the_numpy_model(x, power_of_two):
    R, C = x.shape
    words, scales = e5m6.quantize(x, power_of_two)
    assert words.dtype == torch.int32 and words.shape == (R, -(-C // 8) * 3) and scales.shape == (R, -(-C // 128))
    with np.errstate(invalid="ignore", over="ignore"):
        codes, expected_scales = numpy_fp8.quantize(x.float().numpy(), *ROWS, power_of_two, E5M6)
        unpacked = numpy_fp8.unpack_12(words.numpy())
        assert np.array_equal(unpacked[:, :C], unsigned_nan(codes, E5M6))
        assert not unpacked[:, C:].any()
        assert np.array_equal(scales.numpy(), expected_scales, equal_nan=True)
        assert_same_where_finite(
            e5m6.dequantize(words, scales, C), numpy_fp8.dequantize(codes, scales.numpy(), *ROWS, E5M6)
        )


@settings(max_examples=60, deadline=None)
@given(matrices(), st.booleans(), st.data())
def test_requantised_codes_and_scales_equal_the_numpy_model_in_every_group(x, power_of_two, data):
    T, C = x.shape
    first = data.draw(st.integers(0, T))
    counts = [first, 0, T - first]
    codes, scales = formats.quantize(x, ROWS, power_of_two)
    again, again_scales = formats.requantize(codes, scales, counts)
    tiles = [-(-count // 128) for count in counts]
    assert again.shape == (C, sum(tiles) * 128) and again_scales.shape == (C, sum(tiles))
    start = begin = 0
    for count, n in zip(counts, tiles, strict=True):
        rows, whole = slice(start, start + count), slice(begin * 128, (begin + n) * 128)
        with np.errstate(invalid="ignore", over="ignore"):
            expected = numpy_fp8.requantize(codes[rows].view(torch.uint8).numpy(), scales[rows].numpy())
        ours = again[:, whole][:, :count].t(), again_scales[:, begin : begin + n].t()
        assert_same_codes_and_scales(tuple(map(torch.Tensor.contiguous, ours)), expected)
        assert not again[:, whole][:, count:].float().any()
        start, begin = rows.stop, begin + n


@settings(max_examples=40, deadline=None)
@given(matrices(), st.sampled_from([torch.float16, torch.float64]), st.sampled_from(TILES))
def test_other_dtypes_are_rounded_to_fp32_first(x, dtype, tile):
    x = x.to(dtype) * (1 + 2.0**-30)
    with np.errstate(invalid="ignore", over="ignore"):
        assert_same_codes_and_scales(formats.quantize(x, tile), numpy_fp8.quantize(x.numpy(), *tile))
        words, scales = e5m6.quantize(x)
        expected, expected_scales = numpy_fp8.quantize(x.numpy(), *ROWS, form=E5M6)
    unpacked = numpy_fp8.unpack_12(words.numpy())[:, : x.shape[1]]
    assert np.array_equal(unpacked, unsigned_nan(expected, E5M6))
    assert np.array_equal(scales.numpy(), expected_scales, equal_nan=True)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("batch", [(3,), (2, 0), (2, 1, 2)])
def test_matrices_in_a_batch_are_quantised_one_by_one(batch, tile, dtype, power_of_two):
    x = torch.randn(*batch, 130, 140, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = formats.quantize(x, tile, power_of_two)
    words, word_scales = e5m6.quantize(x, power_of_two)
    assert codes.shape == x.shape and scales.shape == (*batch, -(-130 // tile[0]), -(-140 // tile[1]))
    assert words.shape == (*batch, 130, 54) and word_scales.shape == (*batch, 130, 2)
    back = formats.dequantize(codes, scales, tile)
    wide = e5m6.dequantize(words, word_scales, 140)
    assert back.shape == wide.shape == x.shape
    for place in np.ndindex(batch):
        expected = numpy_fp8.quantize(x[place].float().numpy(), *tile, power_of_two)
        assert_same_codes_and_scales((codes[place], scales[place]), expected)
        assert_same_where_finite(back[place], numpy_fp8.dequantize(*expected, *tile))
        expected = numpy_fp8.quantize(x[place].float().numpy(), *ROWS, power_of_two, E5M6)
        assert_same_where_finite(wide[place], numpy_fp8.dequantize(*expected, *ROWS, E5M6))


def test_every_bfloat16_in_the_range_of_e4m3_rounds_like_the_numpy_model():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= 448]
    expected = numpy_fp8.encode(x.numpy())
    assert np.array_equal(bits(x.to(torch.float8_e4m3fn)), expected)
    rounded = formats.round_to_e4m3(x).numpy()
    assert np.array_equal(rounded, numpy_fp8.decode(expected)) and np.array_equal(
        np.signbit(rounded), np.signbit(x.numpy())
    )


@pytest.mark.parametrize("form", [E4M3, E5M6, numpy_fp8.E5M2], ids=["E4M3", "E5M6", "E5M2"])
def test_the_judge_rounds_to_the_nearest_of_all_values_and_ties_to_the_even_code(form):
    """The judge itself, against a search through the list of all values."""
    values = numpy_fp8.decode(np.arange(form.nan if form is E4M3 else form.nan & ~(2**form.mantissa - 1)), form)
    assert values[-1] == form.largest and (np.diff(values) > 0).all()
    halves = (values[1:] + values[:-1]) / 2
    y = np.concatenate([values, halves, np.nextafter(halves.astype(np.float32), 0), halves * (1 + 2e-7)])
    y = y.astype(np.float32)
    distance = np.abs(y[:, None].astype(np.float64) - values)
    nearest = distance == distance.min(1, keepdims=True)
    even = np.where(nearest.sum(1) == 2, np.argmax(nearest & (np.arange(len(values)) % 2 == 0), 1), nearest.argmax(1))
    assert np.array_equal(numpy_fp8.encode(y, form), even)
    assert np.array_equal(numpy_fp8.encode(-y, form), even + form.sign)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=50))
def test_rounding_any_fp32_value_equals_the_numpy_model(values):
    x = torch.tensor(values, dtype=torch.float32)
    assert np.array_equal(formats.round_to_e4m3(x).numpy(), numpy_fp8.decode(numpy_fp8.encode(x.numpy())))


def test_widening_is_exact_for_all_codes():
    codes = torch.arange(256, dtype=torch.uint8)
    widened = formats.widen(codes.view(torch.float8_e4m3fn)).numpy()
    assert np.array_equal(widened, numpy_fp8.decode(codes.numpy()), equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_power_of_two_scales_make_regrouping_lossless(seed, T):
    x = torch.randn(T, 200, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, 200)
    codes, scales = formats.quantize(x, ROWS, power_of_two=True)
    once = formats.dequantize(codes, scales, ROWS)
    again, again_scales = formats.requantize(codes, scales, [T])
    assert (torch.frexp(again_scales).mantissa == 0.5).all()
    back = formats.dequantize(again, again_scales, ROWS).t()[:T]
    # Only values that become subnormal under a neighbour's larger scale may move.
    coarse = again_scales.t().repeat_interleave(128, 0)[:T] * 2.0**-6
    assert torch.equal(once[once.abs() >= coarse], back[once.abs() >= coarse])


def test_free_scales_stay_free():
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    _, scales = formats.requantize(*formats.quantize(x, ROWS), [256])
    assert (torch.frexp(scales).mantissa != 0.5).any()


def test_a_ragged_edge_has_the_scale_of_what_exists():
    x = torch.full((129, 130), 2.0)
    x[128, 129] = 4.0
    _, scales = formats.quantize(x, BLOCKS)
    assert torch.equal(scales, torch.tensor([[2.0, 2.0], [2.0, 4.0]]) / 448)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tile", TILES)
def test_what_lies_beyond_the_edge_of_a_view_reaches_no_scale(tile, dtype):
    around = torch.full((300, 300), math.nan, dtype=dtype)
    x = around[3:200, 5:150]
    x[:] = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for quantize in (lambda x: formats.quantize(x, tile), e5m6.quantize):
        (codes, scales), (expected, expected_scales) = quantize(x), quantize(x.clone())
        assert torch.equal(scales, expected_scales) and scales.isfinite().all()
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("columns", [128, 200, 7])
def test_rows_that_travelled_come_back_in_the_order_asked_for(columns):
    """The bytes of codes and scales lie beside others in a row."""
    x = torch.randn(20, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scales = formats.quantize(x, ROWS, True)
    rows = torch.cat([codes.view(torch.uint8), scales.view(torch.uint8), torch.full((20, 3), 255).byte()], 1)
    parts = rows[:, :columns].view(codes.dtype), rows[:, columns:-3]
    for order in (torch.randperm(20), torch.tensor([3, 3, 19]), torch.arange(0)):
        expected = formats.dequantize(codes[order], scales[order], ROWS).bfloat16()
        assert torch.equal(formats.gather_dequantize(*parts, order, torch.bfloat16), expected)


def test_a_group_never_reaches_the_scales_of_the_next():
    x = torch.ones(200, 128)
    x[60:] = 1000.0
    _, scales = formats.requantize(*formats.quantize(x, ROWS), [60, 140])
    assert torch.allclose(scales * 448, torch.tensor([1.0, 1000.0, 1000.0]).expand(128, 3))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_tile_with_a_non_finite_value_is_non_finite_throughout_and_no_other_tile_is(poison, power_of_two):
    x = torch.ones(2, 256)
    x[1, 200] = poison
    for values in (x, x.bfloat16()):
        codes, scales = formats.quantize(values, ROWS, power_of_two)
        for back in (
            formats.dequantize(codes, scales, ROWS),
            e5m6.dequantize(*e5m6.quantize(values, power_of_two), 256),
        ):
            assert back[0].isfinite().all() and back[1, :128].isfinite().all() and not back[1, 128:].isfinite().any()
        again, again_scales = formats.requantize(codes, scales, [2])
        back = formats.dequantize(again, again_scales, ROWS)[:, :2].t()
        assert back[:, :128].isfinite().all() and not back[:, 128:].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 256), (256, 0), (0, 0)])
def test_empty_matrices_have_no_tiles(shape):
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(shape, dtype=dtype)
        codes, scales = formats.quantize(x, ROWS)
        assert codes.shape == shape and scales.shape == (shape[0], shape[1] // 128)
        words, scales = e5m6.quantize(x)
        assert words.shape == (shape[0], shape[1] // 8 * 3) and e5m6.dequantize(words, scales, shape[1]).shape == shape
        again, _ = formats.requantize(codes, scales, [shape[0]])
        assert again.shape == (shape[1], shape[0])


def test_what_does_not_fit_is_said():
    x = torch.randn(130, 256)
    codes, scales = formats.quantize(x, ROWS)
    with pytest.raises(ValueError, match=r"quantize: x is torch.int64 .* expected floating point"):
        formats.quantize(x.long(), ROWS)
    with pytest.raises(ValueError, match=r"expected floating point \[..., rows, columns\]"):
        formats.quantize(x[0], ROWS)
    with pytest.raises(ValueError, match=r"scales \[130, 2\] for \[130, 256\] in \(128, 1\): expected \[2, 256\]"):
        formats.dequantize(codes, scales, COLUMNS)
    with pytest.raises(ValueError, match=r"float32 \[.*expected torch.uint8"):
        formats.gather_dequantize(codes, scales, torch.arange(1))
    with pytest.raises(ValueError, match=r"counts \[100\]: expected .* add up to 130"):
        formats.requantize(codes, scales, [100])
