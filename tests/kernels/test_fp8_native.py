"""The compiled loops against PyTorch's operators, bit for bit, and life without a compiler."""

import pytest
import torch

from kernels.fp8 import ROWS, e5m6, formats, native

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.fixture
def plain(monkeypatch):
    """Runs a function with the compiled loops switched off."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(native, "loops", lambda x: None)
            return function(*arguments)

    return run


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit, but for the bits of a NaN."""
    if a.dtype == torch.float8_e4m3fn:
        a, b = formats.widen(a), formats.widen(b)  # every code has a value of its own
    if a.dtype == torch.float32:
        a, b = (torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in (a, b))
    return torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(300, 320), (1, 1), (7, 129), (128, 128), (0, 256), (2, 3, 140)])
@pytest.mark.parametrize("poison", [None, torch.inf, torch.nan])
def test_compiled_loops_equal_pytorch_bit_for_bit(shape, power_of_two, poison, plain):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 5, shape[-1])
    x = x.bfloat16()
    x[..., ::9] *= 0  # both signs of zero
    if poison is not None:
        x[..., 0] = poison
    codes, scales = formats.quantize(x, ROWS, power_of_two)
    expected_codes, expected_scales = plain(formats.quantize, x, ROWS, power_of_two)
    assert same(codes, expected_codes) and same(scales, expected_scales)
    assert same(formats.widen(codes), plain(formats.widen, codes))

    words, scales = e5m6.quantize(x, power_of_two)
    expected_words, expected_scales = plain(e5m6.quantize, x, power_of_two)
    assert same(words, expected_words) and same(scales, expected_scales)
    operands = words, scales, shape[-1]
    assert same(e5m6.dequantize(*operands), plain(e5m6.dequantize, *operands))


@needs_compiler
@pytest.mark.parametrize("kind", ["free", "powers of two", "mixed", "not finite"])
@pytest.mark.parametrize("shape", [(300, 320), (1, 1), (7, 129), (128, 128), (0, 256)])
def test_regrouping_is_compiled_to_the_same_bits(shape, kind, plain):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 5, shape[1])
    if kind == "not finite" and shape[0]:
        x[0, 0] = torch.nan
    codes, scales = formats.quantize(x, ROWS, power_of_two=kind != "free")
    if kind == "mixed":
        scales[::50] *= 1.5
    operands = codes, scales, [shape[0] // 3, 0, shape[0] - shape[0] // 3]
    for compiled, expected in zip(formats.regroup(*operands), plain(formats.regroup, *operands), strict=True):
        assert compiled.shape == expected.shape and same(compiled, expected)


@needs_compiler
def test_every_code_widens_like_pytorch(plain):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert same(formats.widen(codes), plain(formats.widen, codes))


@needs_compiler
def test_every_bfloat16_is_quantised_like_pytorch(plain):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    for rows in (x.unsqueeze(1), x[: len(x) // 128 * 128].view(-1, 128)):
        for a, b in zip(formats.quantize(rows, ROWS), plain(formats.quantize, rows, ROWS), strict=True):
            assert same(a, b)
        for a, b in zip(e5m6.quantize(rows), plain(e5m6.quantize, rows), strict=True):
            assert same(a, b)


def test_without_a_compiler_there_are_no_loops_and_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert native.library.__wrapped__() is None


@needs_compiler
def test_the_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    assert native.library.__wrapped__() is not None
    (built,) = tmp_path.iterdir()
    monkeypatch.setattr(native.subprocess, "run", lambda *a, **k: pytest.fail("built again"))
    assert native.library.__wrapped__() is not None
    assert [built] == list(tmp_path.iterdir())
