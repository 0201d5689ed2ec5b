"""The router against a slow reading of the report, token by token; the bias; the balance loss.

T tokens, E experts, K chosen experts, B sequences.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.linear import Numerics
from train.model.config import ModelConfig
from train.model.router import Router, balance_loss, max_violation


def router_of(groups, per_group, kept, chosen, width=6, **changes):
    """A router in FP64 with random weights."""
    config = ModelConfig(
        hidden_size=width,
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=chosen,
    )
    router = Router(dataclasses.replace(config, **changes), Numerics("fp64"))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(groups * 100 + chosen))
    return router


@st.composite
def shapes(draw):
    """(groups, experts in a group, groups kept, experts chosen)."""
    groups = draw(st.integers(1, 5))
    per_group = draw(st.integers(2 if groups > 1 else 1, 6))
    kept = draw(st.integers(1, groups))
    return groups, per_group, kept, draw(st.integers(1, kept * per_group))


def choose_slowly(biased, groups, kept, chosen):
    """The report's order for one token: groups by their two best, then the best experts of the groups that stay."""
    per_group = len(biased) // groups
    members = [range(group * per_group, (group + 1) * per_group) for group in range(groups)]
    score = {group: sum(sorted((biased[e] for e in members[group]), reverse=True)[:2]) for group in range(groups)}
    stay = sorted(score, key=lambda group: score[group], reverse=True)[:kept]
    allowed = [expert for group in stay for expert in members[group]]
    return sorted(allowed, key=lambda expert: biased[expert], reverse=True)[:chosen]


@given(shapes(), st.integers(0, 2**32), st.floats(0, 3))
def test_a_token_goes_where_a_slow_reading_of_the_report_sends_it(shape, seed, spread):
    groups, per_group, kept, chosen = shape
    generator = torch.Generator().manual_seed(seed)
    router = router_of(*shape)
    bias = router.e_score_correction_bias.copy_(torch.randn(groups * per_group, generator=generator) * spread)
    x = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    weights, scores, experts = router(x)
    for t in range(len(x)):
        logits = [math.fsum(a * b for a, b in zip(row, x[t].tolist(), strict=True)) for row in router.weight.tolist()]
        slow = [1 / (1 + math.exp(-logit)) for logit in logits]
        picked = choose_slowly([s + b for s, b in zip(slow, bias.tolist(), strict=True)], groups, kept, chosen)
        assert experts[t].tolist() == picked
        assert scores[t].tolist() == pytest.approx(slow, rel=1e-12)
        total = sum(slow[expert] for expert in picked)
        assert weights[t].tolist() == pytest.approx([2.5 * slow[expert] / total for expert in picked], rel=1e-12)


def test_an_expert_of_a_group_left_out_never_wins_even_when_all_biased_affinities_are_negative():
    router = router_of(2, 3, 1, 3)
    router.e_score_correction_bias.fill_(-10.0)
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.5, 0.4, 0.6]], dtype=torch.float64)  # 1.0 against 1.1
    assert router.choose(scores).tolist() == [[5, 3, 4]]


def test_a_group_counts_by_its_two_best_not_by_its_best():
    router = router_of(2, 3, 1, 1)
    assert router.choose(torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.5, 0.0]])).tolist() == [[3]]


def test_the_bias_selects_and_does_nothing_else():
    router = router_of(2, 4, 2, 3)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, plain_scores, plain_experts = router(x)
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 9, 0, 9, 0, 9, 0, 0]))
    weights, scores, experts = router(x)
    assert torch.equal(scores, plain_scores)
    assert all(set(row) == {1, 3, 5} for row in experts.tolist()) and not torch.equal(experts, plain_experts)
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(weights, 2.5 * chosen / chosen.sum(1, keepdim=True))
    router.e_score_correction_bias.add_(4.0)  # the same for all: nothing changes
    assert torch.equal(router(x)[0], weights)
    assert not router.e_score_correction_bias.requires_grad


def test_affinities_need_not_be_normalised():
    router = router_of(1, 4, 1, 2, norm_topk_prob=False, routed_scaling_factor=1.0)
    weights, scores, experts = router(torch.ones(3, 6, dtype=torch.float64))
    assert torch.equal(weights, scores.gather(1, experts))


# ---------------------------------------------------------------- force-balanced
def go_round_slowly(tokens, groups, per_group, kept, chosen):
    """Token by token: from group t mod G on, `kept` groups give an expert each in turn, each group its next."""
    given, routing = [0] * groups, []
    for token in range(tokens):
        takers = [(token + turn % kept) % groups for turn in range(chosen)]
        routing.append([])
        for group in takers:
            routing[-1].append(group * per_group + given[group] % per_group)
            given[group] += 1
    return routing


