"""What travels between ranks: rows as bytes, in FP8 where asked for, and where they are sent and counted.

A row's values, scales, routing weights and choices lie side by side in one buffer, so that one exchange carries them
all. In FP8 a row is E4M3 codes in tiles of 1x128 with power-of-two scales: what the first GEMM of the experts, and the
backward of their last, quantise their input to anyway. Such codes dequantise to BF16 exactly, and quantise again to the
same values, so sending them changes no result by a bit (report sections 3.3.2 and 3.3.3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.fp8 import ROWS, fp8_gather_dequantize, fp8_quantize
from kernels.permute import gather_forward
from parallel.experts.dispatch import Traffic


# ---------------------------------------------------------------- rows as bytes
def pack(*tensors: Tensor) -> Tensor:
    """Tensors [R, ...] side by side as bytes [R, bytes of a row]; one tensor alone is only viewed."""
    pieces = [tensor.contiguous().view(len(tensor), _width(tensor)).view(torch.uint8) for tensor in tensors]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def unpack(rows: Tensor, like: Sequence[Tensor], order: Tensor | None = None) -> list[Tensor]:
    """The tensors that `pack` put together, of the dtypes and widths of those in `like`; `order` picks rows."""
    pieces = list(rows.split([row_bytes(tensor) for tensor in like], 1))
    if order is not None:
        pieces = [piece.index_select(0, order) for piece in pieces]
    elif len(like) > 1:  # cloned: of one row or none, `contiguous` would keep an offset that no wider dtype can view
        pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]
    return [
        piece.view(tensor.dtype).view(len(piece), *tensor.shape[1:]) for piece, tensor in zip(pieces, like, strict=True)
    ]


def row_bytes(*tensors: Tensor) -> int:
    """Bytes of one row of `pack(*tensors)`."""
    return sum(_width(tensor) * tensor.element_size() for tensor in tensors)


def _width(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def encode(x_RD: Tensor, fp8: bool) -> list[Tensor]:
    """What travels for rows: themselves, or their E4M3 codes and power-of-two scales."""
    return list(fp8_quantize(x_RD, ROWS, True)) if fp8 else [x_RD]


def decode(parts: Sequence[Tensor], order: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `order` of what `encode` gave, in `dtype` (exact in BF16): codes are gathered and dequantised in one pass.

    parts: bytes of each tensor, a row for a row, as they lie where they arrived.
    """
    if len(parts) == 1:
        return gather_forward(parts[0], order).view(dtype)
    codes, scales = parts
    return fp8_gather_dequantize(codes.view(torch.float8_e4m3fn), scales, order, dtype)


def received(
    rows: Tensor, order: Tensor, values: Sequence[Tensor], dtype: torch.dtype, *others: Tensor
) -> tuple[Tensor, ...]:
    """What `pack(*values, *others)` has become on its travel, picked by `order`: `values` decoded, then the others."""
    width = row_bytes(*values)
    parts = rows[:, :width].split([row_bytes(each) for each in values], 1)
    return decode(parts, order, dtype), *unpack(rows[:, width:], others, order)


# ---------------------------------------------------------------- where they are sent
@dataclass(frozen=True)
class Channel:
    """A process group over which rows travel. Everything sent is counted here.

    nodes: number of the node of each rank of the group.
    """

    group: dist.ProcessGroup
    nodes: Sequence[int]
    traffic: Traffic
    name: str = ""

    def post(self, operation: str, rows: Tensor, gives: Sequence[int], takes: Sequence[int], into: Tensor) -> Any:
        """Send `rows`, gives[i] of them to rank i, and receive takes[i] from it `into`. Returns the work.

        rows, into: contiguous, held by the caller until the work is done.
        """
        self.traffic.add(operation, *self.leaving(gives, row_bytes(rows)))
        return dist.all_to_all_single(into, rows, list(takes), list(gives), group=self.group, async_op=True)

    def leaving(self, gives: Sequence[int], width: int) -> tuple[int, int]:
        """Bytes that go to other ranks of this node, and to other nodes, in rows of `width`."""
        here = self.group.rank()
        inside = sum(n for rank, n in enumerate(gives) if rank != here and self.nodes[rank] == self.nodes[here])
        across = sum(n for rank, n in enumerate(gives) if self.nodes[rank] != self.nodes[here])
        return inside * width, across * width
