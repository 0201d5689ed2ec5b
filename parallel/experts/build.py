"""Which dispatcher a layout gets: the recipe's `parallel.dispatch`, made for this rank of the mesh."""

import torch

from parallel.errors import UserError
from parallel.experts import deepep
from parallel.experts.all_to_all import AllToAll
from parallel.experts.dispatch import Dispatcher, Limit, no_limit
from parallel.experts.hierarchical import Hierarchical
from parallel.experts.local import LocalExperts
from parallel.mesh import Mesh

CHOICES = ("auto", "local", "all_to_all", "hierarchical", "deepep")


def choose(choice: str, expert: int, node_size: int) -> str:
    """What `choice` means for expert groups of `expert` consecutive ranks, on nodes of `node_size`.

    auto: `local` for groups of one, `hierarchical` for groups of several whole nodes, else `all_to_all`. Raises
    `UserError` for what the layout cannot have.
    """
    if choice == "auto":
        spans_nodes = expert > node_size and expert % node_size == 0
        return "local" if expert == 1 else "hierarchical" if spans_nodes else "all_to_all"
    if choice == "local" and expert > 1:
        raise UserError(
            f"parallel.dispatch=local: expected parallel.expert=1 (all experts on every rank), not {expert}"
        )
    if choice == "hierarchical" and expert % node_size and node_size % expert:
        raise UserError(
            f"parallel.dispatch=hierarchical: expected parallel.expert={expert} to be a multiple or a divisor of "
            f"parallel.node_size={node_size}, so that an expert group has equally many ranks on each of its nodes"
        )
    if choice == "deepep":
        deepep.check_group(expert, node_size)
    return choice


def check_device(choice: str, device: torch.device) -> None:
    """Raise `UserError` for a dispatcher that cannot run on `device`."""
    if choice == "deepep":
        deepep.check_device(device)


def build(
    choice: str,
    mesh: Mesh,
    experts: int,
    fp8: bool = False,
    chunks: int = 1,
    align: int = 1,
    limit: Limit = no_limit,
) -> Dispatcher:
    """The dispatcher of this rank for layers of `experts` experts; all ranks of the world call this together.

    fp8: of rows on their way to experts. chunks: of `hierarchical`. align: of each expert's rows. limit: told of rows.
    """
    choice = choose(choice, mesh.expert, min(mesh.node_size, mesh.world_size))
    if choice == "local":
        return LocalExperts(experts, align)
    group = mesh.group(mesh.expert_ranks(), "all-to-all")
    if choice == "all_to_all":
        return AllToAll(experts, group, mesh.expert_nodes(), fp8, align, limit)
    if choice == "deepep":
        return deepep.DeepEP(experts, group, fp8, align, limit, mesh.comm_sms)
    mesh.connect_nodes()
    across = mesh.group(mesh.across_nodes(), "across nodes")
    inside = mesh.group(mesh.in_node(), "in node")
    return Hierarchical(experts, group, across, inside, chunks, fp8, align, limit)
