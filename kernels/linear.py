"""Linear layers whose weight gradient can wait.

Backward computes the input gradient at once and leaves the weight gradient as a closure on `Numerics.weight_grads`; the
pipeline runs it in place (`B`), or defers it (`I` ... `W`), or fills a communication with it (`F&B`). A closure adds to
the weight's FP32 `main_grad`, straight from the GEMM, and holds its operands and nothing else: inputs are detached, or
they would keep the whole graph before them alive. `Numerics` says in which precision all linears of a rank compute.
An input that is recomputed is made again for the closure, and held from there on.
"""

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels import fp8 as fp8_kernels
from kernels import gemm
from kernels.fp8.health import Health
from kernels.fp8.kept import FORMS
from kernels.recompute import Recompute


class WeightGrads:
    """Weight gradients that wait: `now` holds those of the backward in progress, `groups` those between `I` and `W`."""

    def __init__(self) -> None:
        self.now: list[Callable[[], None]] = []
        self.groups: deque[tuple[Hashable, list[Callable[[], None]]]] = deque()

    def run(self) -> None:
        """Compute all of `now`."""
        group, self.now = self.now, []
        _drain(group)

    def defer(self, owner: Hashable = None) -> None:
        """Put `now` at the tail of the queue, as one group of `owner` (in a pipeline: a stage)."""
        self.groups.append((owner, self.now))
        self.now = []

    def pop(self, owner: Hashable = None) -> None:
        """Compute the oldest group of `owner`."""
        oldest = next((each for each in self.groups if each[0] == owner), None)
        if oldest is None:
            raise RuntimeError("no deferred weight gradients: a W without its I")
        self.groups.remove(oldest)
        _drain(oldest[1])


@torch.no_grad()
def _drain(group: list[Callable[[], None]]) -> None:
    group.reverse()
    while group:
        group.pop()()  # popped first, so that what it held is freed as soon as it has run


