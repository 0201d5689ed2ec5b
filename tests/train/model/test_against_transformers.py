"""Someone else agrees: logits, gradients and moments of transformers' DeepseekV3ForCausalLM, loaded by name."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from kernels.linear import Numerics, attach_main_grads
from parallel.experts import LocalExperts
from parallel.passes import Microbatch, Tape, backward, forward, merge
from parallel.zero import Bucket, ZeRO1
from tests.train.layouts import SMALL
from train.model.config import ModelConfig, RopeScaling
from train.model.stage import Stage, build, split_layers
from train.optim import AdamW16

YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "as tiny": {},
    "no query compression": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "many groups": {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 5},
    "no dense layers": {"first_k_dense_replace": 0},
    "only dense layers": {"first_k_dense_replace": 5},
    "two shared experts, odd widths": {"n_shared_experts": 2, "hidden_size": 72, "moe_intermediate_size": 20},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "YaRN beyond the original length": {"rope_scaling": {**YARN, "original_max_position_embeddings": 16}},
}


def theirs(config: ModelConfig, seed: int = 0) -> DeepseekV3ForCausalLM:
    """Transformers' model of the same sizes with random weights, biases and gains."""
    torch.manual_seed(seed)
    sizes = {key: value for key, value in vars(config).items() if key != "rope_scaling"}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "yarn", **vars(config.rope_scaling)}
    sizes |= {"num_key_value_heads": config.num_attention_heads, "rope_parameters": rope, "num_nextn_predict_layers": 0}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, attn_implementation="eager"))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.05)
            elif tensor.dim() == 1 and name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() > 1:
                tensor.normal_(std=0.08)
    return model


def sizes_of(name: str, **extra: Any) -> ModelConfig:
    """The small model with one of the odd settings, without MTP."""
    sizes = {**SMALL, "num_nextn_predict_layers": 0, **CONFIGS[name], **extra}
    if isinstance(sizes.get("rope_scaling"), dict):
        sizes["rope_scaling"] = RopeScaling(**sizes["rope_scaling"])
    return ModelConfig(**sizes)


def ours(config: ModelConfig) -> tuple[Stage, Numerics]:
    """The whole model as one FP32 stage, parameters unset."""
    numerics = Numerics("fp32")
    local = LocalExperts(config.n_routed_experts)
    layers, experts = split_layers(config, 1), (0, config.n_routed_experts)
    return build(config, numerics, local, [0], layers, experts)[0], numerics


def rows(config: ModelConfig) -> torch.Tensor:
    """Two sequences of 24 tokens and their successors."""
    return torch.randint(config.vocab_size, (2, 25), generator=torch.Generator().manual_seed(1))


def logits_of(stage: Stage, tokens: torch.Tensor) -> torch.Tensor:
    """What the head says before it is scored."""
    seen = []
    handle = stage.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    merge(forward(stage, None, Microbatch(0, tokens, training=False), []))
    handle.remove()
    return seen[0]


def step_gradients(stage: Stage, numerics: Numerics, batch: Microbatch) -> None:
    """One forward and backward; gradients land in `main_grad`."""
    tape: Tape = []
    merge(forward(stage, None, batch, tape))
    merge(backward(stage, None, batch, tape, numerics.weight_grads, split=False))
    numerics.weight_grads.run()


def loss_of(batch: Microbatch, name: str) -> float:
    """A raw loss sum of a micro-batch, over all layers that have one."""
    return sum(float(value) for (loss, _), value in batch.losses.items() if loss == name)


