"""A transformer layer, and the segments that a pass walks through.

A dense layer is one segment. A MoE layer is cut where tokens leave for their experts and where they come back:
attention | dispatch | experts | combine, then the residual sum. Between segments travel, by name:

    hidden    residual stream [B, T, D]          normed        what router, experts and shared expert read [B, T, D]
    weights   routing weights [T, K]             experts       chosen experts [T, K]
    rows, row_weights, layout                    what dispatch brought to this rank's experts
    out_rows  the experts' results               routed, shared  what the residual stream takes up [B, T, D]
"""

from typing import Any

from torch import Tensor, nn

from kernels.linear import Numerics
from parallel.experts import Combine, Dispatch, Dispatcher, Layout
from parallel.passes import Local, Microbatch, Segment, Sum
from train.model.attention import Attention
from train.model.config import ModelConfig
from train.model.moe import MoE
from train.model.parts import Norm, SwiGLU
from train.model.router import balance_loss


class Layer(nn.Module):
    """Layer `number` (counted over the whole model): attention, then a dense or a MoE feed-forward network."""

    def __init__(self, config: ModelConfig, number: int, numerics: Numerics, first: int, local: int) -> None:
        """first, local: the consecutive experts that this rank holds."""
        super().__init__()
        self.config, self.number, self.numerics = config, number, numerics
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps, numerics)
        self.self_attn = Attention(config, numerics)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps, numerics)
        self.mlp: MoE | SwiGLU = (
            MoE(config, numerics, first, local)
            if config.is_moe(number)
            else SwiGLU(config.hidden_size, config.intermediate_size, numerics)
        )

    def segments(self, dispatcher: Dispatcher) -> list[Segment]:
        """What forward and backward walk through."""
        layer = self.numerics.recompute.layer
        if isinstance(self.mlp, SwiGLU):
            return [Local("dense", self.number, layer(self._dense), ("hidden",), ("hidden",))]
        made = ("hidden", "normed", "weights", "experts")
        results = ("out_rows", "shared") if self.mlp.shared_experts else ("out_rows",)
        summed = ("hidden", "shared", "routed") if self.mlp.shared_experts else ("hidden", "routed")
        rows = ("rows", "row_weights", "layout", "normed")
        return [
            Local("attention", self.number, self._attention, ("hidden",), made, ("balance_loss",)),
            Dispatch(dispatcher, self.number),
            Local("experts", self.number, layer(self._experts), rows, results, lets_go=True),
            Combine(dispatcher, self.number),
            Sum("residual", self.number, summed, ("hidden",)),
        ]

    def _attend(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden, self.post_attention_layernorm(hidden)

    def _look(self, batch: Microbatch) -> None:
        """Of each step that is looked at, `fp8_health` sees the first micro-batch."""
        self.numerics.health.look(self.number if batch.training and batch.index == 0 else None)

    def _dense(self, batch: Microbatch, hidden: Tensor) -> tuple[Tensor]:
        self._look(batch)
        hidden, normed = self._attend(hidden)
        return (hidden + self.mlp(normed),)

    def _attention(self, batch: Microbatch, hidden: Tensor) -> tuple[Any, ...]:
        assert isinstance(self.mlp, MoE)
        router = self.mlp.gate
        chosen: list[Tensor] = []

        def run(hidden: Tensor) -> tuple[Any, ...]:
            self._look(batch)
            hidden, normed = self._attend(hidden)
            weights_TK, scores_TE, experts_TK = router(normed.flatten(0, 1), *chosen)
            chosen[:] = [experts_TK]  # if all this is run again, nothing is routed again
            balance = balance_loss(scores_TE.unflatten(0, normed.shape[:2]), self.config.num_experts_per_tok)
            return hidden, normed, weights_TK, experts_TK, balance

        results = self.numerics.recompute.layer(run)(hidden)
        if batch.training:
            router.count(*chosen)
        return results

    def _experts(self, batch: Microbatch, rows: Tensor, row_weights: Tensor, layout: Layout, normed: Tensor) -> Any:
        assert isinstance(self.mlp, MoE)
        self._look(batch)
        out_rows = self.mlp.experts(rows, row_weights, layout.counts)
        return (out_rows, self.mlp.shared_experts(normed)) if self.mlp.shared_experts else (out_rows,)
