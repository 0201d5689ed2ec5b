"""Schedules give the report's numbers at the report's tokens; AdamW equals torch's fused one."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import UserError
from train.optim import CHUNK, AdamW16, LRConfig, OptimConfig, batch_size, learning_rate, piecewise

T, B = 1e12, 1e9
# Report section 4.2; a step of the ramp's start is 3072 sequences of 4096 tokens.
REPORT = LRConfig(
    peak=2.2e-4,
    warmup_tokens=2000 * 3072 * 4096,
    constant_until=10 * T,
    cosine_tokens=4.3 * T,
    end=2.2e-5,
    tails=[[14.3 * T, 2.2e-5], [14.633 * T, 7.3e-6]],
)
RAMP = SimpleNamespace(start=3072, end=15360, ramp_tokens=469 * B, multiple_of=128)


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (0, 0),
        (1000 * 3072 * 4096, 1.1e-4),
        (2000 * 3072 * 4096, 2.2e-4),
        (5 * T, 2.2e-4),
        (10 * T, 2.2e-4),
        (12.15 * T, (2.2e-4 + 2.2e-5) / 2),
        (10 * T + 4.3 * T / 3, 2.2e-5 + 0.75 * (2.2e-4 - 2.2e-5)),
        (14.3 * T, 2.2e-5),
        (14.5 * T, 2.2e-5),
        (14.633 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_learning_rate_is_the_reports(tokens, expected):
    assert learning_rate(REPORT, tokens) == pytest.approx(expected, rel=1e-12)


@given(st.floats(0, 14.29 * T), st.floats(0, B))
def test_learning_rate_has_no_jumps_before_the_tails(tokens, more):
    slope = max(2.2e-4 / REPORT.warmup_tokens, math.pi / 2 * 2.2e-4 / REPORT.cosine_tokens)
    assert abs(learning_rate(REPORT, tokens + more) - learning_rate(REPORT, tokens)) <= slope * more + 1e-15


def test_a_learning_rate_without_schedule_is_constant_then_end():
    config = LRConfig(peak=1e-3, constant_until=100, end=1e-4)
    assert [learning_rate(config, tokens) for tokens in (0, 99, 100, 10**9)] == [1e-3, 1e-3, 1e-4, 1e-4]


def test_batch_grows_from_3072_to_15360_sequences_over_469_billion_tokens():
    assert batch_size(RAMP, 0) == 3072
    assert batch_size(RAMP, 469 * B / 2) == (3072 + 15360) // 2
    assert batch_size(RAMP, 469 * B - 1) == 15360 - 128
    assert batch_size(RAMP, 469 * B) == batch_size(RAMP, 14.8 * T) == 15360
    assert 15360 * 4096 == 62_914_560, "tokens of a full step"


@given(st.integers(0, 600 * 10**9), st.integers(0, 10**9))
def test_batch_is_a_multiple_and_never_shrinks(tokens, more):
    sizes = batch_size(RAMP, tokens), batch_size(RAMP, tokens + more)
    assert all(size % 128 == 0 and 3072 <= size <= 15360 for size in sizes)
    assert sizes[0] <= sizes[1]


def test_a_batch_without_ramp_is_its_end_at_once():
    assert batch_size(SimpleNamespace(start=8, end=16, ramp_tokens=0, multiple_of=8), 0) == 16


@pytest.mark.parametrize(
    "schedule, tokens, expected",
    [
        ([[0, 0.3], [10 * T, 0.1]], 0, 0.3),
        ([[0, 0.3], [10 * T, 0.1]], 10 * T - 1, 0.3),
        ([[0, 0.3], [10 * T, 0.1]], 10 * T, 0.1),
        ([[0, 0.001], [14.3 * T, 0]], 14.3 * T - 1, 0.001),
        ([[0, 0.001], [14.3 * T, 0]], 14.8 * T, 0),
    ],
)
def test_mtp_weight_and_bias_speed_change_when_the_report_says(schedule, tokens, expected):
    assert piecewise(schedule, tokens) == expected


SHAPES = [(37, 19), (41,), (2, 3, 5), (300, CHUNK["cpu"] // 256)]  # the last one in two chunks


def shapes_and_gradients(steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    gradients = [[torch.randn(p.shape, generator=generator, dtype=dtype) for p in parameters] for _ in range(steps)]
    return parameters, gradients


def torchs(parameters, lr):
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_with_wide_moments_is_torchs_bit_for_bit(dtype):
    values, gradients = shapes_and_gradients(steps=5, dtype=dtype)
    ours, theirs = [[v.clone().requires_grad_() for v in values] for _ in range(2)]
    our_adamw, their_adamw = AdamW16(ours, lr=1e-2, moments=dtype), torchs(theirs, lr=1e-2)
    for step in gradients:
        for mine, other, gradient in zip(ours, theirs, step, strict=True):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        our_adamw.step()
        their_adamw.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_adamw_rounds_only_what_it_stores():
    values, gradients = shapes_and_gradients(steps=5)
    ours = [v.clone().requires_grad_() for v in values]
    adamw = AdamW16(ours, lr=1e-2)
    adamw.start()
    for number, step in enumerate(gradients):
        theirs = [p.detach().clone().requires_grad_() for p in ours]
        judge = torchs(theirs, lr=1e-2)
        for mine, other, gradient in zip(ours, theirs, step, strict=True):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
            moments = {key: adamw.state[mine][key].float() for key in ("exp_avg", "exp_avg_sq")}
            judge.state[other] = {"step": torch.tensor(float(number)), **moments}
        adamw.step()
        judge.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), "the update takes the moments before they are rounded"
            for key in ("exp_avg", "exp_avg_sq"):
                assert adamw.state[mine][key].dtype == torch.bfloat16
                assert torch.equal(adamw.state[mine][key], judge.state[other][key].bfloat16())


def test_a_flat_shard_equals_its_parameters_wherever_it_is_cut():
    values, gradients = shapes_and_gradients(steps=3)
    apart = [v.clone().requires_grad_() for v in values]
    whole = torch.cat([v.flatten() for v in values])
    cut = 37 * 19 + 5  # inside the vector, which does not decay
    shards = [whole[:cut].clone().requires_grad_(), whole[cut:].clone().requires_grad_()]
    decayed = [[shards[0].detach()[: 37 * 19]], [shards[1].detach()[41 - 5 :]]]
    ours = AdamW16(apart, lr=1e-2)
    flat = AdamW16([{"params": [s], "decayed": parts} for s, parts in zip(shards, decayed, strict=True)], lr=1e-2)
    for step in gradients:
        for parameter, gradient in zip(apart, step, strict=True):
            parameter.grad = gradient
        joined = torch.cat([gradient.flatten() for gradient in step])
        shards[0].grad, shards[1].grad = joined[:cut].clone(), joined[cut:].clone()
        ours.step()
        flat.step()
    assert torch.equal(torch.cat(shards), torch.cat([p.flatten() for p in apart]))


@pytest.mark.parametrize(
    "config, message",
    [
        (OptimConfig(moments="fp16"), r"optim\.moments=fp16: expected one of bf16, fp32"),
        (OptimConfig(betas=[0.9]), r"optim\.betas=\[0\.9\]: expected two"),
        (OptimConfig(betas=[0.9, 1.0]), r"optim\.betas"),
        (OptimConfig(clip=0), r"optim\.clip=0: expected above 0"),
        (OptimConfig(weight_decay=-0.1), r"optim\.weight_decay=-0\.1"),
        (OptimConfig(lr=LRConfig(peak=-1)), r"optim\.lr\.peak=-1: expected at least 0"),
        (OptimConfig(lr=LRConfig(warmup_tokens=10, constant_until=5)), r"constant_until=5.*warmup_tokens=10"),
        (
            OptimConfig(lr=LRConfig(constant_until=10, tails=[[5, 1e-5]])),
            r"optim\.lr\.tails=\[\[5, 1e-05\]\].* = 10 on",
        ),
        (OptimConfig(lr=LRConfig(tails=[[9, 1e-5], [5, 1e-6]])), r"optim\.lr\.tails.*ascending"),
    ],
)
def test_a_setting_that_cannot_work_is_named(config, message):
    OptimConfig().check()
    with pytest.raises(UserError, match=message):
        config.check()
