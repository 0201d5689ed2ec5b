"""Sizes on the meta device equal the published and enumerated counts; how layers are shared out; initial values."""

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.linear import Numerics
from parallel.errors import UserError
from parallel.experts import LocalExperts
from tests.train.layouts import SMALL
from train.compose import compose
from train.model.config import ModelConfig
from train.model.init import initialise
from train.model.stage import build, layer_costs, split_layers


def model_of(name):
    """The sizes of a recipe."""
    return compose([f"recipe={name}", *(["data.path=none"] if name != "tiny" else [])]).model


@cache
def parameters(name):
    """{name: elements} of the whole model, and {router: biases}, from one stage on the meta device."""
    config = model_of(name)
    experts = LocalExperts(config.n_routed_experts)
    layers = [range(config.num_hidden_layers)]
    with torch.device("meta"):
        (stage,) = build(config, Numerics("bf16"), experts, [0], layers, (0, config.n_routed_experts)).values()
    named = {key: parameter.numel() for key, parameter in stage.named_parameters()}
    return named, {key: buffer.numel() for key, buffer in stage.named_buffers() if key.endswith("correction_bias")}


def count(name, *prefixes):
    """Elements of the parameters whose names begin so."""
    return sum(elements for key, elements in parameters(name)[0].items() if key.startswith(prefixes or ("",)))


def test_deepseek_v3_has_671_billion_parameters_without_mtp():
    own = count("v3", "model.layers.61.")
    assert count("v3") - own == 671_026_404_352
    assert own == 11_610_067_968
    assert sum(parameters("v3")[1].values()) == 14_848 + 256, "router biases: 58 layers, and MTP's"


@pytest.mark.parametrize(
    ("prefix", "elements"),
    [
        ("model.embed_tokens.", 129_280 * 7_168),
        ("lm_head.", 129_280 * 7_168),
        ("model.norm.", 7_168),
        ("model.layers.0.", 583_483_392),
        ("model.layers.2.mlp.", 396_361_728),
        ("model.layers.3.", 11_507_286_016),
        ("model.layers.60.", 11_507_286_016),
        ("model.layers.3.self_attn.", 187_107_328),
        ("model.layers.3.self_attn.q_a_proj.", 11_010_048),
        ("model.layers.3.self_attn.q_b_proj.", 37_748_736),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.", 4_128_768),
        ("model.layers.3.self_attn.kv_b_proj.", 16_777_216),
        ("model.layers.3.self_attn.o_proj.", 117_440_512),
        ("model.layers.3.self_attn.q_a_layernorm.", 1_536),
        ("model.layers.3.self_attn.kv_a_layernorm.", 512),
        ("model.layers.3.mlp.gate.", 1_835_008),
        ("model.layers.3.mlp.experts.", 256 * 44_040_192),
        ("model.layers.3.mlp.shared_experts.", 44_040_192),
        ("model.layers.61.eh_proj.", 102_760_448),
    ],
)
def test_a_block_of_deepseek_v3(prefix, elements):
    assert count("v3", prefix) == elements


def test_deepseek_v3_activates_37_billion_parameters_a_token():
    routed = sum(elements for key, elements in parameters("v3")[0].items() if ".mlp.experts." in key)
    routed -= count("v3", "model.layers.61.mlp.experts.")
    active = 671_026_404_352 - routed + routed * 8 // 256
    assert active == 37_552_282_624


def test_the_ablation_model_has_15_7_billion():
    config = model_of("v3-16b")
    total = count("v3-16b") - count("v3-16b", f"model.layers.{config.num_hidden_layers}.")
    assert round(total / 1e9, 1) == 15.7


def test_tiny_has_12_7_million_parameters_and_half_of_them_active():
    routed = sum(elements for key, elements in parameters("tiny")[0].items() if ".mlp.experts." in key)
    assert count("tiny") == 12_723_712
    assert count("tiny") - routed + routed * 4 // 16 == 6_825_472


