"""Recomputation changes what is kept, by as much as the shapes say, and no bit of any gradient."""

from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.linear import Numerics, attach_main_grads
from kernels.recompute import CHOICES
from parallel.errors import UserError
from parallel.experts import LocalExperts
from parallel.passes import Microbatch, Tape, backward, forward, merge
from tests.train.layouts import LAYOUTS, SMALL, globally, small_recipe
from tests.train.layouts import batch_of as global_batch
from train.compose import compose
from train.engine import Engine
from train.model.config import ModelConfig
from train.model.init import initialise
from train.model.router import Router
from train.model.stage import Stage, build
from train.recipe import TrainConfig

CONFIG = ModelConfig(**{**SMALL, "num_hidden_layers": 3})
B, T = 2, 32
SEEDS = {"loss": 1.0, "mtp_loss": 0.3, "balance_loss": 0.01}
COMBINATIONS = [*chain.from_iterable(combinations(CHOICES[:3], n) for n in (1, 2, 3)), ("layer",), CHOICES]


def stage_of(precision: str, choices: tuple[str, ...], config: ModelConfig = CONFIG) -> tuple[Stage, Numerics]:
    numerics = Numerics(precision, recompute=choices)
    experts = (0, config.n_routed_experts)
    (stage,) = build(
        config, numerics, LocalExperts(experts[1]), [0], [range(config.num_hidden_layers)], experts
    ).values()
    initialise(stage, 0, 0.05)
    attach_main_grads(stage, numerics.main_grad_dtype)
    return stage, numerics


def batch_of(number: int) -> Microbatch:
    tokens = torch.randint(CONFIG.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(number))
    return Microbatch(number, tokens, seeds=SEEDS)


def gradients(precision: str, choices: tuple[str, ...], deferred: bool) -> dict[str, torch.Tensor]:
    """Of two micro-batches, with losses and router loads; `deferred`: weight gradients run after both backwards."""
    stage, numerics = stage_of(precision, choices)
    found: dict[str, Any] = {}
    for number in range(2):
        batch, tape = batch_of(number), []
        merge(forward(stage, None, batch, tape))
        merge(backward(stage, None, batch, tape, numerics.weight_grads, split=deferred))
        numerics.weight_grads.defer(0) if deferred else numerics.weight_grads.run()
        found |= {f"{key} of {number}": value for key, value in batch.losses.items()}
    while numerics.weight_grads.groups:
        numerics.weight_grads.pop(0)
    found |= {f"load of {number}": router.load for number, router in stage.routers().items()}
    return found | {name: parameter.main_grad for name, parameter in stage.named_parameters()}


@pytest.fixture(scope="module")
def kept_everything():
    """Gradients without recomputation, by precision."""
    return {precision: gradients(precision, (), False) for precision in ("fp32", "bf16", "fp8")}


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("choices", COMBINATIONS, ids=" ".join)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_gradients_losses_and_loads_are_the_same_to_the_bit(kept_everything, precision, choices, deferred):
    found, expected = gradients(precision, choices, deferred), kept_everything[precision]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert value.any(), f"{name} is zero: the comparison would prove nothing"


@pytest.mark.slow
def test_gradients_are_the_same_in_a_pipeline_with_experts_elsewhere(workers):
    pool = workers(4)
    expected = pool.run(gradients_of_rank, [])
    for choices in (CHOICES[:3], ("layer",)):
        for found, other in zip(pool.run(gradients_of_rank, list(choices)), expected, strict=True):
            assert found.keys() == other.keys()
            assert all(torch.equal(found[name], other[name]) for name in other)


def gradients_of_rank(choices: list[str]) -> dict[Any, torch.Tensor]:
    """Gradients of one step as DualPipe leaves them on this rank, before they are summed over replicas."""
    recipe = small_recipe(LAYOUTS["dualpipe 2, data 2, expert 2"], "fp8")
    recipe.train.recompute = choices
    engine, size = Engine(recipe, torch.device("cpu")), recipe.train.batch.start
    engine.pipeline.reduce = lambda stage: None  # main_grad is looked at before it is reduced
    rows = global_batch(0, recipe)
    tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
    engine.forward_backward(tokens if engine.needs_tokens else {}, size, mtp_weight=0.3)
    return globally(engine, lambda parameter, bucket: parameter.main_grad.clone())


