"""Multi-head latent attention (report section 2.1.1, equations 1 to 11).

B sequences, T tokens, D model width, H heads; a head's query and key have a part without positions (nope) and a rotary
part (rope), the key's rotary part being one for all heads. Queries, and keys with values, come from low-rank latents
that are normed (the norms are in section 4.2 and in the released weights, not in the equations).
"""

import torch
from torch import Tensor, nn

from kernels.attention import causal_attention
from kernels.linear import Numerics
from kernels.rope import mla_heads
from train.model.config import ModelConfig
from train.model.parts import Linear, Norm, together
from train.model.rope import rotation, softmax_scale


class Attention(nn.Module):
    """MLA of one layer; causal, without a mask between packed documents (report section 4.1)."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, heads * config.qk_head_dim, numerics)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, numerics)
            self.q_a_layernorm = Norm(config.q_lora_rank, eps, numerics)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, numerics, recompute="mla_up")
        self.kv_a_proj_with_mqa = Linear(width, config.kv_lora_rank + config.qk_rope_head_dim, numerics)
        self.kv_a_layernorm = Norm(config.kv_lora_rank, eps, numerics)
        up = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config.kv_lora_rank, up, numerics, recompute="mla_up")
        self.o_proj = Linear(heads * config.v_head_dim, width, numerics, power_of_two=True)
        self._rotation: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        config = self.config
        heads, nope, rope, value = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        if config.q_lora_rank is None:
            q, latent = together(x_BTD, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            q_latent, latent = together(x_BTD, self.q_a_proj, self.kv_a_proj_with_mqa)
            q = self.q_b_proj(self.q_a_layernorm(q_latent))
        kv_latent, k_rope = (part.contiguous() for part in latent.split([config.kv_lora_rank, rope], -1))
        kv = self.kv_b_proj(self.kv_a_layernorm(kv_latent))

        cos, sin = self._angles(x_BTD.shape[1], x_BTD.device)
        parts = q.unflatten(-1, (heads, nope + rope)), kv.unflatten(-1, (heads, nope + value)), k_rope
        q_BHTd, k_BHTd, v_BHTv = self.numerics.recompute("mla_up", mla_heads, *parts, cos, sin)
        scale = softmax_scale(config, x_BTD.shape[1])
        recompute, heads_of = self.numerics.recompute, (q_BHTd, k_BHTd, v_BHTv)
        out_BTHv = recompute.kept_as("attention output", causal_attention, *heads_of, scale, dimensions=2)
        return self.o_proj(recompute.after(torch.flatten, out_BTHv, -2))

    def _angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `length` positions, computed once."""
        key = length, device
        if key not in self._rotation:
            self._rotation[key] = rotation(self.config, length, self.numerics.wide, device)
        return self._rotation[key]
