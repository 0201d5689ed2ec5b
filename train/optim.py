"""AdamW with narrow moments, and everything that a schedule makes a function of tokens (report section 4.2).

Learning rate, batch size, bias speed and MTP weight are pure functions of the tokens consumed: nothing here remembers a
step, so that resuming, or another layout or batch size, continues where the tokens say. `AdamW16` moves the flat master
shards that `parallel/zero.py` hands it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from parallel.errors import UserError

MOMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that AdamW moves at a time: on a CPU they stay in a cache while moments are widened and narrowed again."""


@dataclass
class LRConfig:
    """Linear warm-up to `peak`, constant, cosine to `end`, then `tails`: [[tokens_from, learning rate], ...]."""

    peak: float = 2.2e-4
    warmup_tokens: float = 0
    constant_until: float = 0
    cosine_tokens: float = 0
    end: float = 2.2e-5
    tails: list[Any] = field(default_factory=list)  # rows of two numbers, whole ones too

    def check(self) -> None:
        """Raise `UserError` naming the first value that cannot work."""
        for name in ("peak", "warmup_tokens", "constant_until", "cosine_tokens", "end"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.lr.{name}={getattr(self, name)}: expected at least 0")
        if self.constant_until < self.warmup_tokens:
            raise UserError(
                f"optim.lr.constant_until={self.constant_until:g}: expected at least "
                f"optim.lr.warmup_tokens={self.warmup_tokens:g}"
            )
        begin = self.constant_until + self.cosine_tokens
        for tail in self.tails:
            if len(tail) != 2 or tail[0] < begin or tail[1] < 0:
                raise UserError(
                    f"optim.lr.tails={self.tails}: expected [[tokens_from, learning rate], ...] in ascending order, "
                    "from optim.lr.constant_until + optim.lr.cosine_tokens = "
                    f"{self.constant_until + self.cosine_tokens:g} on"
                )
            begin = tail[0]


@dataclass
class OptimConfig:
    """AdamW as the report sets it; epsilon is ours (1e-8). `moments`: bf16 or fp32."""

    lr: LRConfig = field(default_factory=LRConfig)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    moments: str = "bf16"
    ema_decay: float | None = None  # of the average of the parameters (`train/ema.py`); null: none is kept

    def check(self) -> None:
        """Raise `UserError` naming the first value that cannot work."""
        self.lr.check()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas}: expected two numbers from 0 to below 1")
        for name in ("eps", "clip"):
            if getattr(self, name) <= 0:
                raise UserError(f"optim.{name}={getattr(self, name)}: expected above 0")
        if self.weight_decay < 0:
            raise UserError(f"optim.weight_decay={self.weight_decay}: expected at least 0")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"optim.ema_decay={self.ema_decay}: expected null or a number between 0 and 1")
        if self.moments not in MOMENTS:
            raise UserError(f"optim.moments={self.moments}: expected one of {', '.join(MOMENTS)}")


class BatchRamp(Protocol):
    """The global batch in sequences: from `start` to `end` over `ramp_tokens`, in multiples of `multiple_of`."""

    start: int
    end: int
    ramp_tokens: int
    multiple_of: int


def learning_rate(config: LRConfig, tokens: float) -> float:
    """The learning rate at `tokens` consumed.

    Counted when a step ends, the first step of a warm-up moves; counted when it begins, it does not.
    """
    if tokens < config.warmup_tokens:
        return config.peak * tokens / config.warmup_tokens
    if tokens < config.constant_until:
        return config.peak
    if tokens < config.constant_until + config.cosine_tokens:
        progress = (tokens - config.constant_until) / config.cosine_tokens
        return config.end + (config.peak - config.end) * (1 + math.cos(math.pi * progress)) / 2
    return piecewise([[0, config.end], *config.tails], tokens)


def batch_size(config: BatchRamp, tokens: float) -> int:
    """Sequences in the global batch that begins at `tokens` consumed: linear in tokens, rounded down."""
    if tokens >= config.ramp_tokens:
        return config.end
    size = config.start + (config.end - config.start) * int(tokens) // int(config.ramp_tokens)
    return size // config.multiple_of * config.multiple_of


def piecewise(schedule: Sequence[Sequence[float]], tokens: float) -> float:
    """The value of the last entry of [[tokens_from, value], ...] that has begun at `tokens`."""
    return [value for begin, value in schedule if begin <= tokens][-1]


class AdamW16(torch.optim.Optimizer):
    """AdamW whose moments are stored in `moments` (BF16) and computed in the parameters' dtype (FP32 masters).

    The update uses the moments before they are rounded. Matrices decay and vectors do not, unless a group lists the
    parts that decay under "decayed" (a flat shard holds many parameters).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.moments = moments
        self.applied_steps = 0

    def start(self) -> None:
        """Allocate the moments, at zero."""
        for group in self.param_groups:
            for parameter in group["params"]:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][moment] = torch.zeros_like(parameter, dtype=self.moments, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a `grad` by torch's fused AdamW, a chunk at a time."""
        if not self.state:
            self.start()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for part in group.get("decayed", [parameter for parameter in moving if parameter.dim() > 1]):
                part.mul_(1 - group["lr"] * group["weight_decay"])
            for parameter in moving:
                step = torch.tensor(float(self.applied_steps), device=parameter.device)
                stored = self.state[parameter]
                whole = (parameter, parameter.grad, stored["exp_avg"], stored["exp_avg_sq"])
                chunks = (tensor.view(-1).split(CHUNK[parameter.device.type]) for tensor in whole)
                for values, gradient, *moments in zip(*chunks, strict=True):
                    wide = [moment.to(values.dtype) for moment in moments]
                    adamw(
                        *([values], [gradient], [wide[0]], [wide[1]], [], [step.clone()]),  # the clone is counted up
                        fused=True,
                        amsgrad=False,
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        lr=group["lr"],
                        weight_decay=0.0,
                        eps=group["eps"],
                        maximize=False,
                    )
                    for moment, value in zip(moments, wide, strict=True):
                        moment.copy_(value)
        self.applied_steps += 1
