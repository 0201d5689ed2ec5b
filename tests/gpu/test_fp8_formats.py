"""The formats on a GPU, in PyTorch's operators, give the bytes of the CPU. Needs a GPU: `make test-gpu`."""

import pytest
import torch

from kernels.fp8 import BLOCKS, COLUMNS, ROWS, e5m6, formats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def assert_same(on_gpu: tuple[torch.Tensor, ...], on_cpu: tuple[torch.Tensor, ...]) -> None:
    """Equal to the bit, but for the bits of a NaN."""
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        both = [formats.widen(x.cpu()) if x.dtype == torch.float8_e4m3fn else x.cpu() for x in (gpu, cpu)]
        if both[0].is_floating_point():
            both = [torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in both]
        assert gpu.is_cuda and torch.equal(*both)


@pytest.mark.parametrize("poison", [0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (130, 300), (3, 256, 128), (0, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_cast_equals_the_cpu(shape, dtype, power_of_two, poison):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 5, shape[-1])
    x = x.to(dtype)
    x[..., 0] = poison
    for tile in (ROWS, COLUMNS, BLOCKS):
        quantised = formats.quantize(x, tile, power_of_two)
        assert_same(formats.quantize(x.cuda(), tile, power_of_two), quantised)
        codes, scales = (each.cuda() for each in quantised)
        assert_same((formats.dequantize(codes, scales, tile),), (formats.dequantize(*quantised, tile),))
    words, scales = e5m6.quantize(x, power_of_two)
    assert_same(e5m6.quantize(x.cuda(), power_of_two), (words, scales))
    back = e5m6.dequantize(words, scales, shape[-1])
    assert_same((e5m6.dequantize(words.cuda(), scales.cuda(), shape[-1]),), (back,))
    if len(shape) == 2:
        codes, scales = formats.quantize(x, ROWS, power_of_two)
        counts = [shape[0] // 3, 0, shape[0] - shape[0] // 3]
        on_gpu = formats.requantize(codes.cuda(), scales.cuda(), counts)
        assert_same(on_gpu, formats.requantize(codes, scales, counts))
