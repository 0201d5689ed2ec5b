"""What the layout tests run on every rank: a few steps of one small recipe, and everything that can be compared."""

from typing import Any

import torch
import torch.distributed as dist

from parallel.experts.shard import share_of
from train.engine import Engine
from train.model.config import ModelConfig
from train.recipe import Recipe

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
    "initializer_range": 0.05,
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "dualpipe 2": {"schedule": "dualpipe", "pipeline": 2},
    "dualpipe 2, data 2, expert 2": {"schedule": "dualpipe", "pipeline": 2, "data": 2, "expert": 2},
    "dualpipe 4": {"schedule": "dualpipe", "pipeline": 4},
    "1f1b 4": {"pipeline": 4},
    "data 4, expert 4": {"data": 4, "expert": 4},
    "1f1b 2, data 2": {"pipeline": 2, "data": 2},
}


def small_recipe(layout: dict[str, Any], precision: str, **model: Any) -> Recipe:
    """Eight sequences of 32 tokens a step, one a micro-batch; losses weigh enough to be seen in the gradients."""
    recipe = Recipe(model=ModelConfig(**{**SMALL, **model}), precision=precision)
    for key, value in layout.items():
        setattr(recipe.parallel, key, value)
    recipe.train.steps, recipe.train.sequence_length, recipe.train.balance_alpha = 5, 32, 0.01
    recipe.optim.lr.peak = recipe.optim.lr.end = 1e-3
    return recipe.validate()


def batch_of(step: int, recipe: Recipe) -> torch.Tensor:
    """The global batch of a step: [8, T+1]."""
    generator = torch.Generator().manual_seed(step)
    shape = (recipe.train.batch.start, recipe.train.sequence_length + 1)
    return torch.randint(recipe.model.vocab_size, shape, generator=generator)


def globally(engine: Engine, value) -> dict[tuple[str, int], torch.Tensor]:
    """value(parameter) of each parameter by (name, first expert), as held on this rank."""
    found = {}
    for bucket in engine.buckets:
        for name, parameter in bucket.parameters.items():
            share = share_of(parameter)
            first = share.first if share else 0
            found[name, first] = value(parameter, bucket)
    return found


def summed_gradient(parameter: Any, bucket: Any) -> torch.Tensor:
    """The gradient over the whole global batch, which the replica group holds in parts."""
    total = parameter.main_grad.clone()
    dist.all_reduce(total, group=bucket.group)
    return total


def gather(parts: list[dict], key: str) -> dict[str, torch.Tensor]:
    """Parameters by name, experts put together; copies on several ranks must agree to the bit."""
    shards: dict[tuple[str, int], torch.Tensor] = {}
    for part in parts:
        for place, tensor in part[key].items():
            if place in shards:
                assert torch.equal(shards[place], tensor), f"{key}: copies of {place} differ between ranks"
            shards[place] = tensor
    whole: dict[str, list[torch.Tensor]] = {}
    for (name, _), tensor in sorted(shards.items(), key=lambda item: item[0]):
        whole.setdefault(name, []).append(tensor)
    return {name: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for name, pieces in whole.items()}


def train_small(layout: dict[str, Any], precision: str, steps: int, gradients: bool, **model: Any) -> dict[str, Any]:
    """Run `steps` steps; returns what this rank knows of losses, norms, loads, biases, parameters and gradients."""
    recipe = small_recipe(layout, precision, **model)
    engine = Engine(recipe, torch.device("cpu"))
    start = globally(engine, lambda parameter, bucket: parameter.detach().clone())
    history, grads = [], {}
    for step in range(steps):
        rows, size = batch_of(step, recipe), recipe.train.batch.start
        tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
        if gradients:
            engine.pipeline.reduce = lambda stage: None  # main_grad is looked at before it is reduced
        totals = engine.forward_backward(tokens if engine.needs_tokens else {}, size, mtp_weight=0.3)
        if gradients:
            grads = globally(engine, summed_gradient)
        applied, norm = engine.update(1e-3, 1e-3, totals)
        assert applied
        history.append({**totals.losses, "grad_norm": norm, "loads": totals.loads})
    return {
        "start": start,
        "grads": grads,
        "history": history,
        "biases": {n: r.e_score_correction_bias.clone() for n, r in engine.routers().items()},
        "peak": engine.pipeline.peak_tapes,
        "log": list(engine.dispatcher.log),
    }
