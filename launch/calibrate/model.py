"""Small models of weft's own layers, and micro-batches through them: what a calibration times."""

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist

from kernels.linear import Numerics, attach_main_grads
from parallel.experts.all_to_all import AllToAll
from parallel.experts.local import LocalExperts
from parallel.passes import Microbatch, Tape, backward, forward, merge
from train.model.config import ModelConfig
from train.model.init import initialise
from train.model.stage import build

Sizes = tuple[int, int, int, int]  # width, tokens, experts, vocabulary
LOSSES = "loss", "mtp_loss", "balance_loss"


def config(width: int, tokens: int, experts: int, vocabulary: int) -> ModelConfig:
    """A dense layer, one with experts, and an MTP module."""
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        moe_intermediate_size=max(128, width // 256 * 128),
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=max(2, width // 64),
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=experts,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        max_position_embeddings=tokens,
    )


class Model:
    """A stage of one small model, and micro-batches through it."""

    def __init__(
        self, precision: str, sizes: Sizes, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        """precision: as in a recipe. sizes: width, tokens, experts, vocabulary. group: has the experts; this rank has
        all of them unless told."""
        self.config, self.tokens, self.device = config(*sizes), sizes[1], device
        backend = "auto" if precision == "fp8" and device.type == "cuda" else "reference"
        self.numerics = Numerics(precision, backend)
        experts = self.config.n_routed_experts
        self.dispatcher: LocalExperts | AllToAll = LocalExperts(experts, self.numerics.row_align)
        held = 0, experts
        if group is not None:
            align, each = self.numerics.row_align, experts // group.size()
            self.dispatcher = AllToAll(experts, group, fp8=precision == "fp8", align=align)
            held = group.rank() * each, each
        with torch.device(device):
            self.stage = build(self.config, self.numerics, self.dispatcher, (0,), [range(2)], held)[0]
        with torch.no_grad():
            initialise(self.stage, 0, self.config.initializer_range)
        attach_main_grads(self.stage, self.numerics.main_grad_dtype)
        self.ids = torch.randint(self.config.vocab_size, (1, self.tokens + 1), device=device)

    def run(self, within: AbstractContextManager[Any]) -> None:
        """Forward, backward and weight gradients of one micro-batch; weights are quantised anew."""
        self.numerics.bump()
        shape, tape = (1, self.tokens, self.config.hidden_size), cast(Tape, [])
        batch = Microbatch(0, self.ids, shape, dict.fromkeys(LOSSES, 1.0))
        with within:
            merge(forward(self.stage, None, batch, tape))
            merge(backward(self.stage, None, batch, tape, self.numerics.weight_grads, split=False))
            self.numerics.weight_grads.run()
