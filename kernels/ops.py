"""weft's own operators: a name, a CPU or GPU implementation, a fake one, and a price, all in one place.

`@op(cost=..., fake=...)` turns a function into `torch.ops.weft.<name>`. Tracing on fake tensors then sees one
quantisation or one GEMM instead of the loop beneath it, FLOP counters count it, and a simulator finds its price in
`costs`. Operators know no autograd: the other modules pair forward with backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@dataclass(frozen=True)
class Cost:
    """What one call needs at least: floating-point operations, and bytes read plus bytes written."""

    flops: int
    bytes: int


costs: dict[str, Callable[..., Cost]] = {}
"""Operator name -> price of a call, taking the operator's own arguments (fake tensors will do)."""

_library = torch.library.Library("weft", "DEF")


def op(*, cost: Callable[..., Cost], fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register the decorated function as `torch.ops.weft.<its name>` and return that operator.

    The schema comes from the annotations. `cost` and `fake` take the same arguments; `fake` returns empty tensors of
    the right shape and dtype, and `mutates` names the arguments that are written in place.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        _library.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"weft::{name}", fake, lib=_library)
        packet = getattr(torch.ops.weft, name)

        def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return cost(*args, **kwargs).flops

        register_flop_formula(packet, get_raw=True)(flops)
        costs[name] = cost
        return packet.default

    return register


def size(*tensors: Tensor) -> int:
    """Bytes that these tensors occupy."""
    return sum(t.numel() * t.element_size() for t in tensors)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: FP64 for FP64, else FP32."""
    return torch.promote_types(dtype, torch.float32)
