"""The Triton kernels against the reference on the CPU: bytes of casts, GEMMs in FP64. `make test-gpu`.

Every code and scale is equal, except a NaN's sign, which means nothing, and where a fused kernel's exponential or root
differs in the last bit and moves a value across a rounding boundary of BF16.
"""

import pytest
import torch

from kernels.fp8 import formats
from kernels.fp8.compare import ALIKE, calc_diff
from kernels.fp8.formats import BLOCKS, COLUMNS, ROWS, TILE
from kernels.norm import rms_norm_forward
from kernels.swiglu import swiglu_forward

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
    ),
]

SHAPES = [(1, 1), (3, 128), (130, 257), (1000, 2112), (4096, 7168), (0, 200)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def ours():
    """Imported when a GPU is there to run it."""
    import kernels.fp8.backends.triton

    return kernels.fp8.backends.triton


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=g) * torch.logspace(-2, 2, shape[-1])).to(dtype)


def bits(codes: torch.Tensor) -> torch.Tensor:
    """Bytes, with one for all NaN."""
    codes = codes.cpu().view(torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0x7F, codes)


def assert_equal(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=0, atol=0, equal_nan=True)
    assert found[0].dtype == torch.float8_e4m3fn
    assert torch.equal(bits(found[0]), bits(expected[0]))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 130, 130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts_give_the_bytes_of_the_reference(ours, g, dtype, shape, tile, power_of_two):
    x = random(g, *shape, dtype=dtype)
    assert_equal(ours.quantize(x.cuda(), tile, power_of_two), formats.quantize(x, tile, power_of_two))


@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_pattern_of_bits_is_cast_as_the_reference_casts_it(ours, g, tile, power_of_two):
    """Subnormals, zeros of both signs, infinities and NaN among them."""
    x = torch.randint(-(2**31), 2**31, (1024, 1024), generator=g).to(torch.int32).view(torch.float32)
    some = torch.where(x.isfinite(), x, torch.tensor(-0.0))
    for values in (x, some, some.clamp(-1e-3, 1e-3), some.clamp(-500, 500), some.clamp(-1e36, 1e36)):
        assert_equal(ours.quantize(values.cuda(), tile, power_of_two), formats.quantize(values, tile, power_of_two))


def test_values_next_to_every_boundary_of_rounding_are_cast_as_the_reference_casts_them(ours, g):
    scale = torch.rand(4096, 1, generator=g) * 100 + 1e-3
    halves = torch.arange(8, 16).add(0.5)[None, :] * 2.0 ** torch.arange(-9, 5)[:, None]
    x = scale * torch.cat([halves.flatten(), -halves.flatten()])[:TILE]
    x[:, -1] = 448 * scale[:, 0]
    for moved in (x, x.nextafter(torch.zeros(())), x.nextafter(x * 2)):
        assert_equal(ours.quantize(moved.cuda(), ROWS), formats.quantize(moved, ROWS))


@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 130, 130)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_codes_come_back_as_from_the_reference(ours, g, dtype, shape, tile):
    codes, scales = formats.quantize(random(g, *shape), tile)
    back = ours.dequantize(codes.cuda(), scales.cuda(), tile, dtype).cpu()
    assert torch.equal(back, formats.dequantize(codes, scales, tile, dtype))


