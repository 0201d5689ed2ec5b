"""Which tensors are alive: bytes of what is made while somebody tells of it, as long as anybody holds it.

`Memory` counts them, `Parts` also says what they are: an operator's result is `working` until somebody gives it another
name, such as `activations` for what is left when a forward has ended. Works for tensors with values and without.
"""

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef

from kernels.ops import tensors

Bytes = Counter[str]
"""By part; differences may be negative."""


def difference(after: Bytes, before: Bytes) -> Bytes:
    """By part, as far as there is any."""
    found = Bytes(after)
    found.subtract(before)
    return Bytes({name: size for name, size in found.items() if size})


class Memory:
    """Bytes that are alive. peak: the most at a time."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._held = self.peak = 0

    def see(self, given: Any, result: Any, workspace: int = 0) -> None:
        """An operator has made `result` of `given`, trees of tensors and other things, and used `workspace` bytes."""
        for each in tensors(result):
            memory = each.untyped_storage()
            key = memory._cdata
            if key in self._made and not self._made[key][0].expired():
                continue
            if any(key == other.untyped_storage()._cdata for other in tensors(given)):
                continue  # a view of what was there before
            self._made[key] = StorageWeakRef(memory), memory.nbytes()
            self._held += memory.nbytes()
            self._new(key)
        if self._held + workspace > self.peak:
            self._reach(workspace)

    def alive(self) -> int:
        """Bytes that somebody still holds."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self._held = sum(size for _, size in self._made.values())
        return self._held

    def _reach(self, workspace: int) -> None:
        self.peak = max(self.peak, self.alive() + workspace)

    def _new(self, key: int) -> None:
        """A storage has been noted."""


class Parts(Memory):
    """Memory by name. name: of what is made from now on. fullest: the parts at the peak."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self._names, self.fullest = name, dict[int, str](), Bytes()

    def parts(self) -> Bytes:
        """Bytes alive by name."""
        self.alive()
        return self._named()

    def mark(self, among: Any, name: str) -> None:
        """Those tensors among these that were seen being made have this name from now on."""
        keys = {each.untyped_storage()._cdata for each in tensors(among)}
        self._names |= dict.fromkeys(keys & self._made.keys(), name)

    def rename(self, names: Collection[str], name: str) -> None:
        """What is alive and has one of `names` is called `name` from now on."""
        self.alive()
        self._names = {key: name if self._names[key] in names else self._names[key] for key in self._made}

    def begin(self) -> Bytes:
        """Look for a new peak from here on; returns the parts."""
        self.fullest = self.parts()
        self.peak = self._held
        return self.fullest

    def _reach(self, workspace: int) -> None:
        if self.alive() + workspace > self.peak:
            self.peak = self._held + workspace
            self.fullest = self._named()
            self.fullest["working"] += workspace

    def _named(self) -> Bytes:
        found = Bytes()
        for key, (_, size) in self._made.items():
            found[self._names[key]] += size
        return found

    def _new(self, key: int) -> None:
        self._names[key] = self.name
