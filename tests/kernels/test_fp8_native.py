"""The compiled loops against PyTorch's operators, bit for bit, and life without a compiler."""

import pytest
import torch

from kernels.fp8 import ROWS, formats, native, reference

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
    byte_view = a.dtype == torch.float8_e4m3fn
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if byte_view else torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(300, 320), (1, 1), (7, 129), (128, 128), (0, 256)])
def test_compiled_loops_equal_pytorch_bit_for_bit(shape, power_of_two, plain):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 5, shape[1])
    x = x.bfloat16()
    x[:, ::9] *= 0  # both signs of zero
    codes, scales = formats.quantize(x, ROWS, power_of_two)
    expected_codes, expected_scales = plain(formats.quantize, x, ROWS, power_of_two)
    assert same(codes, expected_codes) and same(scales, expected_scales)
    assert same(formats.widen(codes), plain(formats.widen, codes))

    counts = [shape[0] // 3, 0, shape[0] - shape[0] // 3]
    values, column_scales = reference.requantize(codes, scales, counts)
    expected_values, expected_column_scales = plain(reference.requantize, codes, scales, counts)
    assert values.shape == expected_values.shape and same(column_scales, expected_column_scales)
    first = 0
    for count in counts:
        assert same(values[first : first + count], expected_values[first : first + count])
        first += -(-count // 128) * 128


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
