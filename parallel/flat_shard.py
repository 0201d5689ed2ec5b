"""A piece of a flattened global tensor, in the words of `torch.distributed.checkpoint`.

ZeRO-1 cuts flat buffers wherever the ranks' shares end, in the middle of rows and experts. A `FlatShard` says which
elements of the flattened global tensor a rank holds; with that alone the library writes every element once and reads it
back into any other cut, so checkpoints fit all layouts. Used by `parallel/zero.py` and `train/checkpoint`.
"""

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatShard(torch.Tensor):
    """Elements [start, start + local.numel()) of a global tensor of `total` elements; `local` is 1-d and not empty."""

    local: torch.Tensor
    start: int
    total: int

    @staticmethod
    def of(local: torch.Tensor, start: int, total: int) -> "FlatShard":
        """The shard that shares `local`'s memory: loading a checkpoint into it writes `local`."""
        shard = local.as_subclass(FlatShard)
        shard.local, shard.start, shard.total = local, start, total
        return shard

    def size(self, dim=None):
        """The global size, which the library compares with the checkpoint's."""
        return torch.Size([self.total]) if dim is None else self.total

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.local.numel()]))]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        [chunk] = self.__create_chunk_list__()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.local), self.size())
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, _: MetadataIndex) -> torch.Tensor:
        return self.local
