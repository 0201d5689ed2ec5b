"""Recomputation: what backward makes again instead of finding it kept.

    norms    normed rows: the norm runs again on its input, which the residual stream or the latents keep anyway
    mla_up   what attention reads: q_b_proj and kv_b_proj run again on the normed latents, and rotation after them
    swiglu   the input of a down-projection: SwiGLU runs again on gate and up
    layer    everything between a segment's inputs and outputs: PyTorch's checkpointing of the whole segment

For the first three (report section 3.2.3) results of listed calls are known as long as they live, and an operator that
saves one for its backward gets a note of the call in its place. The note names the call's inputs, or notes of them in
turn. When backward asks, the call is repeated, once for all who ask: on the same inputs, hence to the same bits.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

CHOICES = ("norms", "mla_up", "swiglu", "layer")


@dataclass(eq=False)
class _Call:
    """A call that can be repeated. `inputs` has notes in the place of tensors that are to be made again themselves."""

    function: Callable[..., Any]
    inputs: Sequence[Any]
    readers: Counter[int] = field(default_factory=Counter)
    results: dict[int, Tensor] = field(default_factory=dict)

    def result(self, index: int) -> Tensor:
        """One of its results, which is let go when the last reader has it."""
        if index not in self.results:
            with torch.no_grad():
                made = _listed(self.function(*map(_read, self.inputs)))
            self.results = {i: each for i, each in enumerate(made) if i == index or self.readers[i] > 0}
        self.readers[index] -= 1
        return self.results[index] if self.readers[index] > 0 else self.results.pop(index)


@dataclass(frozen=True)
class _Note:
    """Stands for a tensor, possibly a view, in the memory of a call's result."""

    call: _Call
    index: int
    place: tuple[Sequence[int], Sequence[int], Any]  # shape, strides, offset

    def read(self) -> Tensor:
        return self.call.result(self.index).as_strided(*self.place)


def _read(kept: Any) -> Any:
    return kept.read() if isinstance(kept, _Note) else kept


def _listed(results: Any) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else results


class Recompute:
    """What one rank recomputes; `choices` out of `CHOICES`.

    Calls are noted only inside a segment (`segment` or `layer`) and while gradients are recorded.
    """

    def __init__(self, choices: Collection[str] = ()) -> None:
        self.choices = frozenset(choices)
        self._calls: list[_Call] | None = None  # of the segment that runs forward
        # By the memory of a result. The weak reference keeps its address from being used for another.
        self._known: dict[int, tuple[StorageWeakRef, weakref.ref[_Call], int]] = {}

    def __call__(self, choice: str | None, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs); its results are not kept for backward if `choice` is listed."""
        return self._noted(choice in self.choices, function, inputs)

    def after(self, function: Callable[..., Any], source: Tensor, *others: Any) -> Any:
        """function(source, *others); its results are not kept for backward if `source` is not."""
        return self._noted(isinstance(self._kept(source), _Note), function, (source, *others))

    def segment(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, the forward of a segment, with notes in its graph in the place of what is not kept."""

        def noting(*inputs: Any) -> Any:
            if not torch.is_grad_enabled() or not self.choices - {"layer"}:
                return run(*inputs)
            self._calls = []
            self._known = {k: known for k, known in self._known.items() if known[1]() and not known[0].expired()}
            try:
                with torch.autograd.graph.saved_tensors_hooks(self._keep, _read):
                    return run(*inputs)
            finally:
                self._calls = None  # from here on only notes keep calls

        return noting

    def layer(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """As `segment` for a segment of a layer, of which nothing but the inputs is kept if `layer` is listed."""
        if "layer" not in self.choices:
            return self.segment(run)

        def checkpointed(*inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*inputs)
            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

        return checkpointed

    # -- inside
    def _noted(self, wanted: bool, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        results = function(*inputs)
        if wanted and self._calls is not None:
            call = _Call(function, [self._keep(each) if isinstance(each, Tensor) else each for each in inputs])
            self._calls.append(call)
            for index, result in enumerate(_listed(results)):
                memory = result.untyped_storage()
                self._known[memory._cdata] = StorageWeakRef(memory), weakref.ref(call), index
        return results

    def _kept(self, tensor: Tensor) -> Tensor | _Note:
        """What is kept of a tensor: itself, or a note if it can be made again."""
        if self._calls is not None:
            memory, call, index = self._known.get(tensor.untyped_storage()._cdata, (None, lambda: None, 0))
            known = call()
            if known is not None and memory is not None and not memory.expired():
                return _Note(known, index, (tensor.shape, tensor.stride(), tensor.storage_offset()))
        return tensor.detach()

    def _keep(self, tensor: Tensor) -> Tensor | _Note:
        kept = self._kept(tensor)
        if isinstance(kept, _Note):
            kept.call.readers[kept.index] += 1
        return kept
