"""A parameter knows its replicas: the ranks that hold a copy follow from its stages and from whether experts shard it.

Gradient reduction, ZeRO-1, the gradient norm and checkpoints are all "reduce, shard, count or save over the replica
set". DualPipe's mirrored copies (stage s lives at positions s and P-1-s), data parallelism and a tied embedding (used
by the first stage and by MTP on the last) are no special cases. Parameters are gathered into buckets by (replica set,
kind, stages that use them), ordered by name: ranks that hold the same two stages in opposite order flatten them alike,
and each stage's gradients can be reduced as soon as its last weight gradient has run.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from parallel.experts.shard import share_of
from parallel.mesh import Mesh
from parallel.zero import Bucket


def homes(placement: Sequence[Sequence[int]], stages: set[int]) -> tuple[int, ...]:
    """Pipeline positions that hold any of `stages`; placement[position] = stages there."""
    return tuple(position for position, held in enumerate(placement) if stages & set(held))


def buckets(
    mesh: Mesh, placement: Sequence[Sequence[int]], stages: Mapping[int, nn.Module], shared: Mapping[str, set[int]]
) -> list[Bucket]:
    """Group this rank's parameters; every rank of the world calls this at the same time, for it makes process groups.

    stages: the modules held here, by stage number. shared: for a tied parameter, all stages that use it (anywhere).
    """
    numbers = {number for held in placement for number in held}
    places = sorted({homes(placement, users) for users in [*({number} for number in numbers), *shared.values()]})
    mesh.make_groups("dense", (mesh.replicas(place, None) for place in places))
    mesh.make_groups("experts", (mesh.replicas(place, rank) for place in places for rank in range(mesh.expert)))

    found: dict[tuple[tuple[int, ...], str, tuple[int, ...]], dict[str, nn.Parameter]] = {}
    for number, stage in stages.items():
        for name, parameter in stage.named_parameters():
            users = shared.get(name, {number})
            sharded = share_of(parameter) is not None
            ranks = mesh.replicas(homes(placement, users), mesh.expert_rank if sharded else None)
            key = ranks, "experts" if sharded else "dense", tuple(sorted(users))
            found.setdefault(key, {})[name] = parameter
    return [
        Bucket(ranks, kind, mesh.group(ranks, kind), dict(sorted(held.items())), frozenset(users))
        for (ranks, kind, users), held in sorted(found.items(), key=lambda item: item[0])  # replicas have one order
    ]