@given(shapes(), st.integers(0, 70))
def test_force_balanced_tokens_go_round_all_experts(shape, tokens):
    groups, per_group, kept, chosen = shape
    router, experts = router_of(*shape), groups * per_group
    routing = router.go_round(torch.zeros(tokens, experts)).tolist()
    assert routing == go_round_slowly(tokens, *shape)
    assert all(len(set(row)) == chosen and len({e // per_group for e in row}) == min(kept, chosen) for row in routing)
    if tokens % groups == 0 and tokens * chosen % experts == 0:
        counts = [sum(expert in row for row in routing) for expert in range(experts)]
        assert set(counts) == {tokens * chosen // experts}


def test_force_balanced_weights_are_the_real_affinities_of_the_chosen():
    router = router_of(2, 4, 2, 3)
    router.force_balanced = True
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights, scores, experts = router(x)
    assert torch.equal(scores, (x @ router.weight.T).sigmoid())
    assert torch.bincount(experts.flatten()).tolist() == [3] * 8
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(weights, 2.5 * chosen / chosen.sum(1, keepdim=True))


# ---------------------------------------------------------------- balance
def test_a_bias_moves_by_the_sign_of_what_its_expert_lacks():
    router = router_of(1, 4, 1, 2)
    router.e_score_correction_bias.copy_(torch.tensor([0.5, 0.0, -0.5, 0.25]))
    router.balance(torch.tensor([7.0, 4.0, 0.0, 5.0], dtype=torch.float64), 0.001)  # mean 4
    moved = router.e_score_correction_bias - torch.tensor([0.5, 0.0, -0.5, 0.25])
    torch.testing.assert_close(moved, torch.tensor([-0.001, 0.0, 0.001, -0.001]), rtol=0, atol=1e-7)
    before = router.e_score_correction_bias.clone()
    router.balance(torch.tensor([9.0, 0, 0, 0]), 0.0)
    router.balance(torch.full((4,), 3.0), 0.001)
    assert torch.equal(router.e_score_correction_bias, before), "no speed, or nothing to mend"


def test_loads_of_microbatches_add_up():
    router = router_of(1, 4, 1, 2)
    router.count(torch.tensor([[0, 1], [0, 3]]))
    router.count(torch.tensor([[0, 3]]))
    assert router.load.tolist() == [3, 1, 0, 2] and router.load.dtype == torch.int64


def test_violation_is_the_excess_of_the_fullest_expert():
    assert max_violation(torch.tensor([3.0, 1.0, 0.0, 4.0])) == pytest.approx(1.0)
    assert max_violation(torch.full((8,), 5)) == 0.0
    assert max_violation(torch.zeros(8)) == 0.0


def loss_slowly(scores, chosen):
    """Equations 17 to 20 for one sequence, without alpha; affinities are all different."""
    tokens, experts = len(scores), len(scores[0])
    best = [sorted(range(experts), key=lambda e: row[e], reverse=True)[:chosen] for row in scores]
    total = 0.0
    for expert in range(experts):
        f = experts / (chosen * tokens) * sum(expert in row for row in best)
        p = sum(row[expert] / sum(row) for row in scores) / tokens
        total += f * p
    return total


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.data())
def test_balance_loss_is_the_reports_summed_over_sequences(sequences, tokens, experts, data):
    chosen = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    scores = torch.rand(sequences, tokens, experts, dtype=torch.float64, generator=generator) + 0.01
    expected = sum(loss_slowly(sequence, chosen) for sequence in scores.tolist())
    assert balance_loss(scores, chosen).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (16, 4), (256, 8)])
def test_balance_loss_of_even_and_of_utterly_uneven_routing(experts, chosen):
    """1 a sequence where all experts are alike; E/K where all tokens give all their affinity to the same K."""
    even = torch.full((2, 32, experts), 0.5, dtype=torch.float64)
    assert balance_loss(even, chosen).item() == pytest.approx(2.0)
    uneven = torch.zeros(1, 32, experts, dtype=torch.float64)
    uneven[..., :chosen] = 0.7
    assert balance_loss(uneven, chosen).item() == pytest.approx(experts / chosen)


def test_the_gradient_of_the_balance_loss_flows_through_affinities_only():
    """f_i is a count. With it fixed, d(sum_i f_i P_i)/ds_tj = (f_j - sum_i f_i p_ti) / (T sum_i s_ti)."""
    scores = torch.rand(1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    balance_loss(scores, 2).backward()
    s = scores.detach()[0]
    f = torch.bincount(s.topk(2).indices.flatten(), minlength=4).double() * 4 / (2 * 5)
    total = s.sum(1, keepdim=True)
    expected = (f - (s / total * f).sum(1, keepdim=True)) / (5 * total)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[0], expected)
