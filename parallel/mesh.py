"""Where each rank sits: pipeline x data x context, with expert groups inside data x context.

World size = pipeline * data * context; the pipeline is the outermost dimension, so the data-parallel ranks of a stage,
and with them the members of an expert group, are consecutive and share nodes. Passing a `Mesh` replaces global state.
Neighbours: `replicas` builds the groups that hold a copy of a parameter from it, `pipeline` its peers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch.distributed as dist


@dataclass
class Mesh:
    """One rank's view of the world. Widths in ranks; `node_size` ranks share a node.

    timeout: of what the groups do, the backend's unless told. comm_sms: SMs for each of their communicators
    (`communicator_options`).
    """

    pipeline: int
    data: int
    context: int
    expert: int
    rank: int
    node_size: int
    timeout: timedelta | None = None
    comm_sms: int | None = None
    _groups: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = field(default_factory=dict, repr=False)

    # -- coordinates
    @property
    def width(self) -> int:
        """Ranks at one pipeline position."""
        return self.data * self.context

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pipeline * self.width

    @property
    def pipeline_rank(self) -> int:
        """Position in the pipeline."""
        return self.rank // self.width

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank's pipeline works on."""
        return self.rank % self.width // self.context

    @property
    def expert_rank(self) -> int:
        """Position in the expert group."""
        return self.rank % self.width % self.expert

    @property
    def node(self) -> int:
        """Number of this rank's node."""
        return self.rank // self.node_size

    # -- sets of ranks
    def expert_ranks(self) -> tuple[int, ...]:
        """This rank's expert group: consecutive ranks that together hold all experts of their stages."""
        first = self.rank - self.expert_rank
        return tuple(range(first, first + self.expert))

    def expert_nodes(self) -> tuple[int, ...]:
        """The node of each rank of this rank's expert group."""
        return tuple(rank // self.node_size for rank in self.expert_ranks())

    def in_node(self) -> tuple[int, ...]:
        """The ranks of this rank's expert group that share its node."""
        first, node = self.rank - self.expert_rank, self.node * self.node_size
        return tuple(range(max(first, node), min(first + self.expert, node + self.node_size)))

    def across_nodes(self) -> tuple[int, ...]:
        """The ranks of this rank's expert group at its place of each node; all nodes hold equally many of the group."""
        ranks, places = self.expert_ranks(), len(self.in_node())
        return ranks[self.expert_rank % places :: places]

    def line(self, column: int) -> tuple[int, ...]:
        """The ranks of one pipeline, in order."""
        return tuple(position * self.width + column for position in range(self.pipeline))

    def replicas(self, positions: Iterable[int], expert_rank: int | None) -> tuple[int, ...]:
        """Ranks that hold the same parameters of stages that live at these pipeline positions.

        Dense ones are on all data ranks; those of experts only where the position in the expert group is `expert_rank`.
        """
        return tuple(
            position * self.width + column
            for position in sorted(positions)
            for column in range(self.width)
            if expert_rank is None or column % self.expert == expert_rank
        )

    # -- process groups
    def make_groups(self, use: str, sets: Iterable[tuple[int, ...]]) -> None:
        """Make one process group for each set of ranks; every rank of the world makes all of them, in one order."""
        for ranks in sets:
            options = communicator_options(dist.get_backend(), self.comm_sms, self.timeout)
            group = dist.new_group(list(ranks), timeout=self.timeout, pg_options=options, group_desc=use)
            if self.rank in ranks:
                self._groups[ranks, use] = group

    def group(self, ranks: tuple[int, ...], use: str) -> dist.ProcessGroup:
        """The group that `make_groups` made of `ranks` for `use`."""
        return self._groups[ranks, use]

    def connect(self) -> None:
        """Make the groups that a step needs besides those of replicas: experts, one for each direction of travel."""
        starts = range(0, self.world_size, self.expert)
        self.make_groups("all-to-all", (tuple(range(first, first + self.expert)) for first in starts))
        if self.pipeline > 1:
            for use in ("travel right", "travel left"):
                self.make_groups(use, (self.line(column) for column in range(self.width)))

    def connect_nodes(self) -> None:
        """Make the groups of ranks of an expert group that share a node, and that share a place in their nodes."""
        everyone = [replace(self, rank=rank) for rank in range(self.world_size)]
        self.make_groups("in node", sorted({mesh.in_node() for mesh in everyone}))
        self.make_groups("across nodes", sorted({mesh.across_nodes() for mesh in everyone}))

    def travel(self, source: int, target: int) -> dist.ProcessGroup:
        """The group that carries messages from pipeline position `source` to `target`; these are ranks in the group."""
        return self._right if target > source else self._left

    @cached_property
    def _right(self) -> dist.ProcessGroup:
        return self.group(self.line(self.rank % self.width), "travel right")

    @cached_property
    def _left(self) -> dist.ProcessGroup:
        return self.group(self.line(self.rank % self.width), "travel left")


def communicator_options(backend: str, sms: int | None, timeout: timedelta | None = None) -> Any:
    """What a process group is made with so that NCCL gives its communicator at most `sms` SMs; else None.

    This is `maxCTAs` of `ncclConfig_t`. For messages and all-to-all NCCL rounds it up to a power of two. Other backends
    take nothing of the kind.
    """
    if sms is None or "nccl" not in backend:
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = sms
    if timeout is not None:
        options._timeout = timeout
    return options
