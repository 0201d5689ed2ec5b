"""Recomputation: what backward makes again instead of finding it kept, and what it finds kept in fewer bytes.

    norms    normed rows: the norm runs again on its input, which the residual stream or the latents keep anyway
    mla_up   what attention reads: q_b_proj and kv_b_proj run again on the normed latents, and rotation after them
    swiglu   the input of a down-projection: SwiGLU runs again on gate and up
    layer    everything between a segment's inputs and outputs: the whole segment runs again

For the first three (report section 3.2.3) results of listed calls are known as long as they live, and an operator that
saves one for its backward gets a note of the call in its place. The note names the call's inputs, or notes of them in
turn. When backward asks, the call is repeated, once for all who ask: on the same inputs, hence to the same bits.

A result kept in another `Form` (FP8's: `kernels/fp8/kept.py`) is a note too, of the call that reads that form. What it
yields is near the result, not equal; so what was made of it is always made again, of what backward reads: gradients are
the same whatever is chosen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

CHOICES = ("norms", "mla_up", "swiglu", "layer")


@dataclass(frozen=True)
class Form:
    """Another form of a matrix: `store(matrix)` yields it, `load(*stored, columns, dtype)` the matrix it stands for."""

    store: Callable[[Tensor], Sequence[Tensor]]
    load: Callable[..., Tensor]

    def restore(
        self, shape: torch.Size, strides: Sequence[int], columns: int, dtype: torch.dtype, *stored: Tensor
    ) -> Tensor:
        """A tensor that lies in memory as the one whose form this is."""
        rows = self.load(*stored, columns, dtype).view(shape)
        return rows if rows.stride() == strides else rows.new_empty_strided(shape, strides).copy_(rows)


@dataclass(eq=False)
class _Call:
    """A call that can be repeated. `inputs` has notes in the place of tensors that are to be made again themselves.

    exact: its results are those of forward.
    """

    function: Callable[..., Any]
    inputs: Sequence[Any]
    exact: bool = True
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


class _Again(torch.autograd.Function):
    """`run(*inputs)` of which forward keeps the inputs alone; backward runs `noting`, the same with notes."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], noting: Callable[..., Any], *inputs: Any) -> Any:
        ctx.noting = noting
        ctx.others = [None if isinstance(each, Tensor) else each for each in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in inputs))
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        entered = [None if x is None else x.detach().requires_grad_(n) for x, n in zip(saved, needed, strict=True)]
        with torch.enable_grad():
            results = ctx.noting(*(o if x is None else x for x, o in zip(entered, ctx.others, strict=True)))
        roots = {y: dy for y, dy in zip(results, grads, strict=True) if dy is not None}
        if roots:
            torch.autograd.backward(list(roots), list(roots.values()))
        return None, None, *(None if x is None else x.grad for x in entered)


class Recompute:
    """What one rank recomputes: `choices` out of `CHOICES`, and what it keeps in another form, by name.

    Calls are noted only inside a segment (`segment` or `layer`) and while gradients are recorded.
    """

    def __init__(self, choices: Collection[str] = (), forms: Mapping[str, Form] | None = None) -> None:
        self.choices, self.forms = frozenset(choices), forms or {}
        self._listed: Collection[str] = ()  # choices of the segment that runs forward
        self._calls: list[_Call] | None = None  # of that segment
        # By the memory of a result. The weak reference keeps its address from being used for another.
        self._known: dict[int, tuple[StorageWeakRef, weakref.ref[_Call], int]] = {}

    def __call__(self, choice: str | None, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs); its results are not kept for backward if `choice` is listed.

        Nor are they if backward will not find the inputs as they are now.
        """
        return self._noted(choice in self._listed or any(map(self._changes, inputs)), function, inputs)

    def kept_as(self, name: str, function: Callable[..., Any], *inputs: Any, dimensions: int = 1) -> Any:
        """function(*inputs); of its results only the form of this name, if there is one, is kept for backward.

        That holds for `function` itself too: whatever operator it calls, backward of that reads what the form yields.
        dimensions: how many of the last make a row of the matrix that is stored.
        """
        if self._calls is None or name not in self.forms:
            return function(*inputs)
        form, saved = self.forms[name], list[list[Any]]()

        def pack(tensor: Tensor) -> list[Any]:
            saved.append([tensor])
            return saved[-1]

        with saved_tensors_hooks(pack, lambda one: _read(one[0])):
            results = function(*inputs)
        for result in _listed(results):
            rows = result.detach().flatten(-dimensions).flatten(0, -2)
            restore = partial(form.restore, result.shape, result.stride(), rows.shape[1], result.dtype)
            self._know(_Call(restore, form.store(rows), exact=False), (result,))
        for one in saved:
            one[0] = self._keep(one[0])
        return results

    def after(self, function: Callable[..., Any], source: Tensor, *others: Any) -> Any:
        """function(source, *others); its results are not kept for backward if `source` is not."""
        return self._noted(self._note(source) is not None, function, (source, *others))

    def segment(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, the forward of a segment, with notes in its graph in the place of what is not kept."""
        return self._noting(run, self.choices - {"layer"})

    def layer(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """As `segment` for a segment of a layer, of which nothing but the inputs is kept if `layer` is listed."""
        if "layer" not in self.choices:
            return self.segment(run)
        again = self._noting(run, ())

        def whole(*inputs: Any) -> Any:
            return _Again.apply(run, again, *inputs) if torch.is_grad_enabled() else run(*inputs)

        return whole

    # -- inside
    def _noting(self, run: Callable[..., Any], choices: Collection[str]) -> Callable[..., Any]:
        def noting(*inputs: Any) -> Any:
            if not torch.is_grad_enabled() or not (choices or self.forms):
                return run(*inputs)
            self._calls, self._listed = [], choices
            self._known = {k: known for k, known in self._known.items() if known[1]() and not known[0].expired()}
            try:
                with saved_tensors_hooks(self._keep, _read):
                    return run(*inputs)
            finally:
                self._calls, self._listed = None, ()  # from here on only notes keep calls

        return noting

    def _noted(self, wanted: bool, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        results = function(*inputs)
        if wanted and self._calls is not None:
            kept = [self._keep(each) if isinstance(each, Tensor) else each for each in inputs]
            self._know(_Call(function, kept), _listed(results))
        return results

    def _know(self, call: _Call, results: Sequence[Tensor]) -> None:
        """From here on whoever saves one of these keeps a note of the call."""
        assert self._calls is not None
        self._calls.append(call)
        for index, result in enumerate(results):
            memory = result.untyped_storage()
            self._known[memory._cdata] = StorageWeakRef(memory), weakref.ref(call), index

    def _note(self, tensor: Tensor) -> _Note | None:
        """The note of what made a tensor, if it can be made again."""
        if self._calls is not None:
            memory, call, index = self._known.get(tensor.untyped_storage()._cdata, (None, lambda: None, 0))
            known = call()
            if known is not None and memory is not None and not memory.expired():
                return _Note(known, index, (tensor.shape, tensor.stride(), tensor.storage_offset()))
        return None

    def _changes(self, value: Any) -> bool:
        """Whether backward will find something else in its place."""
        note = self._note(value) if isinstance(value, Tensor) else None
        return note is not None and not note.call.exact

    def _keep(self, tensor: Tensor) -> Tensor | _Note:
        note = self._note(tensor)
        if note is None:
            return tensor.detach()
        note.call.readers[note.index] += 1
        return note
