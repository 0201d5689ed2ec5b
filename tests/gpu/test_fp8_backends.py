"""Every FP8 backend that is installed, every operation, ragged shapes too, against the reference. `make test-gpu`."""

import json

import pytest
import torch

from kernels.fp8 import BLOCKS, COLUMNS, ROWS, backends, formats, fp8_linear, fp8_quantize
from kernels.fp8.backends import BACKENDS, GEMMS, GROUPED, OPERATIONS, QUANTISATIONS, auto
from kernels.fp8.compare import ALIKE, Case, Sizes, calc_diff, judge
from kernels.linear import Numerics, grouped_linear, linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CASES = [(name, op) for name in BACKENDS if name not in ("auto", "reference") for op in BACKENDS[name].operations]
SIZES = [
    Sizes(),
    Sizes(M=4096, N=2112, K=7168, counts=[1024] * 4),
    Sizes(M=1, N=576, K=144, counts=[0, 1, 0]),
    Sizes(M=130, N=400, K=1168, counts=[131, 5, 0, 127, 128, 129]),
]


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


def needs(name: str, device: torch.device) -> None:
    """Skip the test where the backend cannot run, saying why."""
    if reason := backends.obstacle(name, device):
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("name", "operation"), CASES)
def test_a_backend_agrees_with_the_reference(gpu, name, operation, sizes):
    needs(name, gpu)
    verdict = judge(Case(operation, sizes, gpu, torch.float32), name)
    if operation in BACKENDS[name].inexact:
        assert verdict.equal > 0.98
    else:
        assert verdict.good(exact=operation in QUANTISATIONS), verdict


@pytest.mark.parametrize(("name", "operation"), [case for case in CASES if case[1] in (*GEMMS, *GROUPED)])
def test_bf16_results_are_fp32_ones_rounded(gpu, name, operation):
    needs(name, gpu)
    wide, narrow = (Case(operation, Sizes(), gpu, dtype).run(name)[0] for dtype in (torch.float32, torch.bfloat16))
    assert calc_diff(wide, narrow) < 1e-5


@pytest.mark.parametrize("name", [name for name, operation in CASES if operation == "linear_wgrad"])
def test_weight_gradients_accumulate(gpu, name):
    needs(name, gpu)
    case = Case("linear_wgrad", Sizes(), gpu)
    once, out = case.run(name)[0], torch.ones(case.out_shape, device=gpu)
    case.run(name, out)
    torch.testing.assert_close(out, 1 + once, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize("name", ["triton", "transformer_engine"])
def test_casts_of_extremes(gpu, name, tile):
    needs(name, gpu)
    x = torch.randn(272, 384, device=gpu) * torch.logspace(-30, 30, 384, device=gpu)
    x[:, 128:256] *= 1e-12
    x = x.bfloat16()
    for power_of_two in (False, True):
        codes, scales = backends.implementation(name, "quantize").quantize(x, tile, power_of_two)
        expected, expected_scales = formats.quantize(x, tile, power_of_two)
        same = (codes.view(torch.uint8) == expected.view(torch.uint8)).double().mean()
        if name == "triton" or power_of_two:
            assert same == 1 and torch.equal(scales, expected_scales)
        else:
            assert same > 0.98
            torch.testing.assert_close(scales, expected_scales, rtol=2**-22, atol=0)


def test_what_is_not_finite_stays_so_in_exact_casts(gpu):
    needs("triton", gpu)
    x = torch.randn(4, 256, device=gpu, dtype=torch.bfloat16)
    x[0, 3], x[1, 200] = torch.inf, torch.nan
    codes, scales = fp8_quantize(x, ROWS, False, "triton")
    finite = formats.dequantize(codes, scales, ROWS).isfinite()
    assert torch.equal(finite, formats.dequantize(*formats.quantize(x, ROWS), ROWS).isfinite())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_agrees_remembers_and_says_so(gpu, monkeypatch, tmp_path, capsys, operation):
    needs("auto", gpu)
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    auto._memory.cache_clear()
    try:
        case = Case(operation, Sizes(), gpu, torch.float32)
        verdict = judge(case, "auto")
        assert verdict.diff < ALIKE and (operation not in QUANTISATIONS or verdict.equal == 1)
        names = auto.candidates(operation, gpu, (384, 512))
        if len(names) > 1:
            assert f"{operation}: " in capsys.readouterr().err
            [file] = tmp_path.glob("fp8-choices-*.json")
            assert all(choice["picked"] in names for choice in json.loads(file.read_text())["choices"].values())
    finally:
        auto._memory.cache_clear()


@pytest.mark.parametrize("name", ["auto", "triton", "transformer_engine"])
def test_a_linear_forward_and_backward_follows_the_reference(gpu, name):
    needs(name, gpu)
    results = []
    for backend in ("reference", name):
        g = torch.Generator(gpu).manual_seed(0)
        numerics = Numerics("fp8", backend)

        def parameter(*shape: int, g=g) -> torch.nn.Parameter:
            made = torch.nn.Parameter(torch.randn(shape, generator=g, device=gpu).bfloat16())
            made.main_grad = torch.zeros(shape, device=gpu)
            return made

        w, experts = parameter(384, 512), parameter(3, 256, 384)
        x = torch.randn(272, 512, generator=g, device=gpu).bfloat16().requires_grad_()
        (y,) = linear(x, (w,), numerics)
        z = grouped_linear(y, experts, [130, 0, 142], numerics)
        z.backward(torch.randn(z.shape, generator=g, device=gpu).bfloat16())
        numerics.weight_grads.run()
        results.append((y, z, x.grad, w.main_grad, experts.main_grad))
    for expected, result in zip(*results, strict=True):
        assert calc_diff(expected, result) < 1e-3  # BF16 in between, and Transformer Engine's own casts


def test_a_width_that_cannot_be_tiled_is_refused_not_computed(gpu):
    needs("cublas", gpu)
    x, w = (formats.quantize(torch.randn(24, 128, device=gpu), tile) for tile in (ROWS, BLOCKS))
    with pytest.raises(ValueError, match="a weight of 24 x 128; expected multiples of 16"):
        fp8_linear(*x, [w[0]], [w[1]], torch.bfloat16, "cublas")
