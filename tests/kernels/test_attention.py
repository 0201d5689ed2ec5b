"""Attention and the heads it works on: exact gradients in FP64, PyTorch's attention and complex rotation as judges."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention import BLOCK, causal_attention
from kernels.ops import wide
from kernels.rope import mla_heads

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
LENGTHS = [1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 37]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(B: int, H: int, T: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries, keys and values, of widths 6, 6 and 4."""
    return [random(B, H, T, width, seed=s, dtype=dtype).requires_grad_() for s, width in enumerate((6, 6, 4))]


def test_attention_has_exact_gradients():
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.3), operands(2, 2, 9))
    long = operands(1, 1, BLOCK + 3)
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.3), long, fast_mode=True)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_equals_torch(dtype, T):
    found, expected = operands(2, 3, T, dtype), operands(2, 3, T, dtype)
    dy = random(2, T, 3, 4, seed=9, dtype=dtype)
    y = causal_attention(*found, 0.4)
    judge = [operand.detach().double().requires_grad_() for operand in expected]
    exact = scaled_dot_product_attention(*judge, is_causal=True, scale=0.4).transpose(1, 2)
    y.backward(dy)
    exact.backward(dy.double())
    for one, other in [(y, exact), *((a.grad, b.grad) for a, b in zip(found, judge, strict=True))]:
        assert one.dtype == dtype and one.shape == other.shape
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm() + 1e-12


def test_attention_keeps_nothing_of_the_square_of_the_length():
    kept = []
    q, k, v = operands(1, 1, 4 * BLOCK)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        causal_attention(q, k, v, 1.0)
    assert sum(t.numel() for t in kept) == q.numel() + k.numel() + 2 * v.numel()  # values, and as much output


def projections(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """What MLA's projections yield for 2 sequences of 5 tokens, 3 heads of 6 + 4 (rotary) and values of 7."""
    shapes = (2, 5, 3, 10), (2, 5, 3, 13), (2, 5, 4)
    return [random(*shape, seed=s, dtype=dtype).requires_grad_() for s, shape in enumerate(shapes)]


def angles(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = random(5, 2, seed=7)
    return angle.cos().to(wide(dtype)), angle.sin().to(wide(dtype))


def test_heads_have_exact_gradients():
    assert torch.autograd.gradcheck(lambda *made: mla_heads(*made, *angles(torch.float64)), projections())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_heads_are_projections_with_rotary_parts_turned_as_complex_numbers(dtype):
    q, kv, k_rope = projections(dtype)
    cos, sin = angles(dtype)

    def turned(pairs: torch.Tensor) -> torch.Tensor:
        numbers = torch.view_as_complex(pairs.double().unflatten(-1, (-1, 2)).contiguous())
        numbers = numbers * torch.complex(cos.double(), sin.double())[:, None]
        return torch.cat([numbers.real, numbers.imag], -1).transpose(1, 2)

    heads = mla_heads(q, kv, k_rope, cos, sin)
    assert [h.dtype for h in heads] == [dtype] * 3
    assert torch.equal(heads[0][..., :6], q[..., :6].transpose(1, 2))
    assert torch.equal(heads[1][..., :6], kv[..., :6].transpose(1, 2))
    assert torch.equal(heads[2], kv[..., 6:].transpose(1, 2))
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 1e-6}
    torch.testing.assert_close(heads[0][..., 6:].double(), turned(q[..., 6:]), **tolerance)
    torch.testing.assert_close(
        heads[1][..., 6:].double(), turned(k_rope.unsqueeze(2)).expand(-1, 3, -1, -1), **tolerance
    )
