"""What quantisation does to a layer: how much becomes zero, how much crowds at the top, how far its amax reaches.

Of one micro-batch of a step that is looked at, every input and every output gradient of an FP8 GEMM is counted when it
is quantised, from the codes and scales that exist anyway. Counts stay on the device. Each layer has, for activations
and for gradients:

    underflow    share of the values other than zero whose code is zero
    saturation   share of them whose code is the largest (448), without one in each tile that has any: the value that
                 the scale is made of always has it. Others are within 4 % of the tile's largest. Nothing is ever cut
                 off, since scales come from the tile itself; a high share tells of tiles of equal magnitudes
    amax         smallest and largest magnitude that a tile reaches, tiles of nothing but zeros aside
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.fp8.formats import E4M3_MAX, ROWS, split, widen

KINDS = ("activation", "gradient")
LARGEST = 0x7E
"""Code of 448."""


class Health:
    """Counts of one step. `layer`: to whom belongs what is quantised now; None if nobody looks at it."""

    def __init__(self) -> None:
        self.on = False
        self.layer: int | None = None
        self._counts: dict[tuple[int, str], Tensor] = {}  # values other than zero, underflow, saturation
        self._reaches: dict[tuple[int, str], Tensor] = {}  # - smallest amax, largest amax

    def begin(self, on: bool) -> None:
        """Forget the step before; look at this one if `on`."""
        self.on = on
        self._counts.clear()
        self._reaches.clear()

    def look(self, layer: int | None) -> None:
        """What follows belongs to `layer`; None: do not look."""
        self.layer = layer if self.on else None

    @torch.no_grad()
    def record(self, layer: int | None, kind: str, x_RC: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Count BF16 rows `x` that have been quantised in 1x128 tiles; layer: what `layer` was in their forward."""
        if layer is None or not x_RC.numel():
            return
        magnitudes = codes.view(torch.uint8) & 0x7F
        largest = split(magnitudes, ROWS).amax((-3, -1))
        # Counts of integers that are zero: by far the fastest of what says the same.
        values = torch.count_nonzero(x_RC.view(torch.int16) & 0x7FFF)
        kept = torch.count_nonzero(magnitudes)
        below_top = torch.count_nonzero(magnitudes ^ LARGEST) - torch.count_nonzero(largest ^ LARGEST)
        at_top = magnitudes.numel() - largest.numel() - below_top
        amax = widen(largest.view(torch.float8_e4m3fn)).clamp_max(E4M3_MAX) * scales
        smallest = torch.where(largest > 0, amax, float("inf")).amin()
        key = layer, kind
        counts, reach = torch.stack([values, values - kept, at_top]), torch.stack([-smallest, amax.amax()])
        self._counts[key] = self._counts[key] + counts if key in self._counts else counts
        self._reaches[key] = self._reaches[key].maximum(reach) if key in self._reaches else reach

    def tables(self, layers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """FP64 [layers, kinds, 3] to be added up over ranks, and [layers, kinds, 2] of which the largest count."""
        counts = torch.zeros(len(layers), len(KINDS), 3, dtype=torch.float64, device=device)
        reaches = torch.full((len(layers), len(KINDS), 2), -torch.inf, dtype=torch.float64, device=device)
        for (layer, kind), found in self._counts.items():
            place = layers.index(layer), KINDS.index(kind)
            counts[place], reaches[place] = found.double(), self._reaches[layer, kind].double().nan_to_num(torch.inf)
        return counts, reaches


def shares(layers: Sequence[int], counts: Tensor, reaches: Tensor) -> dict[str, dict[str, Any]]:
    """By layer and kind what the summed tables say; a kind of which nothing was other than zero is left out."""
    found: dict[str, dict[str, Any]] = {}
    for layer, *tables in zip(layers, counts.tolist(), reaches.tolist(), strict=True):
        for kind, (values, lost, at_top), (smallest, largest) in zip(KINDS, *tables, strict=True):
            if values:
                of_kind = {"underflow": lost / values, "saturation": at_top / values, "amax": [-smallest, largest]}
                found.setdefault(str(layer), {})[kind] = of_kind
    return found
