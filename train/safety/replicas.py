"""Silent corruption: copies that must be equal are compared, and the one that is wrong is named and mended.

Every copy of a parameter is the cast of one master, so the ranks of a bucket (`parallel/replicas.py`: data-parallel
copies and DualPipe's mirrored ones alike) must hold the same bits, and so must all copies of a router's bias. Each
check hashes them where they are and compares one number a bucket, after backward, so that copies are judged in the
state in which the step has used them, and before the optimizer writes them anew. A difference spoils the norm, by
which all ranks learn that nothing may move; `mend` then casts the masters again, whose owner is right by definition,
and the same batch can be trained once more: the run ends as if nothing had happened. A bias has no master; copies of
it that differ end the run.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.engine import Engine

CHUNK = 1 << 20  # words that are added up at a time
ODD = 0x5851F42D4C957F2D  # multiplier of Knuth's MMIX generator: chunks that swap places are noticed


@dataclass(frozen=True)
class Wrong:
    """A copy that was not the cast of its master, on one rank."""

    rank: int
    parameter: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.parameter}"


class Replicas:
    """This rank's copies. Every method is called by all ranks, in the same order."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def differ(self) -> bool:
        """Whether any copy that this rank shares differs from the others."""
        running = []
        for bucket, flat in zip(self.engine.buckets, self.engine.optimizer.bf16_groups_flat, strict=True):
            if bucket.group.size() == 1:
                continue
            routers = [
                router.e_score_correction_bias
                for stage in bucket.stages
                if bucket.kind == "dense" and bucket.stages == {stage}
                for router in self.engine.stages[stage].routers().values()
            ]
            mine = digest(flat)
            for bias in routers:
                mine = mine * ODD + digest(bias)
            both = torch.stack([mine, ~mine])  # the largest, and the complement of the smallest
            running.append((both, dist.all_reduce(both, dist.ReduceOp.MAX, group=bucket.group, async_op=True)))
        found = []
        for both, work in running:
            work.wait()
            found.append(both[0] != ~both[1])
        return bool(torch.stack(found).any()) if found else False

    def mend(self) -> list[Wrong]:
        """Make all copies the casts of their masters; returns those that were not, the same list on all ranks.

        Raises `RuntimeError` if copies of a router's bias differ.
        """
        self._compare_biases()
        before = self._digests()
        self.engine.optimizer.update_lp_params()
        self.engine.numerics.bump()
        mine = [Wrong(dist.get_rank(), name) for name, value in self._digests().items() if value != before[name]]
        everyone: list[list[Wrong]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        return [wrong for each in everyone for wrong in each]

    def _digests(self) -> dict[str, int]:
        parameters = (item for bucket in self.engine.buckets for item in bucket.parameters.items())
        return {name: int(digest(parameter.detach())) for name, parameter in parameters}

    def _compare_biases(self) -> None:
        held = {number: int(digest(router.e_score_correction_bias)) for number, router in self.engine.routers().items()}
        everyone: list[dict[int, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, held)
        for layer in sorted({number for each in everyone for number in each}):
            holders: dict[int, list[int]] = {}
            for rank, each in enumerate(everyone):
                if layer in each:
                    holders.setdefault(each[layer], []).append(rank)
            if len(holders) > 1:
                camps = " and ".join(
                    f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for ranks in holders.values()
                )
                raise RuntimeError(
                    f"layer {layer}: the router's bias differs between {camps}, and has no master to tell which is "
                    "right; expected a start from the newest checkpoint"
                )


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a contiguous tensor's bits, where it is: any one bit that flips changes it."""
    octets = tensor.reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = octets.numel() // 8 * 8
    found = octets[whole:].long().sum()
    for words in octets[:whole].view(torch.int64).split(CHUNK):
        found = found * ODD + words.sum()
    return found