@pytest.mark.parametrize("beside", [0, 1, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_travelled_are_picked_and_dequantised(ours, g, shape, beside):
    """Beside other bytes in a row, so that scales begin anywhere."""
    codes, scales = (each.view(torch.uint8) for each in formats.quantize(random(g, *shape), ROWS, True))
    rows = torch.cat([codes, scales, torch.full((len(codes), beside), 255, dtype=torch.uint8)], 1).cuda()
    travelled = rows[:, : shape[1]].view(torch.float8_e4m3fn), rows[:, shape[1] :][:, : scales.shape[1]]
    order = torch.randint(max(shape[0], 1), (2 * shape[0],), generator=g)
    expected = formats.gather_dequantize(codes.view(torch.float8_e4m3fn), scales, order, torch.bfloat16)
    assert torch.equal(ours.gather_dequantize(*travelled, order.cuda(), torch.bfloat16).cpu(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_groupings_and_permuted_rows_give_the_bytes_of_the_reference(ours, g, shape):
    x = random(g, *shape)
    index = torch.randint(max(shape[0], 1), (2 * shape[0],), generator=g)
    assert_equal(ours.permute_quantize(x.cuda(), index.cuda()), formats.quantize(x[index], ROWS))
    codes, scales, turned, turned_scales = ours.quantize_both(x.cuda())
    assert_equal((codes, scales), formats.quantize(x, ROWS))
    filled = torch.nn.functional.pad(x, (0, 0, 0, -shape[0] % TILE)).t().contiguous()
    assert_equal((turned, turned_scales), formats.quantize(filled, ROWS))


@pytest.mark.parametrize("counts", [[64, 0, 130, 128], [0, 0, 300], [0, 0], [1, 2, 3, 4, 5], [1024, 3072]])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_requantised_operands_of_weight_gradients_have_the_bytes_of_the_reference(ours, g, counts, power_of_two):
    codes, scales = formats.quantize(random(g, sum(counts), 720), ROWS, power_of_two)
    assert_equal(ours.requantize(codes.cuda(), scales.cuda(), counts), formats.requantize(codes, scales, counts))


def assert_nearly_equal(found: tuple[torch.Tensor, torch.Tensor], y: torch.Tensor) -> None:
    """Of one value in BF16, but for a few that another last bit of FP32 rounds to its neighbour."""
    codes, scales = formats.quantize(y, ROWS)
    same = bits(found[0]) == bits(codes)
    same_scale = found[1].cpu() == scales
    if y.numel():
        assert same_scale.float().mean() > 0.999 and same.float().mean() > 0.998
        meant, expected = (formats.dequantize(c.cpu(), s.cpu(), ROWS) for c, s in (found, (codes, scales)))
        torch.testing.assert_close(meant, expected, rtol=2**-3, atol=float(scales.max()) * 2**-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("R", "F"), [(1, 1), (70, 300), (4096, 2048), (0, 128)])
def test_swiglu_and_its_cast_in_one_kernel(ours, g, R, F, weighted):
    gate_up = (torch.randn(R, 2 * F, generator=g) * 3).bfloat16()
    weight = torch.rand(R, generator=g) if weighted else None
    y = swiglu_forward(gate_up[:, :F], gate_up[:, F:], weight)
    assert_nearly_equal(ours.swiglu_quantize(gate_up.cuda(), None if weight is None else weight.cuda()), y)


@pytest.mark.parametrize(("T", "D"), [(1, 1), (7, 300), (4096, 7168), (512, 1536), (0, 128)])
def test_rmsnorm_and_its_cast_in_one_kernel(ours, g, T, D):
    x, gain = random(g, T, D), torch.randn(D, generator=g).bfloat16()
    y, inverse = rms_norm_forward(x, gain, 1e-6)
    codes, scales, found = ours.rmsnorm_quantize(x.cuda(), gain.cuda(), 1e-6)
    torch.testing.assert_close(found.cpu(), inverse)
    assert_nearly_equal((codes, scales), y)


def quantised(g: torch.Generator, *shape: int, tile: tuple[int, int] = ROWS) -> tuple[torch.Tensor, ...]:
    """Codes and scales on the GPU, and what they mean in FP64."""
    codes, scales = (each.cuda() for each in formats.quantize(random(g, *shape), tile))
    return codes, scales, formats.dequantize(codes, scales, tile).double()


def assert_product(result: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """a @ b, but for BF16 and for the 14 bits that Hopper's tensor cores keep: 32 products, cut off at the largest."""
    exact = a @ b
    assert calc_diff(result.double(), exact) < ALIKE
    assert ((result.double() - exact).abs() <= 2.0**-7 * (a.abs() @ b.abs()) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("M", "K", "widths"),
    [(1, 128, (1,)), (77, 300, (40, 257, 128)), (1000, 2112, (1536, 576)), (4096, 7168, (2112,)), (4096, 512, (4096,))],
)
def test_linear_gemms_are_near_fp64(ours, g, dtype, M, K, widths):
    x, x_scales, x_64 = quantised(g, M, K)
    ws, w_scales, ws_64 = map(list, zip(*(quantised(g, N, K, tile=BLOCKS) for N in widths), strict=True))
    dys, dy_scales, dys_64 = map(list, zip(*(quantised(g, M, N) for N in widths), strict=True))
    for y, w in zip(ours.linear(x, x_scales, ws, w_scales, dtype), ws_64, strict=True):
        assert y.dtype == dtype
        assert_product(y, x_64, w.t())
    dx = ours.linear_dgrad(dys, dy_scales, [ours.prepare_weight(w) for w in ws], w_scales, dtype)
    assert dx.dtype == dtype
    assert_product(dx, torch.cat(dys_64, 1), torch.cat(ws_64))
    main_grads = [torch.ones(N, K, device="cuda") for N in widths]
    ours.linear_wgrad(x, x_scales, dys, dy_scales, main_grads)
    for dy, scales, main_grad in zip(dys, dy_scales, main_grads, strict=True):
        assert_product(main_grad - 1, over_tokens(dy, scales), over_tokens(x, x_scales).t())


def over_tokens(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The operand that the reference makes for a weight gradient, [C, T'], in FP64."""
    turned, turned_scales = formats.requantize(codes.cpu(), scales.cpu(), [len(codes)])
    return formats.dequantize(turned, turned_scales, ROWS).double().to(codes.device)


@pytest.mark.parametrize(
    "counts", [[64, 0, 130, 128], [0, 0, 300], [0, 0, 0], [1, 2, 3, 4], [700] * 33], ids=lambda counts: str(sum(counts))
)
def test_grouped_gemms_are_near_fp64_and_leave_empty_groups_alone(ours, g, counts):
    R, K, N = sum(counts), 720, 400
    x, x_scales, x_64 = quantised(g, R, K)
    dy, dy_scales, dy_64 = quantised(g, R, N)
    w, w_scales, w_64 = quantised(g, len(counts), N, K, tile=BLOCKS)
    y = ours.grouped_linear(x, x_scales, w, w_scales, counts, torch.bfloat16)
    dx = ours.grouped_dgrad(dy, dy_scales, w, w_scales, counts)
    main_grad = torch.full((len(counts), N, K), float("nan"), device="cuda")
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
        assert_product(main_grad[e], over_tokens(dy[rows], dy_scales[rows]), over_tokens(x[rows], x_scales[rows]).t())


def test_results_do_not_depend_on_the_tiles_that_tuning_picks(ours, g, monkeypatch):
    from kernels.fp8.backends.triton import gemm

    x, x_scales, _ = quantised(g, 500, 720)
    dy, dy_scales, _ = quantised(g, 500, 400)
    w, w_scales, _ = quantised(g, 400, 720, tile=BLOCKS)
    seen = []
    for config in gemm.CONFIGS:
        for kernel in (gemm._multiply_kernel, gemm._accumulate_kernel):
            monkeypatch.setattr(kernel, "configs", [config])
        main_grad = torch.ones(400, 720, device="cuda")
        ours.linear_wgrad(x, x_scales, [dy], [dy_scales], [main_grad])
        seen.append((ours.linear(x, x_scales, [w], [w_scales])[0], main_grad))
    for y, main_grad in seen[1:]:
        assert torch.equal(y, seen[0][0]) and torch.equal(main_grad, seen[0][1])


def test_the_host_waits_for_nothing(ours, g):
    counts = [100, 0, 156]
    x, x_scales, _ = quantised(g, 256, 256)
    w, w_scales, _ = quantised(g, 3, 128, 256, tile=BLOCKS)
    main_grad, dy = torch.zeros(3, 128, 256, device="cuda"), ours.quantize(torch.randn(256, 128, device="cuda"), ROWS)

    def step() -> None:
        ours.quantize(torch.ones(256, 256, device="cuda"), ROWS)
        ours.grouped_linear(x, x_scales, w, w_scales, counts)
        ours.grouped_wgrad(x, x_scales, *dy, main_grad, counts)

    step()  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
