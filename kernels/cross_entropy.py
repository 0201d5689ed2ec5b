"""Cross-entropy that needs no memory for its gradient: backward turns the kept log-probabilities into it.

Logits are the largest tensors of a step, and PyTorch's own backward makes two more of their size.

Legend: `T` tokens, `V` vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.ops import Cost, op, size


@op(
    cost=lambda logits_TV, targets_T: Cost(4 * logits_TV.numel(), 2 * size(logits_TV) + size(targets_T)),
    fake=lambda logits_TV, targets_T: (logits_TV.new_empty(()), torch.empty_like(logits_TV)),
)
def cross_entropy_forward(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over tokens of -log p(target), and all log p."""
    log_p = logits_TV.log_softmax(-1)
    return -log_p.gather(1, targets_T.unsqueeze(1)).sum(), log_p


@op(
    cost=lambda log_p_TV, targets_T, d_loss: Cost(2 * log_p_TV.numel(), 2 * size(log_p_TV) + size(targets_T)),
    fake=lambda log_p_TV, targets_T, d_loss: None,
    mutates=("log_p_TV",),
)
def cross_entropy_backward(log_p_TV: Tensor, targets_T: Tensor, d_loss: Tensor) -> None:
    """Replace log p by the gradient of the logits, (p - 1[target]) * d_loss."""
    log_p_TV.exp_().mul_(d_loss)
    log_p_TV.scatter_add_(1, targets_T.unsqueeze(1), -d_loss.expand(len(targets_T), 1))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, log_p = cross_entropy_forward(logits, targets)
        ctx.save_for_backward(log_p, targets)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        log_p, targets = ctx.saved_tensors
        cross_entropy_backward(log_p, targets, d_loss)
        return log_p, None


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """The sum over tokens of -log softmax(logits)[target], a scalar in the dtype of the logits [T, V]; targets int64.

    Its backward can run once.
    """
    return _CrossEntropy.apply(logits_TV, targets_T)
