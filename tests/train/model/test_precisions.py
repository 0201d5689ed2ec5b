"""Every GEMM of a step, by the weight that it multiplies, against the table of what the report computes in FP8."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.linear import Numerics, attach_main_grads
from parallel.experts import LocalExperts
from parallel.passes import Microbatch, backward, forward, merge
from tests.train.layouts import SMALL
from train.model.config import ModelConfig
from train.model.init import initialise
from train.model.stage import build

FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32

# Report sections 3.3.1 to 3.3.3: operands of Fprop, Dgrad and Wgrad, and what Fprop, Dgrad and Wgrad yield.
IN_FP8 = (FP8, FP8, FP8), (BF16, BF16, FP32)
IN_BF16 = (BF16, BF16, BF16), (BF16, BF16, FP32)
INTO_FP32 = (BF16, BF16, BF16), (FP32, BF16, FP32)
TABLE = {
    "self_attn.q_a_proj": IN_FP8,
    "self_attn.q_b_proj": IN_FP8,
    "self_attn.kv_a_proj_with_mqa": IN_FP8,
    "self_attn.kv_b_proj": IN_FP8,
    "self_attn.o_proj": IN_FP8,
    "mlp.gate_proj": IN_FP8,
    "mlp.up_proj": IN_FP8,
    "mlp.down_proj": IN_FP8,
    "mlp.shared_experts.gate_proj": IN_FP8,
    "mlp.shared_experts.up_proj": IN_FP8,
    "mlp.shared_experts.down_proj": IN_FP8,
    "mlp.experts.gate_up_proj": IN_FP8,
    "mlp.experts.down_proj": IN_FP8,
    "mlp.gate": INTO_FP32,
    "eh_proj": IN_BF16,
    "lm_head": INTO_FP32,
}
POWERS_OF_TWO = {("self_attn.o_proj", "x"), ("mlp.experts.gate_up_proj", "x"), ("mlp.experts.down_proj", "dy")}

# Operator -> pass, and which arguments are rows and which the weight, or the gradient that is added to
GEMMS = {
    "weft.fp8_linear": ("Fprop", 0, 2),
    "weft.fp8_linear_dgrad": ("Dgrad", 0, 2),
    "weft.fp8_linear_wgrad": ("Wgrad", 0, 4),
    "weft.fp8_grouped_linear": ("Fprop", 0, 2),
    "weft.fp8_grouped_dgrad": ("Dgrad", 0, 2),
    "weft.fp8_grouped_wgrad": ("Wgrad", 0, 4),
    "weft.wide_mm": ("Fprop", 0, 1),
    "weft.accumulate_mm": ("Wgrad", 2, 0),
    "aten.mm": (None, 0, 1),  # a weight's transpose is its Fprop, the weight itself its Dgrad
}
OTHER_PRODUCTS = ("mm", "bmm", "linear", "grad", "matmul", "einsum", "attention", "dot")


class Products(TorchDispatchMode):
    """GEMMs as (weight, pass, dtype of rows, dtype of result), products without a weight, and power-of-two operands."""

    def __init__(self, numerics: Numerics, names: dict[int, str]) -> None:
        super().__init__()
        self.numerics, self.names = numerics, names  # by the address of weight or main_grad
        self.gemms: set[tuple[str, str, torch.dtype, torch.dtype]] = set()
        self.others: set[tuple[str, torch.dtype]] = set()
        self.rounded: set[tuple[str, str]] = set()
        self.codes: dict[int, tuple[Tensor, bool]] = {}  # alive, so that their addresses stay theirs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = f"{func.namespace}.{func._schema.name.split('::')[1]}"
        if name == "weft.fp8_quantize":
            self.codes[results[0].data_ptr()] = results[0], args[2]
        elif name in GEMMS:
            self.product(*GEMMS[name], args, results)
        elif any(each in name.split(".")[1].split("_") for each in OTHER_PRODUCTS):
            self.others.add((name, args[0].dtype))
        return results

    def product(self, which: str | None, rows: int, weight: int, args: Any, results: Any) -> None:
        made = {codes.data_ptr(): id for id, (_, codes, _) in self.numerics._quantised.items()}
        for place, target in enumerate(tree_leaves(args[weight])):
            name = self.names[made.get(target.data_ptr(), target.data_ptr())]
            operands = tree_leaves(args[rows])
            result = target if results is None else tree_leaves(results)[0]
            turn = which or ("Dgrad" if target.is_contiguous() else "Fprop")
            self.gemms.add((name, turn, operands[0].dtype, result.dtype))
            if turn != "Wgrad" and operands[0].dtype == FP8:
                _, rounded = self.codes[operands[place if turn == "Dgrad" else 0].data_ptr()]
                self.rounded |= {(name, "x" if turn == "Fprop" else "dy")} if rounded else set()


@pytest.fixture(scope="module", params=[(), ("norms", "mla_up", "swiglu"), ("layer",)], ids=" ".join)
def products(request) -> Products:
    config, numerics = ModelConfig(**SMALL), Numerics("fp8", recompute=request.param)
    experts = 0, config.n_routed_experts
    dispatcher = LocalExperts(experts[1])
    (stage,) = build(config, numerics, dispatcher, [0], [range(config.num_hidden_layers)], experts).values()
    initialise(stage, 0, 0.05)
    attach_main_grads(stage, torch.float32)
    names: dict[int, str] = {}
    for name, parameter in stage.named_parameters():
        short = name.removesuffix(".weight").removeprefix("model.")
        short = short.split(".", 2)[2] if short.startswith("layers.") else short
        names |= {id(parameter): short, parameter.data_ptr(): short, parameter.main_grad.data_ptr(): short}
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    batch, tape = Microbatch(0, tokens, seeds={"loss": 1.0, "mtp_loss": 0.3, "balance_loss": 0.01}), []
    with Products(numerics, names) as found:
        merge(forward(stage, None, batch, tape))
        merge(backward(stage, None, batch, tape, numerics.weight_grads, split=False))
        numerics.weight_grads.run()
    return found


def test_every_gemm_has_the_precision_of_the_table(products):
    turns = "Fprop", "Dgrad", "Wgrad"
    expected = {
        (name, *row)
        for name, (operands, results) in TABLE.items()
        for row in zip(turns, operands, results, strict=True)
    }
    assert products.gemms == expected


def test_products_without_a_weight_are_attentions_in_bf16(products):
    assert products.others == {("weft.causal_attention_forward", BF16), ("weft.causal_attention_backward", BF16)}


def test_scales_are_powers_of_two_where_rows_are_dispatched_and_after_attention(products):
    assert products.rounded == POWERS_OF_TWO
