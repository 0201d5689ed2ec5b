"""What `test_fp8_triton` runs in Triton's interpreter: FP32 for codes, exact where kernels only move and divide.

Codes are x / s before it is narrowed, and the GEMMs multiply FP32 values that are codes. Judges are `formats` and FP64.
"""

import pytest
import torch

import kernels.fp8.backends.triton as ours
from kernels.fp8 import formats
from kernels.fp8.backends.triton import gemm
from kernels.fp8.formats import BLOCKS, COLUMNS, ROWS, TILE
from kernels.norm import rms_norm_forward
from kernels.swiglu import swiglu_forward

SHAPES = [(1, 1), (3, 128), (130, 257), (256, 384), (0, 200)]


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=g) * torch.logspace(-3, 3, shape[-1])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


def divided(x: torch.Tensor, scales: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    return formats.join(formats.split(x, tile) / scales.unsqueeze(-1).unsqueeze(-3), *x.shape[-2:])


def assert_quantised(result: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, tile, power_of_two: bool) -> None:
    codes, scales = result
    _, expected = formats.quantize(x, tile, power_of_two)
    assert same(scales, expected)
    assert same(codes, divided(x, expected, tile))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 130, 130)])
def test_quantize(g, shape, tile, power_of_two):
    x = random(g, *shape)
    assert_quantised(ours.quantize(x, tile, power_of_two), x, tile, power_of_two)


@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
def test_bad_values_spoil_their_tiles_and_tiny_ones_have_the_smallest_scale(g, tile):
    x = random(g, 300, 300)
    x[5, 7], x[140, 2], x[200, 290] = float("nan"), float("inf"), 1e-30
    x[128:256, 128:256] = 0.0
    x[256:, 128:256] *= 1e-8  # below the smallest amax
    for power_of_two in (False, True):
        assert_quantised(ours.quantize(x, tile, power_of_two), x, tile, power_of_two)


