"""Linears: gradients against autograd's own, deferral, and what is kept between forward and backward."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernels.linear import Numerics, attach_main_grads, embedding, grouped_linear, linear

PRECISIONS = ["fp64", "fp32", "bf16", "fp8"]
WIDTHS = (24, 160)
COUNTS = [0, 70, 1, 129]


def parameter(numerics: Numerics, *shape: int, seed: int = 0) -> nn.Parameter:
    weight = nn.Parameter(rows(numerics, *shape, seed=seed) / shape[-1] ** 0.5)
    weight.main_grad = torch.zeros(shape, dtype=numerics.main_grad_dtype)
    return weight


def rows(numerics: Numerics, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(numerics.dtype)


def test_linear_has_exact_gradients_in_fp64():
    numerics = Numerics("fp64")
    weights = [parameter(numerics, n, 5, seed=n) for n in (3, 4)]
    x = rows(numerics, 2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: linear(x, weights, numerics), x)
    numerics.weight_grads.now.clear()
    (sum(y.square().sum() for y in linear(x, weights, numerics))).backward()
    numerics.weight_grads.run()
    plain = [w.detach().clone().requires_grad_() for w in weights]
    sum(nn.functional.linear(x.detach(), w).square().sum() for w in plain).backward()
    for w, expected in zip(weights, plain, strict=True):
        assert w.grad is None
        torch.testing.assert_close(w.main_grad, expected.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("counts", [[2, 0, 5], [0, 0, 0]])
def test_grouped_linear_has_exact_gradients_in_fp64(counts):
    numerics = Numerics("fp64")
    weight = parameter(numerics, 3, 4, 5)
    x = rows(numerics, sum(counts), 5).requires_grad_()
    if sum(counts):
        assert torch.autograd.gradcheck(lambda x: grouped_linear(x, weight, counts, numerics), x)
        numerics.weight_grads.now.clear()
    grouped_linear(x, weight, counts, numerics).square().sum().backward()
    numerics.weight_grads.run()
    plain = weight.detach().clone().requires_grad_()
    parts = [p @ w.T for p, w in zip(x.detach().split(counts), plain.unbind(), strict=True)]
    torch.cat(parts).square().sum().backward()
    torch.testing.assert_close(weight.main_grad, plain.grad, rtol=1e-13, atol=1e-13)


def apply(kind: str, numerics: Numerics, weights: list[nn.Parameter], x: torch.Tensor) -> torch.Tensor:
    if kind == "dense":
        return torch.cat(linear(x, weights, numerics, power_of_two=True), -1)
    return grouped_linear(x, weights[0], COUNTS, numerics, power_of_two=True, power_of_two_grad=True)


def weights_of(kind: str, numerics: Numerics) -> list[nn.Parameter]:
    if kind == "dense":
        return [parameter(numerics, n, 200, seed=n) for n in WIDTHS]
    return [parameter(numerics, len(COUNTS), 40, 200)]


@pytest.mark.parametrize("kind", ["dense", "grouped"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_deferred_weight_gradients_equal_immediate_ones_and_pop_in_order(precision, kind):
    numerics = Numerics(precision)
    immediate, deferred = weights_of(kind, numerics), weights_of(kind, numerics)
    after_first = None
    for microbatch in range(2):
        for weights in (immediate, deferred):
            x = rows(numerics, sum(COUNTS), 200, seed=microbatch).requires_grad_()
            y = apply(kind, numerics, weights, x)
            y.backward(rows(numerics, *y.shape, seed=7 + microbatch))
            assert x.grad is not None
            if weights is immediate:
                numerics.weight_grads.run()
            else:
                numerics.weight_grads.defer()
        after_first = after_first or [w.main_grad.clone() for w in immediate]
    assert not any(w.main_grad.any() for w in deferred)
    numerics.weight_grads.pop()
    assert all(torch.equal(d.main_grad, first) for d, first in zip(deferred, after_first, strict=True))
    numerics.weight_grads.pop()
    assert all(torch.equal(d.main_grad, i.main_grad) for d, i in zip(deferred, immediate, strict=True))
    with pytest.raises(RuntimeError, match="W without its I"):
        numerics.weight_grads.pop()


@pytest.mark.parametrize("kind", ["dense", "grouped"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.004), ("fp8", 0.06)])
def test_low_precisions_stay_near_fp64(precision, tolerance, kind):
    results = []
    for numerics in (Numerics("fp64"), Numerics(precision)):
        weights = weights_of(kind, Numerics("bf16"))
        for w in weights:
            w.data = w.data.to(numerics.dtype)
            w.main_grad = w.main_grad.to(numerics.main_grad_dtype)
        x = rows(Numerics("bf16"), sum(COUNTS), 200).to(numerics.dtype).requires_grad_()
        y = apply(kind, numerics, weights, x)
        y.backward(rows(Numerics("bf16"), *y.shape, seed=7).to(numerics.dtype))
        numerics.weight_grads.run()
        results.append([y.detach(), x.grad, *(w.main_grad for w in weights)])
    for expected, found in zip(*results, strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


class Double(torch.autograd.Function):
    """x -> 2x, with something on its node whose life can be watched."""

    @staticmethod
    def forward(ctx, x, watched):
        ctx.watched = watched
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy, None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_waiting_weight_gradients_keep_no_graph_alive(precision):
    numerics = Numerics(precision)
    weights = weights_of("dense", numerics)
    watched = threading.Event()
    alive = weakref.ref(watched)
    upstream = Double.apply(rows(numerics, 64, 200).requires_grad_(), watched)
    del watched
    sum(y.sum() for y in linear(upstream, weights, numerics)).backward()
    numerics.weight_grads.defer()
    assert alive() is not None
    del upstream
    gc.collect()
    assert alive() is None
    assert numerics.weight_grads.groups[0]


@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_fp8_keeps_one_byte_an_element_until_the_weight_gradient(kind):
    numerics = Numerics("fp8")
    weights = weights_of(kind, numerics)
    saved = []
    x = rows(numerics, sum(COUNTS), 200).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = apply(kind, numerics, weights, x)
    kept = sum(t.numel() * t.element_size() for t in saved if t.dtype != torch.int64)
    assert kept <= x.numel() * 1.1
    y.sum().backward()
    (closure,) = numerics.weight_grads.now

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from tensors(item)

    held = [t for t in tensors(closure.args) if not isinstance(t, nn.Parameter)]
    assert sum(t.numel() * t.element_size() for t in held) <= 1.15 * (x.numel() + y.numel())


def test_quantised_weights_live_for_one_epoch():
    numerics = Numerics("fp8")
    weight = parameter(numerics, 128, 128)
    x = rows(numerics, 4, 128)
    (first,) = linear(x, [weight], numerics)
    weight.data.mul_(2)
    (stale,) = linear(x, [weight], numerics)
    numerics.bump()
    (fresh,) = linear(x, [weight], numerics)
    assert numerics.epoch == 1
    assert torch.equal(first, stale)
    assert torch.equal(first * 2, fresh)


@pytest.mark.parametrize("kind", ["dense", "grouped"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_weights_get_no_gradient_and_constant_inputs_cost_no_gemm(precision, kind):
    numerics = Numerics(precision)
    weights = weights_of(kind, numerics)
    weights[0].requires_grad_(False)
    x = rows(numerics, sum(COUNTS), 200).requires_grad_()
    apply(kind, numerics, weights, x).sum().backward()
    numerics.weight_grads.run()
    assert x.grad is not None
    assert not weights[0].main_grad.any() and all(w.main_grad.any() for w in weights[1:])

    weights[0].requires_grad_(True)
    y = apply(kind, numerics, weights, x.detach())
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert not [
        name for name in counter.get_flop_counts().get("Global", {}) if "mm" in str(name) or "dgrad" in str(name)
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_output_without_gradient_contributes_nothing(precision):
    numerics = Numerics(precision)
    used, unused = weights_of("dense", numerics)
    x = rows(numerics, 64, 200).requires_grad_()
    linear(x, [used, unused], numerics)[0].sum().backward()
    both = x.grad
    x.grad = None
    linear(x, [used], numerics)[0].sum().backward()
    numerics.weight_grads.run()
    assert torch.equal(both, x.grad)
    assert used.main_grad.any() and not unused.main_grad.any()


@pytest.mark.parametrize("fp8", [False, True])
def test_wide_outputs_are_fp32_sums_of_bf16_products(fp8):
    numerics = Numerics("fp8")
    weight = parameter(numerics, 16, 256)
    x = rows(numerics, 2, 3, 256).requires_grad_()
    (y,) = linear(x, [weight], numerics, fp8=fp8, wide_out=True)
    assert y.dtype == torch.float32 and y.shape == (2, 3, 16)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    dy = torch.randn(y.shape)
    y.backward(dy)
    numerics.weight_grads.run()
    expected = dy.bfloat16().double().flatten(0, 1).T @ x.double().flatten(0, 1)
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_weight_gradients_accumulate_in_fp32_below_the_resolution_of_bf16(precision):
    numerics = Numerics(precision)
    weight = parameter(numerics, 128, 128)
    weight.main_grad.fill_(1.0)
    x = torch.full((128, 128), 2.0**-9, dtype=torch.bfloat16)
    (y,) = linear(x.requires_grad_(), [weight], numerics)
    y.backward(torch.full_like(y, 2.0**-9))
    numerics.weight_grads.run()
    assert torch.allclose(weight.main_grad, torch.tensor(1 + 2.0**-11), rtol=0, atol=2e-5)


def test_weight_gradients_reach_the_queue_from_another_thread():
    numerics = Numerics("fp32")
    weight = parameter(numerics, 4, 4)
    (y,) = linear(rows(numerics, 2, 4).requires_grad_(), [weight], numerics)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    numerics.weight_grads.run()
    assert weight.main_grad.any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_non_finite_values_reach_outputs_and_gradients_under_fp8(kind, poison):
    numerics = Numerics("fp8")
    for where in ("input", "gradient"):
        weights = weights_of(kind, numerics)
        x = rows(numerics, sum(COUNTS), 200)
        if where == "input":
            x[5, 3] = poison
        y = apply(kind, numerics, weights, x.requires_grad_())
        dy = rows(numerics, *y.shape)
        if where == "gradient":
            dy[5, 3] = poison
        y.backward(dy)
        numerics.weight_grads.run()
        assert not (y if where == "input" else x.grad)[5].isfinite().any()
        assert not weights[0].main_grad.isfinite().all()


def test_embedding_gradient_waits_and_adds_repeated_tokens():
    numerics = Numerics("fp64")
    weight = parameter(numerics, 6, 3)
    tokens = torch.tensor([[1, 4, 1], [0, 1, 5]])
    y = embedding(tokens, weight, numerics)
    dy = rows(numerics, 2, 3, 3)
    y.backward(dy)
    assert weight.grad is None and not weight.main_grad.any()
    numerics.weight_grads.run()
    plain = weight.detach().clone().requires_grad_()
    nn.functional.embedding(tokens, plain).backward(dy)
    torch.testing.assert_close(weight.main_grad, plain.grad)


def test_gains_move_their_gradients_into_main_grad():
    module = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 2, dtype=torch.bfloat16))
    module[0].weight.main_grad = kept = torch.ones(4, 4)
    module[1].bias.requires_grad_(False)
    attach_main_grads(module, torch.float32)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    for _ in range(2):
        module(x).sum().backward()
    assert module[0].weight.main_grad is kept
    assert module[1].weight.grad is None and module[1].weight.main_grad.dtype == torch.float32
    torch.testing.assert_close(module[0].bias.main_grad, 6 * module[1].weight.float().sum(0), rtol=1e-2, atol=1e-2)
    assert not hasattr(module[1].bias, "main_grad")


def test_unknown_precisions_and_backends_are_named():
    with pytest.raises(ValueError, match=r"'fp7'.*fp8, bf16, fp32, fp64"):
        Numerics("fp7")
    with pytest.raises(ValueError, match=r"'cutlass'.*auto, reference"):
        Numerics("fp8", backend="cutlass")