DTYPES = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Numerics:
    """How the linears of one rank compute, and what they share: pending weight gradients and quantised weights.

    precision: "fp8" | "bf16" | "fp32" | "fp64". `dtype` is that of parameters and activations (BF16 under FP8), `wide`
    that of sums, router, softmax and losses, `main_grad_dtype` that of accumulated gradients. Quantised weights are
    made once and kept until `bump` says that the weights have changed: optimizer step, load, rollback. `recompute` says
    what backward makes again (`kernels/recompute.py`); `health` sees what is quantised (`kernels/fp8/health.py`).
    Raises ValueError for an unknown precision or backend.
    """

    def __init__(self, precision: str, backend: str = "reference", recompute: Collection[str] = ()) -> None:
        if precision not in DTYPES:
            raise ValueError(f"precision={precision!r}: expected one of {', '.join(DTYPES)}")
        if backend not in fp8_kernels.BACKENDS:
            raise ValueError(f"fp8 backend {backend!r}: expected one of {', '.join(fp8_kernels.BACKENDS)}")
        self.precision = precision
        self.backend = backend
        self.dtype = DTYPES[precision]
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.main_grad_dtype = self.wide
        self.weight_grads = WeightGrads()
        self.recompute = Recompute(recompute, FORMS if precision == "fp8" else {})
        self.health = Health()
        self.epoch = 0
        self._quantised: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def row_align(self) -> int:
        """What each expert's number of rows must be a multiple of, for `grouped_linear`."""
        return fp8_kernels.BACKENDS[self.backend].row_align if self.precision == "fp8" else 1

    def bump(self) -> None:
        """The weights have changed: forget what was made from the old ones."""
        self.epoch += 1
        self._quantised.clear()

    @property
    def turned(self) -> int:
        """Bytes of the copies of quantised weights that input gradients read, once each has had one."""
        turns = fp8_kernels.BACKENDS[self.backend].turns
        return sum(codes.nbytes for _, codes, _ in self._quantised.values()) if turns else 0

    def quantised(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a weight [..., out, in] in 128x128 blocks, made on first use in an epoch."""
        key = id(weight)
        if key not in self._quantised:
            codes, scales = fp8_kernels.fp8_quantize(weight.detach(), fp8_kernels.BLOCKS, False, self.backend)
            # The weight is kept with them: while it lives, its id belongs to no other.
            self._quantised[key] = weight, fp8_kernels.fp8_prepare_weight(codes, self.backend), scales
        _, codes, scales = self._quantised[key]
        return codes, scales


class _Linear(torch.autograd.Function):
    """BF16, FP32 or FP64 operands."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numerics: Numerics, dtype: torch.dtype, recompute: str | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.numerics, ctx.weights = numerics, weights
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return numerics.recompute(recompute, _products, x, weights, dtype)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        pairs = [(w, dy.to(x.dtype)) for w, dy in zip(ctx.weights, dys, strict=True) if dy is not None]
        dx = None
        if ctx.needs_input_grad[0]:
            for w, dy in pairs:
                dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
        for w, dy in pairs:
            if w.requires_grad:
                ctx.numerics.weight_grads.now.append(partial(_accumulate, w, dy, x.detach()))
        return dx, None, None, None, *(None for _ in dys)


def _products(x: Tensor, weights: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    if dtype == x.dtype:
        return tuple(torch.mm(x, w.t()) for w in weights)
    return tuple(gemm.wide_mm(x, w.t(), dtype) for w in weights)


def _accumulate(weight: Any, dy: Tensor, x: Tensor) -> None:
    gemm.accumulate_mm(weight.main_grad, dy.t(), x)


class _FP8Linear(torch.autograd.Function):
    """Keeps the input as FP8 for backward, and the output gradients as FP8 for the weight gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numerics: Numerics, power_of_two: bool, recompute: str | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.numerics, ctx.weights, ctx.dtype = numerics, weights, x.dtype
        ctx.set_materialize_grads(False)
        cast = fp8_kernels.ROWS, power_of_two, numerics.backend
        codes, scales = numerics.recompute.after(fp8_kernels.fp8_quantize, x, *cast)
        ctx.layer = numerics.health.layer
        numerics.health.record(ctx.layer, "activation", x, codes, scales)
        ctx.save_for_backward(codes, scales)
        ctx.quantised = [numerics.quantised(w) for w in weights]
        operands = codes, scales, *_columns(ctx.quantised)
        return tuple(numerics.recompute(recompute, fp8_kernels.fp8_linear, *operands, x.dtype, numerics.backend))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x_codes, x_scales = ctx.saved_tensors
        numerics = ctx.numerics
        used = [i for i, dy in enumerate(dys) if dy is not None]
        cast = fp8_kernels.ROWS, False, numerics.backend
        quantised_dys = {i: fp8_kernels.fp8_quantize(dys[i], *cast) for i in used}
        for i, quantised_dy in quantised_dys.items():
            numerics.health.record(ctx.layer, "gradient", dys[i], *quantised_dy)
        dx = None
        if ctx.needs_input_grad[0] and used:
            dy_operands, weight_operands = _columns(quantised_dys.values()), _columns(ctx.quantised[i] for i in used)
            dx = fp8_kernels.fp8_linear_dgrad(*dy_operands, *weight_operands, ctx.dtype, numerics.backend)
        trained = [i for i in used if ctx.weights[i].requires_grad]
        if trained:
            numerics.weight_grads.now.append(
                partial(
                    _accumulate_fp8,
                    [ctx.weights[i] for i in trained],
                    [quantised_dys[i] for i in trained],
                    (x_codes, x_scales),
                    numerics.backend,
                )
            )
        return dx, None, None, None, *(None for _ in dys)


def _columns(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    codes, scales = zip(*pairs, strict=True)
    return list(codes), list(scales)


def _accumulate_fp8(
    weights: list[Any], dys: list[tuple[Tensor, Tensor]], x: tuple[Tensor, Tensor], backend: str
) -> None:
    fp8_kernels.fp8_linear_wgrad(*x, *_columns(dys), [w.main_grad for w in weights], backend)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int], numerics: Numerics) -> Tensor:
        ctx.numerics, ctx.weight, ctx.counts = numerics, weight, counts
        ctx.save_for_backward(x)
        return gemm.grouped_mm(x, weight.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        if ctx.weight.requires_grad:
            ctx.numerics.weight_grads.now.append(partial(_accumulate_grouped, ctx.weight, dy, x.detach(), ctx.counts))
        dx = gemm.grouped_mm(dy, ctx.weight, ctx.counts) if ctx.needs_input_grad[0] else None
        return dx, None, None, None


def _accumulate_grouped(weight: Any, dy: Tensor, x: Tensor, counts: list[int]) -> None:
    gemm.grouped_accumulate_mm(weight.main_grad, dy, x, counts)


class _FP8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        counts: list[int],
        numerics: Numerics,
        power_of_two: bool,
        power_of_two_grad: bool,
    ) -> Tensor:
        ctx.numerics, ctx.weight, ctx.counts = numerics, weight, counts
        ctx.power_of_two_grad = power_of_two_grad
        cast = fp8_kernels.ROWS, power_of_two, numerics.backend
        codes, scales = numerics.recompute.after(fp8_kernels.fp8_quantize, x, *cast)
        ctx.layer = numerics.health.layer
        numerics.health.record(ctx.layer, "activation", x, codes, scales)
        ctx.save_for_backward(codes, scales)
        ctx.quantised = numerics.quantised(weight)
        return fp8_kernels.fp8_grouped_linear(codes, scales, *ctx.quantised, counts, x.dtype, numerics.backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        numerics, counts = ctx.numerics, ctx.counts
        quantised_dy = fp8_kernels.fp8_quantize(dy, fp8_kernels.ROWS, ctx.power_of_two_grad, numerics.backend)
        numerics.health.record(ctx.layer, "gradient", dy, *quantised_dy)
        if ctx.weight.requires_grad:
            operands = *ctx.saved_tensors, *quantised_dy
            numerics.weight_grads.now.append(
                partial(_accumulate_grouped_fp8, ctx.weight, operands, counts, numerics.backend)
            )
        dx = None
        if ctx.needs_input_grad[0]:
            dx = fp8_kernels.fp8_grouped_dgrad(*quantised_dy, *ctx.quantised, counts, dy.dtype, numerics.backend)
        return dx, None, None, None, None, None


def _accumulate_grouped_fp8(weight: Any, operands: tuple[Tensor, ...], counts: list[int], backend: str) -> None:
    fp8_kernels.fp8_grouped_wgrad(*operands, weight.main_grad, counts, backend)


def linear(
    x: Tensor,
    weights: Sequence[nn.Parameter],
    numerics: Numerics,
    *,
    fp8: bool = True,
    power_of_two: bool = False,
    wide_out: bool = False,
    recompute: str | None = None,
) -> tuple[Tensor, ...]:
    """Multiply one input by several weights: `x` [..., in], weights [out_i, in] -> outputs [..., out_i].

    Under FP8 `x` is quantised once for all of them; the input gradient is their sum.
    fp8: False keeps the GEMMs in `numerics.dtype` (head, router, MTP projection).
    power_of_two: the scales of `x` are powers of two (the input of the attention's output projection).
    wide_out: outputs in `numerics.wide` instead of the dtype of `x` (router, logits); not with FP8.
    recompute: the choice under which outputs are made again in backward.
    The weights' gradients go to their `main_grad`; autograd sees None. Source: report sections 3.3.1 and 3.3.2.
    """
    rows = x.flatten(0, -2)
    if fp8 and numerics.precision == "fp8" and not wide_out:
        ys = _FP8Linear.apply(rows, numerics, power_of_two, recompute, *weights)
    else:
        ys = _Linear.apply(rows, numerics, numerics.wide if wide_out else x.dtype, recompute, *weights)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def grouped_linear(
    x: Tensor,
    weight: nn.Parameter,
    counts: list[int],
    numerics: Numerics,
    *,
    power_of_two: bool = False,
    power_of_two_grad: bool = False,
) -> Tensor:
    """Multiply each expert's rows by its weight: `x` [R, in] sorted by local expert, weight [E, out, in] -> [R, out].

    counts: rows of each expert, host integers that add up to R; zeros are fine, also everywhere.
    power_of_two, power_of_two_grad: scales of `x` and of the output's gradient are powers of two (what was, or will be,
    dispatched in FP8). Gradients as in `linear`.
    """
    if numerics.precision == "fp8":
        return _FP8GroupedLinear.apply(x, weight, counts, numerics, power_of_two, power_of_two_grad)
    return _GroupedLinear.apply(x, weight, counts, numerics)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, numerics: Numerics) -> Tensor:
        ctx.numerics, ctx.weight = numerics, weight
        ctx.save_for_backward(tokens)
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        (tokens,) = ctx.saved_tensors
        if ctx.weight.requires_grad:
            ctx.numerics.weight_grads.now.append(partial(_accumulate_rows, ctx.weight, tokens, dy))
        return None, None, None


def _accumulate_rows(weight: Any, tokens: Tensor, dy: Tensor) -> None:
    weight.main_grad.index_add_(0, tokens.flatten(), dy.flatten(0, -2).to(weight.main_grad.dtype))


def embedding(tokens: Tensor, weight: nn.Parameter, numerics: Numerics) -> Tensor:
    """Rows of `weight` [V, D] for integer `tokens` [...]: [..., D]; the gradient waits like a linear's, row by row."""
    return _Embedding.apply(tokens, weight, numerics)


def attach_main_grads(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every trainable parameter a zero `main_grad` of `dtype` if it has none, and send autograd's gradients there.

    Linears and embeddings write `main_grad` themselves. To norms' gains autograd adds in place where `main_grad` can be
    their `grad`; where it is wider than they are, a hook takes the gradient over, once per backward.
    """
    parameter: Any  # with a `main_grad`
    for parameter in module.parameters():
        if parameter.requires_grad:
            if not hasattr(parameter, "main_grad"):
                parameter.main_grad = torch.zeros_like(parameter, dtype=dtype)
            if parameter.main_grad.dtype == parameter.dtype:
                parameter.grad = parameter.main_grad
            else:
                parameter.register_post_accumulate_grad_hook(_move_grad)


def _move_grad(parameter: Any) -> None:
    if parameter.grad is not None:
        parameter.main_grad += parameter.grad
        parameter.grad = None