@pytest.mark.parametrize("choices", [("layer",), CHOICES[:3]], ids=" ".join)
def test_nothing_is_routed_twice(choices, monkeypatch):
    routed = []
    choose = Router.choose
    monkeypatch.setattr(Router, "choose", lambda self, scores: routed.append(self) or choose(self, scores))
    stage, numerics = stage_of("bf16", choices)
    batch, tape = batch_of(0), []
    merge(forward(stage, None, batch, tape))
    merge(backward(stage, None, batch, tape, numerics.weight_grads, split=False))
    assert len(routed) == len(stage.routers())


# ---------------------------------------------------------------- memory
def memory_of(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors in there, by address."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return {memory._cdata: memory for memory in found}


class Allocated(TorchDispatchMode):
    """Remembers, weakly, the memory of everything that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = memory_of((args, kwargs))
        results = func(*args, **(kwargs or {}))
        for address, memory in memory_of(results).items():
            if address not in given:  # else a view of what was there: of a parameter, say
                self.seen[address] = StorageWeakRef(memory), memory.nbytes()
        return results

    def alive(self) -> int:
        """Bytes still held by somebody."""
        return sum(size for memory, size in self.seen.values() if not memory.expired())


def kept(precision: str, choices: tuple[str, ...], layers: int = CONFIG.num_hidden_layers) -> int:
    """Bytes that the tape of one micro-batch holds after its forward, without MTP."""
    config = ModelConfig(**{**SMALL, "num_nextn_predict_layers": 0, "num_hidden_layers": layers})
    stage, _ = stage_of(precision, choices, config)
    merge(forward(stage, None, batch_of(0), []))  # whatever is computed once: rotations, quantised weights
    batch, memory = batch_of(1), Allocated()
    tape: Tape = []
    with memory:
        merge(forward(stage, None, batch, tape))
    batch.losses.clear()
    return memory.alive()


def quantised(width: int) -> int:
    """Bytes of a row in FP8, with the scales of its tiles."""
    return width + 4 * -(-width // 128)


def predicted(precision: str) -> dict[str, int]:
    """Bytes that each choice saves in one micro-batch."""
    c, rows = CONFIG, B * T
    item = 4 if precision == "fp32" else 2
    moe = c.num_hidden_layers - c.first_k_dense_replace

    def operand(width: int) -> int:  # what a linear keeps of a row of its input
        return quantised(width) if precision == "fp8" else item * width

    shared = operand(c.hidden_size) if precision == "fp8" else 0  # otherwise the router keeps the same rows
    norms = c.num_hidden_layers * sum(map(operand, (c.hidden_size, c.q_lora_rank, c.kv_lora_rank)))
    norms += c.first_k_dense_replace * operand(c.hidden_size)
    norms += moe * (item * c.hidden_size + shared)
    norms += item * c.hidden_size  # before the head
    heads = c.num_attention_heads * (2 * c.qk_head_dim + c.v_head_dim)
    mla_up = c.num_hidden_layers * item * (heads - c.qk_rope_head_dim)  # the rotary key stays, before its rotation
    swiglu = c.first_k_dense_replace * operand(c.intermediate_size)
    if precision != "fp8":  # which never keeps it in a MoE layer
        swiglu += moe * (c.n_shared_experts + c.num_experts_per_tok) * operand(c.moe_intermediate_size)
    return {"norms": rows * norms, "mla_up": rows * mla_up, "swiglu": rows * swiglu}


@pytest.mark.parametrize("choices", COMBINATIONS[:7], ids=" ".join)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_memory_falls_by_what_the_shapes_say(precision, choices):
    saved = sum(predicted(precision)[choice] for choice in choices)
    assert saved > 0
    assert kept(precision, ()) - kept(precision, choices) == saved


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_of_a_recomputed_layer_only_the_inputs_of_its_segments_and_the_routing_are_kept(precision):
    item, chosen = 4 if precision == "fp32" else 2, CONFIG.num_experts_per_tok
    inputs = item * CONFIG.hidden_size * (1 + chosen + 1) + 4 * chosen  # hidden; rows, their weights, normed
    routing = 8 * chosen * 3  # the experts chosen; which row is whose, in both directions
    one = kept(precision, ("layer",), 3) - kept(precision, ("layer",), 2)
    assert one == B * T * (inputs + routing)


def test_what_cannot_be_recomputed_is_named():
    with pytest.raises(UserError, match=r"train\.recompute=swiglue: expected one of .*; did you mean 'swiglu'\?"):
        TrainConfig(steps=1, recompute=["norms", "swiglue"]).check()


@pytest.mark.parametrize(("recipe", "expected"), [("tiny", []), ("v3", ["norms", "mla_up", "swiglu"])])
def test_recipes_recompute_what_the_report_does(recipe, expected):
    assert compose([f"recipe={recipe}", "data.path=none"]).train.recompute == expected
