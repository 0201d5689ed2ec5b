"""Multi-head latent attention (report section 2.1.1, equations 1 to 11).

B sequences, T tokens, D model width, H heads; a head's query and key have a part without positions (nope) and a rotary
part (rope), the key's rotary part being one for all heads. Queries, and keys with values, come from low-rank latents
that are normed (the norms are in section 4.2 and in the released weights, not in the equations).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear import Numerics
from train.model.config import ModelConfig
from train.model.parts import Linear, Norm, together
from train.model.rope import rotate, rotation, softmax_scale


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
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, numerics)
        self.kv_a_proj_with_mqa = Linear(width, config.kv_lora_rank + config.qk_rope_head_dim, numerics)
        self.kv_a_layernorm = Norm(config.kv_lora_rank, eps, numerics)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), numerics)
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
        kv_latent, k_rope = latent.split([config.kv_lora_rank, rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(kv_latent.contiguous()))

        cos, sin = self._angles(x_BTD.shape[1], x_BTD.device)
        q_nope, q_rope = q.unflatten(-1, (heads, nope + rope)).split([nope, rope], -1)
        k_nope, v_BTHv = kv.unflatten(-1, (heads, nope + value)).split([nope, value], -1)
        k_rope = rotate(k_rope.unsqueeze(-2), cos, sin).expand(-1, -1, heads, -1)
        q_BTHd = torch.cat([q_nope, rotate(q_rope, cos, sin)], -1)
        k_BTHd = torch.cat([k_nope, k_rope], -1)
        out_BHTv = F.scaled_dot_product_attention(
            q_BTHd.transpose(1, 2),
            k_BTHd.transpose(1, 2),
            v_BTHv.transpose(1, 2),
            is_causal=True,
            scale=softmax_scale(config, x_BTD.shape[1]),
        )
        return self.o_proj(out_BHTv.transpose(1, 2).flatten(-2))

    def _angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `length` positions, computed once."""
        key = length, device
        if key not in self._rotation:
            self._rotation[key] = rotation(self.config, length, self.numerics.wide, device)
        return self._rotation[key]
