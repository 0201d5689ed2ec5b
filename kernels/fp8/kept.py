"""What FP8 keeps of activations between forward and backward, besides the inputs of its GEMMs (report section 3.3.3).

    attention output   E5M6 with power-of-two scales: attention's own backward reads it too, E4M3 is too coarse for it
    swiglu input       gate and up of a MoE layer's experts, in FP8

Backward reads them back in BF16 (E5M6 without rounding), and makes of them what the weight gradients need: the
attention output in FP8, from E5M6, for that of the output projection; SwiGLU's output, computed anew, for that of the
down-projection. Forward goes on with the tensors themselves.
"""

import torch
from torch import Tensor

from kernels.fp8 import ROWS, e5m6_dequantize, e5m6_quantize, fp8_dequantize, fp8_quantize
from kernels.recompute import Form


def _store_e5m6(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    return e5m6_quantize(x_RC, True)


def _load_e5m6(words: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return e5m6_dequantize(words, scales, columns, dtype)


def _store_fp8(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    return fp8_quantize(x_RC, ROWS, False)


def _load_fp8(codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return fp8_dequantize(codes, scales, ROWS, dtype)


FORMS = {"attention output": Form(_store_e5m6, _load_e5m6), "swiglu input": Form(_store_fp8, _load_fp8)}
