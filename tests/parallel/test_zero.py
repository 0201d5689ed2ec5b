"""ZeRO-1 over unlike replica groups equals torch's own AdamW and clipping on one process, to the last bit but one.

Gradients are small multiples of 1/64, so that sums over ranks are exact in any order. What is left is torch's fused
AdamW itself: it rounds an element otherwise in the vectorised part of a tensor than in its tail.
"""

import tomllib
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from kernels.linear import attach_main_grads
from parallel.experts.shard import expert_shard
from parallel.zero import Bucket, ZeRO1
from train.optim import AdamW16

LR, DECAY, CLIP, STEPS = 1e-2, 0.1, 1.0, 4
SHAPES = {
    "embed.weight": (7, 5),  # tied: on all ranks
    "left.weight": (37, 19),
    "left.norm.weight": (19,),
    "right.norm.weight": (11,),
    "right.weight": (3, 13),
    "experts.weight": (4, 3, 5),
}
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def homes(name, size):
    """Groups of ranks that hold copies (of the experts: each group of one shard). Four ranks hold DualPipe's stages."""
    if size == 4 and name.startswith(("left", "right")):
        return [(0, 3) if name.startswith("left") else (1, 2)]
    if name.startswith("experts"):
        return {1: [(0,)], 2: [(0,), (1,)], 4: [(0, 2), (1, 3)]}[size]
    return [tuple(range(size))]


def initial(name, dtype):
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator).bfloat16().to(dtype)


