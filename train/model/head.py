"""The two ends of the model: token embedding, and final norm with output head and cross-entropy.

The head of MTP module k is the same with other targets: from position i, token i+1+k (report section 2.2).
"""

import torch
from torch import Tensor, nn

from kernels.cross_entropy import cross_entropy
from kernels.linear import Numerics, embedding
from parallel.passes import Local, Microbatch, Segment
from train.model.config import ModelConfig
from train.model.parts import Linear, Norm


class Embedding(nn.Module):
    """The token table [vocabulary, D]; never FP8."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=numerics.dtype))
        self.numerics = numerics

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] int64 to [B, T, D]."""
        return embedding(tokens_BT, self.weight, self.numerics)

    def segment(self) -> Segment:
        """The first segment of the first stage."""
        return Local("embedding", -1, lambda batch: (self(batch.tokens[:, :-1]),), (), ("hidden",))


def output_head(config: ModelConfig, numerics: Numerics) -> Linear:
    """The output projection [vocabulary, D]: never FP8, logits in the wide dtype."""
    return Linear(config.hidden_size, config.vocab_size, numerics, fp8=False, wide_out=True)


def scoring(layer: int, norm: Norm, head: Linear, depth: int) -> Segment:
    """The segment that norms `hidden` [B, T-depth, D] into `final` and sums the cross-entropy of what it predicts."""

    def run(batch: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        assert batch.tokens is not None
        final = norm(hidden)
        logits = head(final)
        loss = cross_entropy(logits.flatten(0, 1), batch.tokens[:, depth + 1 :].flatten())
        return final, loss

    losses = ("mtp_loss" if depth else "loss",)
    return Local("head", layer, norm.recompute.segment(run), ("hidden",), ("final",), losses)
