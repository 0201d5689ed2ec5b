"""weft's own operators: a name, a CPU or GPU implementation, a fake one, and a price, all in one place.

`@op(cost=..., fake=...)` turns a function into `torch.ops.weft.<name>`. Tracing on fake tensors then sees one
quantisation or one GEMM instead of the loop beneath it, FLOP counters count it, and a simulator finds its price in
`costs`. Operators know no autograd: the other modules pair forward with backward.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] x [k, n]. groups: of how many it consists, side by side in rows (m) or in k."""

    m: int
    n: int
    k: int
    groups: int = 1

    @property
    def flops(self) -> int:
        """A multiplication and an addition each."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Cost:
    """What one call needs at least: floating-point operations, and bytes read plus bytes written.

    unit: what does the operations: "vector", or "fp8", "bf16", "fp32", "fp64" and "attention" for matrix units.
    products: the matrix products that they are, if they are. workspace: bytes that it takes for itself meanwhile.
    """

    flops: int
    bytes: int
    unit: str = "vector"
    products: tuple[Product, ...] = ()
    workspace: int = 0

    @classmethod
    def of(cls, unit: str, products: tuple[Product, ...], bytes: int, workspace: int = 0) -> "Cost":
        """Nothing but these matrix products."""
        return cls(sum(product.flops for product in products), bytes, unit, products, workspace)


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


def tensors(tree: Any) -> Iterator[Tensor]:
    """Those among the arguments or results of an operator, which are nested in lists, tuples and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from tensors(each)
    elif isinstance(tree, Mapping):
        yield from tensors([*tree.values()])


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: FP64 for FP64, else FP32."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------- prices of all that runs
UNITS = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float16: "bf16", torch.float64: "fp64"}
_FREE = ("empty", "new_empty", "_unsafe_view", "set_", "lift_fresh", "is_")  # no memory is touched
_PICKING = ("index_select", "gather", "index.", "embedding")  # of their first argument they read what they return


def unit_of(dtype: torch.dtype) -> str:
    """The matrix units that multiply operands of `dtype`."""
    return UNITS.get(dtype, "fp32")


def price(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Cost | None:
    """What a call of any operator costs, weft's or PyTorch's; None if it only looks at memory in another way.

    PyTorch's matrix products are priced as such, and everything else by the memory that it reads and writes.
    """
    if operator.namespace == "weft":
        return costs[operator._opname](*args, **kwargs)
    name = str(operator).removeprefix("aten.")
    if operator.namespace != "aten" or operator.is_view or name.startswith(_FREE):
        return None
    inputs, outputs = [*tensors((args, kwargs))], [*tensors(result)]
    if name.startswith(_PICKING):
        inputs = [*inputs[1:], *outputs]
    touched = sum(min(size(each), each.untyped_storage().nbytes()) for each in (*inputs, *outputs))
    if name.split(".")[0] in _PRODUCTS:
        *batch, m, k = (matrices := [each for each in inputs if each.dim() > 1][-2:])[0].shape
        return Cost.of(unit_of(matrices[0].dtype), (Product(m, matrices[1].shape[-1], k),) * math.prod(batch), touched)
    return Cost(0, touched)


_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
