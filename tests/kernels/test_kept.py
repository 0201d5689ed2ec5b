"""What FP8 keeps in another form: forward does not see it, backward reads it and nothing else, and it is small."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from kernels import fp8
from kernels.attention import causal_attention, causal_attention_backward
from kernels.fp8.kept import FORMS
from kernels.linear import Numerics, grouped_linear, linear
from kernels.recompute import Recompute
from kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

B, T, H, WIDTH, F = 2, 40, 3, 100, 168  # odd against tiles of 128, and against the eights of E5M6
COUNTS = [0, 50, 1, 30]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weight(*shape: int, seed: int = 0) -> nn.Parameter:
    made = nn.Parameter(rows(*shape, seed=seed) / shape[-1] ** 0.5)
    made.main_grad = torch.zeros(shape)
    return made


def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_attention(q, k, v, 0.1)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An attention of PyTorch's own, which keeps its output inside, as those of a GPU do."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1).transpose(1, 2)


def coarse(out: Tensor) -> Tensor:
    """The output as it comes back from E5M6."""
    stored = fp8.e5m6_quantize(out.flatten(2).flatten(0, 1), True)
    return fp8.e5m6_dequantize(*stored, H * WIDTH, out.dtype).view(out.shape)


def gradients_of_fused(dy: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    _, logsumexp = forward(q, k, v, is_causal=True, scale=0.1)
    dy, out = (each.transpose(1, 2) for each in (dy, out))
    return backward(dy, q, k, v, out, logsumexp, 0.0, True, scale=0.1)


def gradients_of_own(dy: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return causal_attention_backward(dy, out, q, k, v, 0.1)


@pytest.mark.parametrize(("function", "judge"), [(own, gradients_of_own), (fused, gradients_of_fused)])
def test_attentions_backward_reads_its_output_from_e5m6(function, judge):
    q, k, v = (rows(B, H, T, WIDTH, seed=s).requires_grad_() for s in range(3))
    recompute = Recompute(forms=FORMS)
    out = recompute.segment(lambda *qkv: recompute.kept_as("attention output", function, *qkv, dimensions=2))(q, k, v)
    assert torch.equal(out, function(q, k, v))
    dy = rows(*out.shape, seed=3)
    out.backward(dy)
    plain = [each.detach() for each in (q, k, v)]
    expected, unrounded = (judge(dy, each, *plain) for each in (coarse(out.detach()), out.detach()))
    assert all(torch.equal(each.grad, gradient) for each, gradient in zip((q, k, v), expected, strict=True))
    assert not torch.equal(expected[0], unrounded[0])
    for one, other in zip(expected, unrounded, strict=True):
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()


def test_the_output_projections_weight_gradient_reads_the_same_e5m6():
    numerics, o_proj = Numerics("fp8"), weight(96, H * WIDTH)
    q, k, v = (rows(B, H, T, WIDTH, seed=s).requires_grad_() for s in range(3))
    kept: list[Tensor] = []

    def run(*qkv: Tensor) -> Tensor:
        out = numerics.recompute.kept_as("attention output", own, *qkv, dimensions=2)
        kept.append(out.detach())
        return linear(out.flatten(-2), (o_proj,), numerics, power_of_two=True)[0]

    y = numerics.recompute.segment(run)(q, k, v)
    dy = rows(*y.shape, seed=3)
    y.backward(dy)
    numerics.weight_grads.run()
    (out,) = kept
    quantised = fp8.fp8_quantize(out.flatten(2).flatten(0, 1), fp8.ROWS, True)
    (expected,) = fp8.fp8_linear(
        *quantised, *([each] for each in numerics.quantised(o_proj)), torch.bfloat16, "reference"
    )
    assert torch.equal(y.detach().flatten(0, 1), expected)
    gradient, (codes, scales) = torch.zeros(96, H * WIDTH), fp8.fp8_quantize(dy.flatten(0, 1), fp8.ROWS, False)
    again = fp8.fp8_quantize(coarse(out).flatten(2).flatten(0, 1), fp8.ROWS, True)
    fp8.fp8_linear_wgrad(*again, [codes], [scales], [gradient], "reference")
    assert torch.equal(o_proj.main_grad, gradient)


def test_experts_backward_starts_from_gate_and_up_in_fp8():
    numerics, R = Numerics("fp8"), sum(COUNTS)
    up_proj, down_proj = weight(len(COUNTS), 2 * F, WIDTH), weight(len(COUNTS), WIDTH, F, seed=1)
    x, weights = rows(R, WIDTH).requires_grad_(), torch.rand(R).requires_grad_()
    made: list[Tensor] = []

    def run(x: Tensor, weights: Tensor) -> Tensor:
        recompute = numerics.recompute
        gate_up = recompute.kept_as("swiglu input", grouped_linear, x, up_proj, COUNTS, numerics)
        made.append(gate_up.detach())
        inner = recompute("swiglu", swiglu, *gate_up.chunk(2, -1), weights)
        return grouped_linear(inner, down_proj, COUNTS, numerics)

    y = numerics.recompute.segment(run)(x, weights)
    dy = rows(R, WIDTH, seed=2)
    y.backward(dy)
    numerics.weight_grads.run()

    def product(operator, rows: Tensor, by: Tensor) -> Tensor:
        return operator(*fp8.fp8_quantize(rows, fp8.ROWS, False), *numerics.quantised(by), COUNTS, *like)

    def gradient(x: Tensor, dy: Tensor, like: Tensor) -> Tensor:
        sum_, operands = torch.zeros(like.shape), (fp8.fp8_quantize(each, fp8.ROWS, False) for each in (x, dy))
        fp8.fp8_grouped_wgrad(*next(operands), *next(operands), sum_, COUNTS, "reference")
        return sum_

    like, (gate_up,) = (torch.bfloat16, "reference"), made
    forward = swiglu_forward(*gate_up.chunk(2, -1), weights.detach())
    assert torch.equal(y, product(fp8.fp8_grouped_linear, forward, down_proj))
    read = fp8.fp8_dequantize(*fp8.fp8_quantize(gate_up, fp8.ROWS, False), fp8.ROWS, torch.bfloat16)
    gate, up = read.chunk(2, -1)
    d_inner = product(fp8.fp8_grouped_dgrad, dy, down_proj)
    d_gate, d_up, d_weights = swiglu_backward(d_inner, gate, up, weights.detach())
    d_gate_up = torch.cat([d_gate, d_up], -1)
    assert torch.equal(down_proj.main_grad, gradient(swiglu_forward(gate, up, weights.detach()), dy, down_proj))
    assert torch.equal(up_proj.main_grad, gradient(x.detach(), d_gate_up, up_proj))
    assert torch.equal(weights.grad, d_weights)
    assert torch.equal(x.grad, product(fp8.fp8_grouped_dgrad, d_gate_up, up_proj))


@pytest.mark.parametrize(
    ("form", "bytes_of"), [("attention output", 3 * 25 * 4 + 4 * 2), ("swiglu input", 200 + 4 * 2)]
)
def test_of_a_row_only_codes_and_scales_are_kept(form, bytes_of):
    recompute, kept = Recompute(forms=FORMS), []
    x = rows(7, 200).requires_grad_()

    def run(x: Tensor) -> Tensor:
        y = recompute.kept_as(form, torch.exp, x)  # whose backward reads its output
        call = recompute._known[y.untyped_storage()._cdata][1]()
        kept.extend(call.inputs)
        return y

    y = recompute.segment(run)(x)
    assert sum(each.numel() * each.element_size() for each in kept) == 7 * bytes_of
    y.sum().backward()
    stored = FORMS[form].load(*kept, columns=200, dtype=torch.bfloat16)
    assert torch.equal(x.grad, stored) and not torch.equal(x.grad, y.detach())


def test_outside_of_a_segment_and_without_the_form_a_call_is_a_call():
    x = rows(4, 8).requires_grad_()
    outside, without = Recompute(forms=FORMS), Recompute(("norms",))
    for y in (
        outside.kept_as("swiglu input", torch.exp, x),
        without.segment(lambda x: without.kept_as("swiglu input", torch.exp, x))(x),
    ):
        x.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())
