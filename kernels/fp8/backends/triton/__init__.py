"""Our kernels, in Triton, for Hopper: what `reference` defines, and casts that fuse what comes before.

Importing this needs triton, and running it a GPU of compute capability 9.0, or TRITON_INTERPRET=1 for checks on a CPU.
`tiles` holds the arithmetic that everything shares, `quantize` the casts, `fused` the casts after SwiGLU and RMSNorm,
`dequantize` the way back, `gemm` the GEMMs. The GEMMs take an output dtype, so that a BF16 result is written once.
"""

from kernels.fp8.backends.triton.dequantize import dequantize, gather_dequantize
from kernels.fp8.backends.triton.fused import rmsnorm_quantize, swiglu_quantize
from kernels.fp8.backends.triton.gemm import (
    grouped_dgrad,
    grouped_linear,
    grouped_wgrad,
    linear,
    linear_dgrad,
    linear_wgrad,
    prepare_weight,
)
from kernels.fp8.backends.triton.quantize import permute_quantize, quantize, quantize_both, requantize

__all__ = [
    "dequantize",
    "gather_dequantize",
    "grouped_dgrad",
    "grouped_linear",
    "grouped_wgrad",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "permute_quantize",
    "prepare_weight",
    "quantize",
    "quantize_both",
    "requantize",
    "rmsnorm_quantize",
    "swiglu_quantize",
]