# ---------------------------------------------------------------- layers over stages
@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 3), st.integers(0, 2), st.data())
def test_layers_are_shared_out_so_that_the_costliest_stage_is_cheapest(stages, extra, dense, depths, data):
    config = ModelConfig(
        **{**SMALL, "num_nextn_predict_layers": depths, "vocab_size": data.draw(st.sampled_from([64, 4096]))}
        | {"num_hidden_layers": stages + extra, "first_k_dense_replace": dense, "intermediate_size": 1024}
    )
    costs, ends = layer_costs(config)

    def costliest(split):
        sums = [sum(costs[number] for number in layers) for layers in split]
        sums[-1] += ends
        return max(sums)

    chosen = split_layers(config, stages)
    assert [number for layers in chosen for number in layers] == list(range(config.num_hidden_layers))
    cuts = itertools.combinations(range(1, config.num_hidden_layers), stages - 1)
    borders = [[0, *cut, config.num_hidden_layers] for cut in cuts]
    assert costliest(chosen) == min(costliest([range(*pair) for pair in itertools.pairwise(each)]) for each in borders)


def test_deepseek_v3_puts_four_layers_on_a_stage_and_fewer_on_the_last():
    """DeepSeek's trace shows four MoE layers in a chunk; the last stage has the head and MTP besides."""
    assert [len(layers) for layers in split_layers(model_of("v3"), 16)] == [4] * 15 + [1]


@pytest.mark.parametrize(
    ("given_layers", "count", "message"),
    [
        (None, 6, "model.num_hidden_layers=5: expected at least one layer for each of 6 stages"),
        ([3, 3], 2, "add up to 6"),
        ([5, 0], 2, "at least 1"),
        ([3, 2], 3, "expected 3 numbers"),
    ],
)
def test_layers_that_do_not_fit_are_refused(given_layers, count, message):
    with pytest.raises(UserError, match=message):
        split_layers(ModelConfig(**SMALL), count, given_layers)


# ---------------------------------------------------------------- initial values
@cache
def initial(layers, first=0, local=16, seed=7):
    """{name: values} of all stages that `layers` (numbers of them) makes, with some of the experts."""
    config, numerics = ModelConfig(**SMALL), Numerics("fp32")
    stages = build(
        config,
        numerics,
        LocalExperts(16),
        range(len(layers)),
        split_layers(config, len(layers), layers),
        (first, local),
    )
    found = {}
    for stage in stages.values():
        initialise(stage, seed, 0.006)
        found |= {name: parameter.detach() for name, parameter in stage.named_parameters()}
    return found


@pytest.mark.parametrize("layers", [(3, 2), (1, 1, 1, 1, 1)])
def test_initial_values_do_not_depend_on_the_stages(layers):
    whole, split = initial((5,)), initial(layers)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


@pytest.mark.parametrize("local", [8, 4, 1])
def test_an_expert_starts_alike_wherever_it_lives(local):
    whole = initial((5,))
    for first in range(0, 16, local):
        for name, values in initial((5,), first, local).items():
            expected = whole[name][first : first + local] if ".mlp.experts." in name else whole[name]
            assert torch.equal(values, expected), name


def test_every_parameter_starts_differently_and_with_every_seed():
    one, other = initial((5,)), initial((5,), seed=8)
    matrices = {name: values for name, values in one.items() if values.dim() > 1}
    starts = {tuple(values.flatten()[:8].tolist()) for values in matrices.values()}
    assert len(starts) == len(matrices)
    assert not any(torch.equal(values, other[name]) for name, values in matrices.items())
    experts = one["model.layers.1.mlp.experts.gate_up_proj"]
    assert len({tuple(expert.flatten()[:8].tolist()) for expert in experts}) == 16


def test_matrices_are_normal_with_the_reports_deviation_and_gains_are_one():
    for name, values in initial((5,)).items():
        if values.dim() == 1:
            assert torch.equal(values, torch.ones_like(values)), name
        else:
            spread = 0.006 / values.numel() ** 0.5
            assert abs(values.mean()) < 5 * spread, name
            assert abs(values.std() - 0.006) < 5 * spread, name
            assert abs((values.abs() < 0.006).double().mean() - 0.6827) < 5 * 0.5 / values.numel() ** 0.5, name


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_initial_values_are_those_of_fp32_rounded(precision):
    config, numerics = ModelConfig(**SMALL), Numerics(precision)
    (stage,) = build(config, numerics, LocalExperts(16), [0], [range(5)], (0, 16)).values()
    initialise(stage, 7, 0.006)
    for name, values in initial((5,)).items():
        assert torch.equal(stage.get_parameter(name).detach(), values.to(numerics.dtype)), name
