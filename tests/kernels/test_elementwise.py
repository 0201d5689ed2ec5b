"""RMSNorm, SwiGLU, cross-entropy and permutation: exact gradients in FP64, PyTorch as judge, FP32 maths inside."""

import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import silu

from kernels.cross_entropy import cross_entropy
from kernels.norm import rms_norm
from kernels.permute import combine_rows, gather_rows
from kernels.swiglu import swiglu


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_rms_norm_has_exact_gradients_and_equals_torch():
    x, gain = random(2, 3, 7).requires_grad_(), random(7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, gain: rms_norm(x, gain, 1e-6), (x, gain))
    torch.testing.assert_close(rms_norm(x, gain, 1e-2), torch_rms_norm(x, (7,), gain, 1e-2))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_has_exact_gradients_and_equals_torch(weighted):
    gate, up = random(5, 6).requires_grad_(), random(5, 6, seed=1).requires_grad_()
    weights = random(5, seed=2).requires_grad_() if weighted else None
    assert torch.autograd.gradcheck(swiglu, (gate, up, weights) if weighted else (gate, up))
    plain = silu(gate) * up
    torch.testing.assert_close(swiglu(gate, up, weights), plain if weights is None else plain * weights[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cross_entropy_equals_torchs_without_memory_for_the_gradient(dtype):
    logits, targets = 5 * random(9, 33, dtype=dtype), torch.arange(9) * 3
    found, expected = (logits.clone().requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = cross_entropy(found, targets)
    judge = torch_cross_entropy(expected, targets, reduction="sum")
    torch.testing.assert_close(loss, judge)
    (gradient,) = torch.autograd.grad(0.3 * loss, found)
    (0.3 * judge).backward()
    torch.testing.assert_close(gradient, expected.grad)
    assert gradient.data_ptr() == kept[0].data_ptr()


def permutation(T: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random assignment of T x K copies to rows: source_R and slot_TK."""
    order = torch.randperm(T * K, generator=torch.Generator().manual_seed(T))
    slot = torch.empty(T * K, dtype=torch.int64)
    slot[order] = torch.arange(T * K)
    return order // K, slot.view(T, K)


@pytest.mark.parametrize(("T", "K"), [(6, 3), (5, 1), (0, 2)])
def test_gather_and_combine_have_exact_gradients_and_equal_indexing(T, K):
    source, slot = permutation(T, K)
    x, rows = random(T, 4).requires_grad_(), random(T * K, 4, seed=1).requires_grad_()
    gathered, combined = gather_rows(x, source, slot), combine_rows(rows, source, slot)
    assert torch.equal(gathered, x[source])
    torch.testing.assert_close(combined, rows[slot].sum(1))
    if T:
        assert torch.autograd.gradcheck(lambda x: gather_rows(x, source, slot), x)
        assert torch.autograd.gradcheck(lambda rows: combine_rows(rows, source, slot), rows)


def test_bf16_is_rounded_once():
    T, D, K = 32, 64, 4
    source, slot = permutation(T, K)
    gate, up = random(T, D, dtype=torch.bfloat16), random(T, D, seed=1, dtype=torch.bfloat16)
    weights, gain = random(T, seed=2, dtype=torch.float32), random(D, seed=3, dtype=torch.bfloat16)
    rows = random(T * K, D, dtype=torch.bfloat16)
    cases = [
        (rms_norm(gate, gain, 1e-6), rms_norm(gate.double(), gain.double(), 1e-6)),
        (swiglu(gate, up, weights), swiglu(gate.double(), up.double(), weights.double())),
        (combine_rows(rows, source, slot), combine_rows(rows.double(), source, slot)),
    ]
    for found, exact in cases:
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()


def test_bf16_gradients_stay_within_bf16_of_fp64():
    gate, up, dy = (random(16, 32, seed=s, dtype=torch.bfloat16) for s in range(3))
    weights = random(16, seed=3, dtype=torch.float32)
    gain = random(32, seed=4, dtype=torch.bfloat16)
    for function, inputs in ((swiglu, (gate, up, weights)), (lambda x, g: rms_norm(x, g, 1e-6), (gate, gain))):
        low = [t.clone().requires_grad_() for t in inputs]
        high = [t.double().requires_grad_() for t in inputs]
        function(*low).backward(dy)
        function(*high).backward(dy.double())
        for a, b in zip(low, high, strict=True):
            assert a.grad.dtype == a.dtype
            assert (a.grad.double() - b.grad).norm() <= 2.0**-8 * b.grad.norm()
