"""What a rank does, as it is seen from beside it: every communication that it issues, and every byte that it holds.

`Witness` watches all operators while the trainer runs, on fake tensors or on real ones. Its `Ledger` counts what is
alive, and takes a word for what is not there: passes that are only repeated (`repeating`) say what they would hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from launch.simulate.ranks.communication import Call, heard
from launch.simulate.stages.storage import Memory


class Ledger(Memory):
    """Memory of which a part is only said to be there: what passes would hold if they ran again."""

    def __init__(self) -> None:
        super().__init__()
        self._said = 0

    def alive(self) -> int:
        """Bytes that somebody holds, or would hold."""
        super().alive()
        self._held += self._said
        return self._held

    def say(self, peak: int, left: int) -> None:
        """At most `peak` bytes more were held for a while, and `left` more from now on."""
        if self._held + peak > self.peak:
            self.peak = max(self.peak, self.alive() + peak)
        self._said += left
        self._held += left

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is made or let go in here has been accounted for elsewhere."""
        before = self.alive()
        yield
        self._said += before - self.alive()
        self._held = before


class Witness(TorchDispatchMode):
    """Hears every communication, keeps the ledger, and says one to a host that reads a value of a fake tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.memory = Ledger()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(heard(func, args))
        elif func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else dtype is torch.bool or 1
        result = func(*args, **(kwargs or {}))
        self.memory.see((args, kwargs), result)
        return result
