"""Multi-token prediction (report section 2.2, equations 21 to 25).

Module k (k = 1 .. D) predicts token i+1+k from position i: it joins the state of depth k-1 with the embedding of token
i+k and runs one more MoE layer on the T-k positions for which both exist. States chain from depth to depth; depth 0 is
the main model after its final norm. Embedding and output head are the main model's own.
"""

import torch
from torch import Tensor

from kernels.linear import Numerics
from parallel.experts import Dispatcher
from parallel.passes import Local, Microbatch, Segment
from train.model.config import ModelConfig
from train.model.head import Embedding, scoring
from train.model.layer import Layer
from train.model.parts import Linear, Norm


def _side_by_side(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -1)


class SharedHead(torch.nn.Module):
    """The norm that a module puts before the shared output head."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, numerics)


class MTPModule(Layer):
    """One prediction depth: a MoE layer, numbered after the model's last, with norms and a joining projection."""

    def __init__(self, config: ModelConfig, depth: int, numerics: Numerics, first: int, local: int) -> None:
        """depth counts from 1."""
        super().__init__(config, config.num_hidden_layers + depth - 1, numerics, first, local)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.depth = depth
        self.enorm = Norm(width, eps, numerics)
        self.hnorm = Norm(width, eps, numerics)
        self.eh_proj = Linear(2 * width, width, numerics, fp8=False)
        self.shared_head = SharedHead(config, numerics)

    def chain(self, dispatcher: Dispatcher, embed: Embedding, head: Linear) -> list[Segment]:
        """The segments of this depth, from the `final` state of the depth before to its own."""

        def join(batch: Microbatch, final: Tensor) -> tuple[Tensor]:
            assert batch.tokens is not None
            ahead = self.enorm(embed(batch.tokens[:, self.depth : -1]))
            state = self.hnorm(final[:, :-1].contiguous())
            joined = self.numerics.recompute.after(_side_by_side, ahead, state)
            return (self.eh_proj(joined),)  # embedding first, as in the released weights

        first = Local("join", self.number, self.numerics.recompute.segment(join), ("final",), ("hidden",))
        return [first, *self.segments(dispatcher), scoring(self.number, self.shared_head.norm, head, self.depth)]