def gradient(name, step, home, dtype):
    """What the `home`-th of a parameter's copies adds to its gradient in a step."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * home + len(name))
    return torch.randint(-64, 65, SHAPES[name], generator=generator).to(dtype) / 64


def build(dtype, moments):
    """This rank's parameters by name, each with its part of the whole and its copy's number; and the optimizer."""
    rank, size = dist.get_rank(), dist.get_world_size()
    buckets, held = {}, {}
    for name in SHAPES:
        places = homes(name, size)
        for shard, ranks in enumerate(places):
            kind = "experts" if name.startswith("experts") else "dense"
            if (ranks, kind) not in buckets:
                buckets[ranks, kind] = Bucket(ranks, kind, dist.new_group(list(ranks)), {})
            if rank in ranks:
                whole = initial(name, dtype)
                part = slice(shard * len(whole) // len(places), (shard + 1) * len(whole) // len(places))
                value = whole[part].clone()
                parameter = expert_shard(value, part.start, 4) if kind == "experts" else torch.nn.Parameter(value)
                buckets[ranks, kind].parameters[name] = parameter
                held[name] = parameter, part, ranks.index(rank)
    mine = [bucket for bucket in buckets.values() if rank in bucket.ranks]
    adamw = partial(AdamW16, weight_decay=DECAY, moments=moments)
    return held, ZeRO1(mine, adamw, clip=CLIP, wide=WIDE[dtype])


def accumulate(held, step):
    for name, (parameter, part, copy) in held.items():
        parameter.main_grad += gradient(name, step, copy, parameter.main_grad.dtype)[part]


def shards(zero):
    """{key: {name: (start, values)}}, as plain tensors that travel."""
    state = zero.state_dict()
    del state["applied_steps"]
    return {key: {name: (s.start, s.local.clone()) for name, s in by_name.items()} for key, by_name in state.items()}


def train(dtype, moments, scale=1.0):
    held, zero = build(dtype, moments)
    zero.gradient_scale = scale
    addresses = {name: (id(p), p.data_ptr(), p.main_grad.data_ptr()) for name, (p, *_) in held.items()}
    norms = []
    for step in range(STEPS):
        accumulate(held, step)
        for parameter, *_ in held.values():
            parameter.main_grad *= scale
        zero.reduce_gradients()
        norms.append(zero.grad_norm())
        assert zero.step(LR, norms[-1])
    assert addresses == {name: (id(p), p.data_ptr(), p.main_grad.data_ptr()) for name, (p, *_) in held.items()}
    assert not any(p.main_grad.any() for p, *_ in held.values())
    values = {name: (part.start, parameter.detach().clone()) for name, (parameter, part, _) in held.items()}
    return norms, values, shards(zero)


def judge(size, dtype):
    """torch's AdamW on whole parameters in one process; its state by name, and the norms."""
    wide = WIDE[dtype]
    masters = {name: initial(name, wide).requires_grad_() for name in SHAPES}
    groups = [
        {"params": [p for p in masters.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in masters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    norms = []
    for step in range(STEPS):
        for name, master in masters.items():
            copies = len(homes(name, size)[0])
            master.grad = sum(gradient(name, step, copy, wide) for copy in range(copies))
        norms.append(torch.cat([p.grad.double().flatten() for p in masters.values()]).norm())
        scale = min(1.0, CLIP / (norms[-1].item() + 1e-6))
        for master in masters.values():
            master.grad.mul_(scale)
        adamw.step()
    moments = {key: {n: adamw.state[p][key] for n, p in masters.items()} for key in ("exp_avg", "exp_avg_sq")}
    return norms, {"master": {n: p.detach() for n, p in masters.items()}, **moments}


def assert_same(ours, theirs):
    """Equal to two units in the last place; in BF16, to one, where FP32 values straddle a rounding."""
    units = 1 if ours.dtype == torch.bfloat16 else 2
    torch.testing.assert_close(ours, theirs, rtol=max(units * torch.finfo(ours.dtype).eps, 1e-12), atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_training_equals_torchs_adamw_in_one_process(workers, size, dtype):
    results = workers(size).run(train, dtype, WIDE[dtype])
    norms, expected = judge(size, dtype)
    assert all(norm > 2 * CLIP for norm in norms), "clipping takes part"
    for ours, _, _ in results:
        torch.testing.assert_close(torch.stack(ours), torch.stack(norms), rtol=1e-15, atol=0)
    for _, values, _ in results:
        for name, (row, value) in values.items():
            assert_same(value, expected["master"][name].to(dtype)[row : row + len(value)])
    for key, by_name in expected.items():
        for name, whole in by_name.items():
            seen = torch.zeros(whole.numel(), dtype=torch.int)
            for _, _, state in results:
                if name in state[key]:
                    start, values = state[key][name]
                    seen[start : start + len(values)] += 1
                    assert_same(values, whole.flatten()[start : start + len(values)])
            assert (seen == 1).all(), f"every element of {key} {name} is kept once in the world"


def test_a_power_of_two_that_scales_the_gradients_changes_no_bit(workers):
    plain, scaled = (workers(2).run(train, torch.bfloat16, torch.bfloat16, scale) for scale in (1.0, 2.0**26))
    torch.testing.assert_close(scaled, plain, rtol=0, atol=0)


def gains_after_a_step():
    group = dist.new_group([0])
    module = torch.nn.LayerNorm(8)
    zero = ZeRO1([Bucket((0,), "dense", group, dict(module.named_parameters()))], AdamW16, clip=CLIP)
    attach_main_grads(module, torch.float32)
    norms = []
    for _ in range(3):
        module(torch.arange(8.0)).pow(2).sum().backward()
        zero.reduce_gradients()
        norms.append(zero.grad_norm())
        zero.step(LR, norms[-1])
    return norms


def test_gradients_of_gains_arrive_in_every_step(workers):
    assert all(norm > 0 for norm in workers(1).run(gains_after_a_step)[0])


def skip(poison):
    held, zero = build(torch.bfloat16, torch.bfloat16)
    accumulate(held, 0)
    zero.reduce_gradients()
    zero.step(LR, zero.grad_norm())
    before = [p.detach().clone() for p, *_ in held.values()], shards(zero), zero.state_dict()["applied_steps"]
    accumulate(held, 1)
    if dist.get_rank() == dist.get_world_size() - 1:
        next(iter(held.values()))[0].main_grad.flatten()[-1] = poison
    zero.reduce_gradients()
    applied = zero.step(LR, zero.grad_norm())
    after = [p.detach().clone() for p, *_ in held.values()], shards(zero), zero.state_dict()["applied_steps"]
    cleared = not any(p.main_grad.any() for p, *_ in held.values())
    return applied, before, after, cleared


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_gradient_on_one_rank_moves_nothing_anywhere(workers, poison):
    for applied, before, after, cleared in workers(4).run(skip, poison):
        assert applied is False and cleared
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def narrow_moments():
    held, zero = build(torch.bfloat16, torch.bfloat16)
    for step in range(STEPS):
        accumulate(held, step)
        zero.reduce_gradients()
        zero.step(LR, zero.grad_norm())
    return shards(zero)


def test_moments_are_kept_in_bf16_near_the_exact_ones(workers):
    _, expected = judge(2, torch.bfloat16)
    for state in workers(2).run(narrow_moments):
        for key in ("exp_avg", "exp_avg_sq"):
            for name, (start, values) in state[key].items():
                whole = expected[key][name].flatten()[start : start + len(values)]
                assert values.dtype == torch.bfloat16
                assert (values.float() - whole).norm() <= 2**-8 * whole.norm()


def refuse():
    group = dist.new_group([0])
    parameters = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(2).bfloat16())}
    with pytest.raises(ValueError, match="one dtype"):
        ZeRO1([Bucket((0,), "dense", group, parameters)], AdamW16, clip=CLIP)
    with pytest.raises(ValueError, match=r"its ranks \(0, 1\)"):
        ZeRO1([Bucket((0, 1), "dense", group, {"a": parameters["a"]})], AdamW16, clip=CLIP)


def test_buckets_that_cannot_be_flattened_are_refused(workers):
    workers(1).run(refuse)


def private_names():
    held, zero = build(torch.bfloat16, torch.bfloat16)
    for name in (
        "bf16_groups",  # parameters, by bucket
        "bf16_partitioned_groups",  # shares of the flat parameters, by bucket and rank
        "fp32_groups_flat_partition",  # masters
        "fp32_groups_gradients",  # flat views of each parameter's gradient
        "fp32_groups_gradients_flat",
        "fp32_groups_gradient_flat_partition",
        "real_dp_process_group",
        "grad_acc_dtype",
        "param_names",
        "optimizer",
        "clip_grad",
    ):
        assert name in vars(zero), name
    fragment = held["embed.weight"][0]._hp_mapping
    for name in ("hp_fragment", "lp_fragment_address", "optim_fragment", "param_group_index"):
        assert name in vars(fragment), name
    assert not fragment.lp_fragment_address.start


def test_deepspeed_is_the_pinned_one_and_has_every_private_name_relied_on(workers):
    dependencies = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"deepspeed=={version('deepspeed')}" in dependencies
    for name in (
        "_setup_for_real_optimizer",  # overridden: groups of the buckets, wide gradients
        "_link_all_hp_params",  # overridden: wide masters
        "_lazy_init_hp_params_optimizer_state",
        "update_lp_params",
        "zero_grad",
    ):
        assert callable(vars(BF16_Optimizer).get(name)), name
    workers(1).run(private_names)