def test_quantize_refuses_what_is_no_matrix_of_floats():
    for x in (torch.ones(4), torch.ones(4, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="floating point"):
            ours.quantize(x, ROWS)


@pytest.mark.parametrize("shape", SHAPES)
def test_permute_quantize_casts_the_rows_that_are_named(g, shape):
    x = random(g, *shape)
    index = torch.randint(max(shape[0], 1), (2 * shape[0],), generator=g)
    assert_quantised(ours.permute_quantize(x, index), x[index], ROWS, False)


@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize("shape", [(3, 128), (3, 130, 130)])
def test_dequantize(g, shape, tile):
    codes, scales = formats.quantize(random(g, *shape), tile)
    back = ours.dequantize(formats.widen(codes), scales, tile)
    assert same(back, formats.dequantize(codes, scales, tile))


@pytest.mark.parametrize("beside", [0, 5])
@pytest.mark.parametrize("shape", [(1, 1), (130, 257)])
def test_gather_dequantize_picks_rows_whose_scales_begin_anywhere(g, shape, beside):
    codes, scales = formats.quantize(random(g, *shape), ROWS)
    others = torch.full((shape[0], beside), 255, dtype=torch.uint8)
    rows = torch.cat([others, scales.view(torch.uint8), others], 1)
    apart = torch.cat([formats.widen(codes), torch.full((shape[0], 3), torch.nan)], 1)
    order = torch.randint(max(shape[0], 1), (2 * shape[0],), generator=g)
    picked = ours.gather_dequantize(apart[:, : shape[1]], rows[:, beside : beside + 4 * scales.shape[1]], order)
    assert same(picked, formats.dequantize(codes[order], scales[order], ROWS))


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_both_groups_one_matrix_along_rows_and_along_columns(g, shape):
    x = random(g, *shape)
    codes, scales, turned, turned_scales = ours.quantize_both(x)
    assert_quantised((codes, scales), x, ROWS, False)
    filled = torch.nn.functional.pad(x, (0, 0, 0, -shape[0] % TILE))
    assert_quantised((turned, turned_scales), filled.t().contiguous(), ROWS, False)


@pytest.mark.parametrize("counts", [[64, 0, 130, 128], [0, 0, 300], [0, 0], [1, 2, 3, 4, 5], [256]])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_requantize_begins_a_tile_with_every_group(g, counts, power_of_two):
    codes, scales = formats.quantize(random(g, sum(counts), 200), ROWS)
    if power_of_two:  # for half of the columns
        scales[:, 0] = 0.25
    values, expected = formats.regroup(codes, scales, counts)
    turned, turned_scales = ours.requantize(formats.widen(codes), scales, counts)
    assert same(turned_scales, expected.t())
    assert same(formats.round_to_e4m3(turned), values.t())
    assert turned.is_contiguous()


def test_requantize_refuses_counts_that_do_not_fit():
    with pytest.raises(ValueError, match="counts"):
        ours.requantize(torch.zeros(4, 128), torch.ones(4, 1), [1, 2])


def assert_close(codes: torch.Tensor, scales: torch.Tensor, y: torch.Tensor) -> None:
    """Of the same value up to a few roundings: each has its own exponential or root."""
    expected = formats.quantize(y, ROWS)[1]
    torch.testing.assert_close(scales, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(codes, divided(y, expected, ROWS), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("R", "F"), [(1, 1), (5, 128), (70, 300), (0, 128)])
def test_swiglu_quantize(g, R, F, weighted):
    gate_up = torch.randn(R, 2 * F, generator=g) * 4
    weight = torch.rand(R, generator=g) if weighted else None
    assert_close(*ours.swiglu_quantize(gate_up, weight), swiglu_forward(gate_up[:, :F], gate_up[:, F:], weight))


@pytest.mark.parametrize(("T", "D"), [(1, 1), (5, 128), (7, 300), (3, 1100), (0, 128)])
def test_rmsnorm_quantize(g, T, D):
    x, gain = torch.randn(T, D, generator=g), torch.randn(D, generator=g)
    y, inverse = rms_norm_forward(x, gain, 1e-6)
    codes, scales, found = ours.rmsnorm_quantize(x, gain, 1e-6)
    torch.testing.assert_close(found, inverse)
    assert_close(codes, scales, y)


SIZES = {"x".join(map(str, c.kwargs.values())): c for c in gemm.CONFIGS}


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def config(request, monkeypatch):
    """Every size of tile that tuning may pick."""
    for kernel in (gemm._multiply_kernel, gemm._accumulate_kernel):
        monkeypatch.setattr(kernel, "configs", [request.param])


def quantised(g: torch.Generator, *shape: int, tile: tuple[int, int] = ROWS) -> tuple[torch.Tensor, ...]:
    """FP32 values of codes, scales, and what they mean in FP64."""
    codes, scales = formats.quantize(random(g, *shape), tile)
    return formats.widen(codes), scales, formats.dequantize(codes, scales, tile).double()


def assert_product(result: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """result = a @ b up to FP32 roundings."""
    bound = (a.abs() @ b.abs()) * 2.0**-21
    assert ((result.double() - a @ b).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize(("M", "K", "widths"), [(128, 256, (128,)), (1, 128, (1,)), (77, 200, (40, 257))])
def test_linear_gemms_equal_fp64(g, config, M, K, widths):
    x, x_scales, x_64 = quantised(g, M, K)
    ws, w_scales, ws_64 = zip(*(quantised(g, N, K, tile=BLOCKS) for N in widths), strict=True)
    dys, dy_scales, dys_64 = zip(*(quantised(g, M, N) for N in widths), strict=True)
    for y, w in zip(ours.linear(x, x_scales, ws, w_scales), ws_64, strict=True):
        assert_product(y, x_64, w.t())
    dx = ours.linear_dgrad(list(dys), list(dy_scales), list(ws), list(w_scales))
    assert_product(dx, torch.cat(dys_64, 1), torch.cat(ws_64))
    before = [torch.randn(N, K, generator=g) for N in widths]
    main_grads = [b.clone() for b in before]
    ours.linear_wgrad(x, x_scales, list(dys), list(dy_scales), main_grads)
    columns = over_tokens(x, x_scales)
    for dy, scales, start, main_grad in zip(dys, dy_scales, before, main_grads, strict=True):
        assert_product(
            main_grad,
            torch.cat([over_tokens(dy, scales).t(), start.double()], 1),
            torch.cat([columns, torch.eye(K).double()]),
        )


def over_tokens(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What the unrounded 128x1 tiles of a matrix mean: the matrix itself."""
    return formats.dequantize(values, scales, ROWS).double()


@pytest.mark.parametrize("counts", [[64, 0, 130, 0], [0, 0, 0], [1, 2]])
def test_grouped_gemms_equal_fp64_and_leave_empty_groups_alone(g, config, counts):
    R, K, N = sum(counts), 192, 136
    x, x_scales, x_64 = quantised(g, R, K)
    dy, dy_scales, dy_64 = quantised(g, R, N)
    w, w_scales, w_64 = quantised(g, len(counts), N, K, tile=BLOCKS)
    y = ours.grouped_linear(x, x_scales, w, w_scales, counts)
    dx = ours.grouped_dgrad(dy, dy_scales, w, w_scales, counts)
    main_grad = torch.full((len(counts), N, K), float("nan"))
    main_grad[torch.tensor(counts) > 0] = 0.0
    ours.grouped_wgrad(x, x_scales, dy, dy_scales, main_grad, counts)
    assert y.shape == (R, N) and dx.shape == (R, K)
    start = 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        if count == 0:
            assert main_grad[e].isnan().all()
            continue
        assert_product(y[rows], x_64[rows], w_64[e].t())
        assert_product(dx[rows], dy_64[rows], w_64[e])
        assert_product(main_grad[e], dy_64[rows].t(), x_64[rows])


def test_no_rows_give_no_rows(g):
    x, x_scales, _ = quantised(g, 0, 128)
    w, w_scales, _ = quantised(g, 64, 128, tile=BLOCKS)
    assert ours.linear(x, x_scales, [w], [w_scales], torch.bfloat16)[0].shape == (0, 64)
    main_grad = torch.ones(64, 128)
    ours.linear_wgrad(x, x_scales, [x[:, :64]], [x_scales], [main_grad])
    assert torch.equal(main_grad, torch.ones(64, 128))


def test_operands_and_scales_may_lie_in_any_layout(g):
    x, x_scales, x_64 = quantised(g, 70, 256)
    w, w_scales, w_64 = quantised(g, 130, 256, tile=BLOCKS)
    turned = [each.t().contiguous().t() for each in (x, x_scales, w, w_scales)]
    (y,) = ours.linear(*turned[:2], turned[2:3], turned[3:])
    assert_product(y, x_64, w_64.t())
