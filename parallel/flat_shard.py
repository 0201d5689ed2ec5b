"""A piece of a flattened global tensor.

ZeRO-1 cuts flat buffers wherever the ranks' shares end, in the middle of rows and experts. A `FlatShard` says which
elements of the flattened global tensor a rank holds; with that alone every element is written once and read back into
any other cut, so checkpoints fit all layouts. Used by `parallel/zero.py` and `train/checkpoint`.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FlatShard:
    """Elements [start, start + local.numel()) of a tensor of `shape`; `local` is 1-d and not empty.

    It shares memory with what it was cut from: loading a checkpoint into `local` restores that.
    """

    local: Tensor
    start: int
    shape: tuple[int, ...]
