"""The sizes of a DeepSeek-V3-class model, under the names of Hugging Face's `config.json`.

`ModelConfig` describes one architecture and checks itself; recipes only choose values. Sources: report section 4.2,
the released `config.json` (route scale, groups, dense width), and section 4.3 for YaRN.
"""

from dataclasses import dataclass

from parallel.errors import UserError


@dataclass
class RopeScaling:
    """YaRN context extension (report section 4.3): applied to the decoupled rotary part only."""

    factor: float = 40.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    original_max_position_embeddings: int = 4096


@dataclass
class ModelConfig:
    """One architecture. Widths in elements, counts in units; `q_lora_rank` null means no query compression."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.006

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without positions and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` routes to experts; MTP modules, numbered after the last layer, always do."""
        return layer >= self.first_k_dense_replace or layer >= self.num_hidden_layers

    def check(self) -> None:
        """Raise `UserError` naming the first size that cannot work."""
        at_least = {
            1: (
                *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
                *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"),
                *("n_routed_experts", "n_group", "max_position_embeddings"),
            ),
            0: ("first_k_dense_replace", "qk_rope_head_dim", "n_shared_experts", "num_nextn_predict_layers"),
        }
        for minimum, names in at_least.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and value < minimum:
                    raise UserError(f"model.{name}={value}: expected at least {minimum}")
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)}: expected above 0")
        if self.qk_rope_head_dim % 2:
            raise UserError(f"model.qk_rope_head_dim={self.qk_rope_head_dim}: expected an even number (rotary pairs)")
        if self.n_routed_experts % self.n_group:
            raise UserError(
                f"model.n_group={self.n_group}: expected a divisor of model.n_routed_experts={self.n_routed_experts}"
            )
        per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and per_group < 2:
            raise UserError(
                f"model.n_group={self.n_group}: {self.n_routed_experts} experts / {self.n_group} groups = {per_group}; "
                "expected at least 2 experts in a group (a group's score is the sum of its two best)"
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise UserError(f"model.topk_group={self.topk_group}: expected 1 to model.n_group={self.n_group}")
        if not 1 <= self.num_experts_per_tok <= self.topk_group * per_group:
            raise UserError(
                f"model.num_experts_per_tok={self.num_experts_per_tok}: expected 1 to {self.topk_group * per_group} "
                f"(model.topk_group={self.topk_group} groups of {per_group} experts)"
            )