def assert_same_gradients(stage: Stage, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in stage.named_parameters():
        other = expected[name]
        assert other.norm() > 0, f"{name} has no gradient: the comparison would prove nothing"
        assert (parameter.main_grad - other).norm() <= 1e-4 * other.norm(), name


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name):
    config = sizes_of(name)
    judge, (stage, numerics), tokens = theirs(config), ours(config), rows(config)
    stage.load_state_dict(judge.state_dict(), strict=True)
    with torch.no_grad():
        expected = judge(tokens[:, :-1]).logits
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(logits_of(stage, tokens), expected, atol=1e-5, rtol=1e-5)

    loss = F.cross_entropy(judge(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    (loss / 48).backward()
    attach_main_grads(stage, torch.float32)
    batch = Microbatch(0, tokens, seeds={"loss": 1 / 48, "balance_loss": 0.0})
    step_gradients(stage, numerics, batch)
    assert loss_of(batch, "loss") == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(stage, {key: value.grad for key, value in judge.named_parameters()})


def test_weights_return_to_transformers_by_name():
    config = sizes_of("as tiny")
    judge, (stage, _), tokens = theirs(config), ours(config), rows(config)
    stage.load_state_dict(judge.state_dict(), strict=True)
    back = theirs(config, seed=1)
    back.load_state_dict(stage.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(back(tokens[:, :-1]).logits, judge(tokens[:, :-1]).logits)


def test_moments_after_a_step_equal_those_of_torch_adamw(workers):
    workers(1).run(compare_moments)


def compare_moments() -> None:
    """One clipped AdamW step on both sides."""
    config = sizes_of("as tiny")
    judge, (stage, numerics), tokens = theirs(config), ours(config), rows(config)
    stage.load_state_dict(judge.state_dict(), strict=True)
    group = dist.new_group([0])
    adamw = partial(AdamW16, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, moments=torch.float32)
    zero = ZeRO1([Bucket((0,), "dense", group, dict(stage.named_parameters()))], adamw, clip=0.5)
    attach_main_grads(stage, torch.float32)
    step_gradients(stage, numerics, Microbatch(0, tokens, seeds={"loss": 1 / 48, "balance_loss": 0.0}))
    zero.reduce_gradients()
    norm = zero.grad_norm()
    assert zero.step(1e-3, norm)

    loss = F.cross_entropy(judge(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    named = dict(judge.named_parameters())
    matrices, gains = ([p for p in named.values() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    expected = torch.nn.utils.clip_grad_norm_(judge.parameters(), 0.5)
    assert float(norm) == pytest.approx(float(expected), rel=1e-5) and expected > 0.5
    optimizer.step()
    state = zero.state_dict()
    for name, parameter in named.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            other = optimizer.state[parameter][moment].flatten()
            assert (state[moment][name].local - other).norm() <= 2e-4 * other.norm(), (name, moment)
        update = parameter.detach().flatten() - state["master"][name].local
        assert update.norm() <= 1e-4 * parameter.norm(), name


def test_mtp_equals_a_module_composed_from_transformers_parts():
    config = sizes_of("as tiny", num_nextn_predict_layers=2)
    judge, (stage, numerics), tokens = theirs(config), ours(config), rows(config)
    depths = [composed_depth(judge, config, seed) for seed in (1, 2)]
    weights = dict(judge.state_dict())
    for depth, module in enumerate(depths):
        weights |= {f"model.layers.{config.num_hidden_layers + depth}.{k}": v for k, v in module.state_dict().items()}
    stage.load_state_dict(weights, strict=True)

    length, losses = tokens.shape[1] - 1, []
    final = judge.model(tokens[:, :-1]).last_hidden_state
    for depth, module in enumerate(depths, 1):
        embedded = judge.model.embed_tokens(tokens[:, depth:length])
        joined = torch.cat([module.enorm(embedded), module.hnorm(final[:, :-1])], -1)
        hidden = module.eh_proj(joined)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        angles = judge.model.rotary_emb(hidden, positions)
        hidden = module(hidden, attention_mask=mask, position_ids=positions, position_embeddings=angles)
        final = module.shared_head.norm(hidden)
        targets = tokens[:, depth + 1 :].flatten()
        losses.append(F.cross_entropy(judge.lm_head(final).flatten(0, 1), targets, reduction="sum"))
    expected = sum(losses)
    (expected / 100).backward()

    attach_main_grads(stage, torch.float32)
    batch = Microbatch(0, tokens, seeds={"loss": 0.0, "mtp_loss": 1 / 100, "balance_loss": 0.0})
    step_gradients(stage, numerics, batch)
    assert loss_of(batch, "mtp_loss") == pytest.approx(expected.item(), rel=1e-5)
    gradients = {key: value.grad for key, value in judge.named_parameters()}
    for depth, module in enumerate(depths):
        prefix = f"model.layers.{config.num_hidden_layers + depth}."
        gradients |= {prefix + key: value.grad for key, value in module.named_parameters()}
    assert_same_gradients(stage, gradients)


def composed_depth(judge: DeepseekV3ForCausalLM, config: ModelConfig, seed: int) -> torch.nn.Module:
    """A MTP module under the released names: transformers' decoder layer and norms, a joining linear."""
    torch.manual_seed(seed)
    module = DeepseekV3DecoderLayer(judge.config, layer_idx=config.num_hidden_layers - 1)
    module.enorm, module.hnorm = (DeepseekV3RMSNorm(config.hidden_size) for _ in range(2))
    module.eh_proj = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
    module.shared_head = torch.nn.Module()
    module.shared_head.norm = DeepseekV3RMSNorm(config.hidden_size)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.08)
    return module
