"""What cuBLAS and Transformer Engine promise on Hopper, as CPU functions that refuse every layout they do not document.

Sources: cuBLAS's chapter on 1D and 2D block scaling, PyTorch's checks in ScaledBlas.cpp, Transformer Engine 2.12's in
cublaslt_gemm.cu, its quantiser in recipe_common.cuh. They let the layouts that backends make be tested without a GPU.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

TILE = 128


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def tiles(n: int) -> int:
    return -(-n // TILE)


def spread(codes_MK: Tensor, scales: Tensor, height: int) -> Tensor:
    """Codes times the scale of their tile of `height` x 128, with scales [tiles of M, tiles of K]."""
    M, K = codes_MK.shape
    wide = scales.repeat_interleave(height, 0)[:M].repeat_interleave(TILE, 1)[:, :K]
    return codes_MK.double() * wide.double()


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    recipe_a: ScalingType,
    scale_b: Tensor,
    recipe_b: ScalingType,
    output_dtype: torch.dtype,
) -> Tensor:
    """torch.nn.functional.scaled_mm for the recipes 1x128 with 128x128 and 1x128 with 1x128."""
    (M, K), N = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn and scale_a.dtype == scale_b.dtype == torch.float32
    assert b.shape[0] == K and K % 16 == 0 and N % 16 == 0
    assert a.stride() == (K, 1) and b.stride() == (1, K), "only row-major times column-major on Hopper"
    assert recipe_a == ScalingType.BlockWise1x128
    assert scale_a.shape == (M, tiles(K)) and scale_a.stride(0) == 1
    assert scale_a.stride(1) == M or (scale_a.shape[1] == 1 and scale_a.stride(1) == 1)
    if recipe_b == ScalingType.BlockWise128x128:
        padded = up(tiles(K), 4)
        assert scale_b.shape == (padded, tiles(N)) and scale_b.stride(0) == 1
        assert scale_b.stride(1) == padded or (scale_b.shape[1] == 1 and scale_b.stride(1) == 1)
        right = spread(b.t(), scale_b.t()[:, : tiles(K)], TILE)
    else:
        assert recipe_b == ScalingType.BlockWise1x128
        assert scale_b.shape == (N, tiles(K)) and scale_b.stride(0) == 1
        assert scale_b.stride(1) == N or (scale_b.shape[1] == 1 and scale_b.stride(1) == 1)
        right = spread(b.t(), scale_b, 1)
    return (spread(a, scale_a, 1) @ right.t()).to(output_dtype)


@dataclass
class Storage:
    """Float8BlockwiseQTensorStorage: data as bytes, scales in the layout that GEMMs read."""

    rowwise_data: Tensor | None
    rowwise_scale_inv: Tensor | None
    columnwise_data: Tensor | None
    columnwise_scale_inv: Tensor | None
    fp8_dtype: str
    quantizer: Any
    is_2D_scaled: bool

    def __post_init__(self) -> None:
        self._rowwise_data, self._rowwise_scale_inv = self.rowwise_data, self.rowwise_scale_inv
        self._columnwise_data, self._columnwise_scale_inv = self.columnwise_data, self.columnwise_scale_inv

    def value(self) -> Tensor:
        """What the row-wise data stands for, after checks of its layout."""
        data, scales = self._rowwise_data, self._rowwise_scale_inv
        assert data is not None and data.dtype == torch.uint8 and data.is_contiguous()
        assert scales is not None and scales.dtype == torch.float32 and scales.is_contiguous()
        M, K = data.shape
        assert K % 16 == 0 and M % 8 == 0
        codes = data.view(torch.float8_e4m3fn)
        if self.is_2D_scaled:
            assert scales.shape == (tiles(M), up(tiles(K), 4))
            return spread(codes, scales[:, : tiles(K)], TILE)
        assert scales.shape == (tiles(K), up(M, 4))
        return spread(codes, scales[:, :M].t(), 1)


@dataclass
class Quantizer:
    """Float8BlockQuantizer: scale = 448 / amax, code = x * scale in FP32; amax that is not finite counts as 448."""

    fp8_dtype: str
    rowwise: bool
    columnwise: bool
    amax_epsilon: float
    force_pow_2_scales: bool
    block_scaling_dim: int

    def __call__(self, x: Tensor) -> Storage:
        assert x.is_contiguous() and x.shape[-1] % 16 == 0 and x.dim() == 2
        R, C = x.shape
        height, width = (TILE, TILE) if self.block_scaling_dim == 2 else (1, TILE) if self.rowwise else (TILE, 1)
        padded = torch.zeros(up(R, height), up(C, width))
        padded[:R, :C] = x.float()
        cut = padded.view(-1, height, up(C, width) // width, width)
        amax = cut.nan_to_num(0, torch.inf, -torch.inf).abs().amax((1, 3)).clamp_min(self.amax_epsilon)
        scale = torch.where(amax.isfinite(), torch.tensor(448.0) / amax, 1.0)
        if self.force_pow_2_scales:
            scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
        wide = scale.repeat_interleave(height, 0)[:R].repeat_interleave(width, 1)[:, :C]
        codes = (x.float() * wide).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        scale_inv = 1 / scale
        if self.block_scaling_dim == 2:
            return self._storage(codes, torch.nn.functional.pad(scale_inv, (0, -scale_inv.shape[1] % 4)), True)
        if self.rowwise:
            return self._storage(codes, torch.nn.functional.pad(scale_inv.t(), (0, -R % 4)), True)
        return self._storage(codes.t().contiguous(), torch.nn.functional.pad(scale_inv, (0, -C % 4)), False)

    def _storage(self, data: Tensor, scales: Tensor, rowwise: bool) -> Storage:
        scales = scales.contiguous()
        pair = (data, scales, None, None) if rowwise else (None, None, data, scales)
        return Storage(*pair, self.fp8_dtype, self, self.block_scaling_dim == 2)


def general_gemm(
    A: Storage, B: Storage, out_dtype: torch.dtype, layout: str, out: Tensor | None, accumulate: bool
) -> tuple[Tensor, None, None, None]:
    """B @ A^T for layout TN; added to `out` if asked."""
    assert layout == "TN" and accumulate == (out is not None) and not (A.is_2D_scaled and B.is_2D_scaled)
    result = B.value() @ A.value().t()
    if out is None:
        return result.to(out_dtype), None, None, None
    assert out.is_contiguous() and out.dtype == out_dtype
    out += result.to(out_dtype)
    return out, None, None, None


def general_grouped_gemm(
    A: list[Storage],
    B: list[Storage],
    out: list[Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    accumulate: bool = False,
    use_split_accumulator: bool = False,
    single_output: bool = False,
) -> None:
    """`general_gemm` for each pair; with `single_output` results follow each other in out[0]."""
    assert len(A) == len(B) == len(quantization_params) and use_split_accumulator
    if single_output:
        assert m_splits == [b.rowwise_data.shape[0] for b in B] and len(out) == 1 and out[0].dtype == out_dtype
        out = list(out[0].split(m_splits))
    assert len(out) == len(A)
    for a, b, o in zip(A, B, out, strict=True):
        result = general_gemm(a, b, out_dtype, layout, None, False)[0]
        o.copy_(o + result if accumulate else result)


def install_transformer_engine(monkeypatch: Any) -> None:
    """Make `import transformer_engine` find these functions."""
    prefix = "transformer_engine.pytorch"
    contents = {
        "transformer_engine": {},
        "transformer_engine_torch": {"DType": SimpleNamespace(kFloat8E4M3="E4M3")},
        prefix: {"Float8BlockQuantizer": quantizer},
        f"{prefix}.cpp_extensions": {"general_gemm": general_gemm, "general_grouped_gemm": general_grouped_gemm},
        f"{prefix}.tensor": {},
        f"{prefix}.tensor.storage": {},
        f"{prefix}.tensor.storage.float8_blockwise_tensor_storage": {"Float8BlockwiseQTensorStorage": Storage},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def quantizer(fp8_dtype: str, **options: Any) -> Quantizer:
    return Quantizer(fp8_dtype, **options)
