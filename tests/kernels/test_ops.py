"""Every operator: its schema and fake against real calls (PyTorch's own checker), its price, and FLOP counting."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention, cross_entropy, rope  # noqa: F401 - for their operators
from kernels.fp8 import BLOCKS, ROWS, e5m6, formats
from kernels.linear import Numerics, grouped_linear, linear
from kernels.norm import rms_norm
from kernels.ops import costs
from kernels.permute import combine_rows, gather_rows
from kernels.swiglu import swiglu

M, K, N, E = 40, 256, 136, 3
COUNTS = [10, 0, 30]


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def calls() -> dict[str, tuple]:
    x, w, dy, experts = bf16(M, K), bf16(N, K), bf16(M, N), bf16(E, N, K)
    xq, dyq = formats.quantize(x, ROWS), formats.quantize(dy, ROWS)
    wq, eq = formats.quantize(w, BLOCKS), formats.quantize(experts, BLOCKS)
    bfloat16, reference = torch.bfloat16, "reference"
    scale = torch.rand(M, 1)
    slot = torch.randperm(M).view(M // 4, 4)
    heads = bf16(2, 3, M, 6), bf16(2, 3, M, 6), bf16(2, 3, M, 4)
    projected, angles = (bf16(2, M, 3, 6), bf16(2, M, 3, 8), bf16(2, M, 2)), (torch.rand(M, 1), torch.rand(M, 1))
    return {
        "wide_mm": (x, w.t(), torch.float32),
        "accumulate_mm": (torch.zeros(N, K), dy.t(), x),
        "grouped_mm": (x, experts.transpose(1, 2), COUNTS),
        "grouped_accumulate_mm": (torch.zeros(E, N, K), dy, x, COUNTS),
        "fp8_quantize": (x, list(ROWS), True),
        "fp8_dequantize": (*xq, list(ROWS), bfloat16),
        "fp8_gather_dequantize": (xq[0], xq[1].view(torch.uint8), torch.arange(M).repeat(2), bfloat16),
        "fp8_requantize": (*dyq, COUNTS),
        "e5m6_quantize": (x, True),
        "e5m6_dequantize": (*e5m6.quantize(x), K, bfloat16),
        "fp8_prepare_weight": (wq[0], reference),
        "fp8_linear": (*xq, [wq[0]], [wq[1]], bfloat16, reference),
        "fp8_linear_dgrad": ([dyq[0]], [dyq[1]], [wq[0]], [wq[1]], bfloat16, reference),
        "fp8_linear_wgrad": (*xq, [dyq[0]], [dyq[1]], [torch.zeros(N, K)], reference),
        "fp8_grouped_linear": (*xq, *eq, COUNTS, bfloat16, reference),
        "fp8_grouped_dgrad": (*dyq, *eq, COUNTS, bfloat16, reference),
        "fp8_grouped_wgrad": (*xq, *dyq, torch.zeros(E, N, K), COUNTS, reference),
        "rms_norm_forward": (x, bf16(K), 1e-6),
        "rms_norm_backward": (x, x, bf16(K), scale),
        "swiglu_forward": (dy, dy, torch.rand(M)),
        "swiglu_backward": (dy, dy, dy, None),
        "gather_forward": (x, torch.arange(M)),
        "combine_forward": (x, slot),
        "mla_heads_forward": (*projected, *angles),
        "mla_heads_backward": (*heads, *angles),
        "cross_entropy_forward": (dy.float(), torch.arange(M)),
        "cross_entropy_backward": (dy.float(), torch.arange(M), torch.tensor(0.5)),
        "causal_attention_forward": (*heads, 0.5),
        "causal_attention_backward": (bf16(2, M, 3, 4), bf16(2, M, 3, 4), *heads, 0.5),
    }


def widened(argument):
    if isinstance(argument, list):
        return [widened(item) for item in argument]
    is_codes = isinstance(argument, torch.Tensor) and argument.dtype == torch.float8_e4m3fn
    return formats.widen(argument) if is_codes else argument


def test_every_operator_is_checked_here():
    assert set(calls()) == set(costs)


@pytest.mark.parametrize("name", sorted(calls()))
def test_fake_and_schema_agree_with_the_real_operator(name):
    operator, arguments = getattr(torch.ops.weft, name).default, calls()[name]
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
    # PyTorch's schema check cannot compare FP8 tensors; GEMMs take their codes widened, too.
    if name != "fp8_prepare_weight":
        torch.library.opcheck(operator, tuple(map(widened, arguments)), test_utils="test_schema")


@pytest.mark.parametrize("name", sorted(calls()))
def test_flop_counter_and_cost_agree_and_gemms_count_two_per_product(name):
    operator, arguments = getattr(torch.ops.weft, name).default, calls()[name]
    with FlopCounterMode(display=False) as counter:
        operator(*arguments)
    cost = costs[name](*arguments)
    assert counter.get_total_flops() == cost.flops
    assert cost.bytes > 0
    if "mm" in name or "fp8_linear" in name or "fp8_grouped" in name:
        assert cost.flops == 2 * M * N * K
    if "attention" in name:
        products = {"causal_attention_forward": 6 + 4, "causal_attention_backward": 3 * 6 + 2 * 4}
        assert cost.flops == 2 * (2 * 3) * (M * (M + 1) // 2) * products[name]


def test_bytes_of_an_fp8_gemm_are_operands_scales_and_output():
    arguments = calls()["fp8_linear"]
    assert costs["fp8_linear"](*arguments).bytes == M * K + N * K + 4 * (M * 2 + 2 * 2) + 2 * M * N
    assert costs["fp8_grouped_linear"](*calls()["fp8_grouped_linear"]).bytes == (
        M * K + 2 * N * K + 4 * (M * 2) + 2 * M * N
    )


@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp32"])
def test_a_whole_forward_and_backward_runs_on_fake_tensors(precision):
    numerics = Numerics(precision)
    with FakeTensorMode():
        x = torch.randn(M, K, dtype=numerics.dtype, requires_grad=True)
        weight = torch.nn.Parameter(torch.randn(K, K, dtype=numerics.dtype))
        experts = torch.nn.Parameter(torch.randn(E, 2 * N, K, dtype=numerics.dtype))
        for p in (weight, experts):
            p.main_grad = torch.zeros(p.shape)
        source, slot = torch.zeros(M, dtype=torch.int64), torch.zeros(M // 4, 4, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            (h,) = linear(rms_norm(x, weight[0], 1e-6), [weight], numerics)
            h = gather_rows(combine_rows(h, source, slot), source, slot)
            gate, up = grouped_linear(h, experts, COUNTS, numerics).chunk(2, -1)
            swiglu(gate, up, torch.rand(M)).sum().backward()
            numerics.weight_grads.run()
        assert counter.get_total_flops() >= 6 * M * K * (K + 2 * N)
