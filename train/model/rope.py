"""The angles of rotary position embedding, with YaRN beyond the original length; `kernels/rope.py` turns by them.

Source: report section 4.3. YaRN is off while sequences are no longer than the original length: pre-training at 4K must
not see it.
"""

import math

import torch
from torch import Tensor

from train.model.config import ModelConfig


def frequencies(config: ModelConfig, length: int) -> Tensor:
    """Angle per position of each of the qk_rope_head_dim/2 pairs, FP64, for sequences of `length` tokens."""
    width = config.qk_rope_head_dim
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    frequency = config.rope_theta ** (-pairs / width)
    scaling = config.rope_scaling
    if scaling is None or length <= scaling.original_max_position_embeddings:
        return frequency

    def pair_turning(times: float) -> float:  # the pair that turns so many times over the original length
        turns = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def softmax_scale(config: ModelConfig, length: int) -> float:
    """qk_head_dim ** -0.5, times mscale squared where YaRN is on (0.0721688 and 0.1352337 for DeepSeek-V3)."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is None or length <= scaling.original_max_position_embeddings or not scaling.mscale_all_dim:
        return scale
    mscale = 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return scale * mscale * mscale


def rotation(config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, qk_rope_head_dim/2] for positions 0 .. length-1."""
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies(config, length))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
