"""A world of fake ranks: the recipe's mesh, dispatcher and stages, as one rank of the cluster would build them.

Process groups are PyTorch's fake ones, so a world of 2,048 ranks takes milliseconds; tensors are fake too. What has no
answer without values is how many rows go where. A dispatcher asks for that in one place, `host_counts`, and `Balanced`
answers for tokens that go round all experts alike, each to as many groups as the router allows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # torch's shape functions import it when they are first called, which takes a second
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from kernels.linear import Numerics, attach_main_grads
from launch.simulate.stages.work import StageWork, study
from parallel.experts import Dispatcher, all_to_all, hierarchical, local
from parallel.experts.all_to_all import AllToAll
from parallel.experts.build import build as build_dispatcher
from parallel.experts.hierarchical import Hierarchical
from parallel.mesh import Mesh
from parallel.passes import Microbatch
from train.model.stage import EMBEDDING, build, split_layers
from train.recipe import Recipe

LOSSES = ("loss", "mtp_loss", "balance_loss")


@contextmanager
def fake_groups(ranks: int, rank: int = 0) -> Iterator[None]:
    """The default process group is a fake one of `ranks`."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_world(ranks: int, rank: int = 0) -> Iterator[None]:
    """The same, and tensors say that they are on the CPU but have no values."""
    with fake_groups(ranks, rank), FakeTensorMode(allow_non_fake_inputs=True):
        yield


class Balanced:
    """What a dispatcher reads of its row counts, were tokens spread over experts as evenly as the router's rule allows.

    What does not divide goes round in such a way that each rank expects what the others give. chosen: experts of a
    token. groups: nodes that a token may reach. load: how many times its share of rows this rank is given.
    """

    def __init__(self, dispatcher: Dispatcher, chosen: int, groups: int, load: float = 1.0) -> None:
        self.dispatcher, self.chosen, self.groups, self.load = dispatcher, chosen, groups, load
        self._dispatch, self.tokens = dispatcher.dispatch, 0

    def dispatch(self, x_TD: Tensor, *routing: Any) -> Any:
        """`Dispatcher.dispatch`, whose tokens are counted: an MTP module has fewer of them."""
        self.tokens = len(x_TD)
        return self._dispatch(x_TD, *routing)

    def __call__(self, counts: Tensor) -> list[int]:
        one, rows = self.dispatcher, self.tokens * self.chosen
        mine = round(rows * self.load)
        if isinstance(one, Hierarchical):
            copies = self.tokens * min(self.groups, one.nodes, self.chosen)
            out = [n for part in _even(copies, one.chunks) for n in _even(part, one.nodes, one.node)]
            on = [n for part in _even(rows, one.chunks) for n in _even(part, one.places, one.place)]
            given = [n for part in _even(mine, one.chunks) for n in _even(part, one.places, one.place)]
            return [*out, *out, *on, *given, *_even(mine, one.in_rank)]
        if isinstance(one, AllToAll):
            each = _even(rows, one.size, one.channel.group.rank())
            given = _even(mine, one.size, one.channel.group.rank())
            return [*each, *given, *_even(mine, one.experts // one.size)]
        return _even(rows, len(counts))


def _even(total: int, parts: int, turn: int = 0) -> list[int]:
    """`total` in parts that differ by one at most; turned, so that part i of turn j is part j of turn i."""
    ends = [total * part // parts for part in range(parts + 1)]
    return [ends[i + 1] - ends[i] for i in ((part + turn) % parts for part in range(parts))]


@contextmanager
def balanced(dispatcher: Dispatcher, recipe: Recipe, load: float = 1.0) -> Iterator[None]:
    """The dispatcher's hosts are told `Balanced` counts, and what it relays is passed on at once."""
    counts = Balanced(dispatcher, recipe.model.num_experts_per_tok, recipe.model.topk_group, load)
    with (
        patch.object(dispatcher, "dispatch", counts.dispatch),
        patch.object(all_to_all, "host_counts", counts),
        patch.object(hierarchical, "host_counts", counts),
        patch.object(local, "host_counts", counts),
        patch.object(hierarchical, "Relay", Inline),
    ):
        yield


class Inline:
    """A relay between hops that has passed everything on before it returns (`parallel.experts.hierarchical.Relay`)."""

    def __init__(self, hops: hierarchical.Hops, thread: object) -> None:
        self.arrived, _ = hierarchical.run(hops)

    def wait(self) -> None:
        """All is there."""


def study_stages(
    recipe: Recipe,
    placement: tuple[tuple[int, ...], ...],
    seen: dict[tuple[object, ...], StageWork] | None = None,
    load: float = 1.0,
) -> dict[int, StageWork]:
    """What each stage's passes consist of. Stages of the same layers are looked at once.

    seen: those that were looked at before, by (first, last, whether each layer has experts); grows. load: how many
    times its share of rows the experts' rank is given.
    """
    layout, model = recipe.parallel, recipe.model
    stages = 1 + max(stage for held in placement for stage in held)
    shape = (layout.microbatch_size, recipe.train.sequence_length, model.hidden_size)
    found: dict[int, StageWork] = {}
    seen = {} if seen is None else seen
    with fake_groups(layout.world_size):
        node = layout.node_size or layout.world_size
        mesh = Mesh(layout.pipeline, layout.data, layout.context, layout.expert, rank=0, node_size=node)
        mesh.connect()
        on_gpu = recipe.precision == "fp8" and recipe.fp8.backend != "reference"
        numerics = Numerics(recipe.precision, "triton" if on_gpu else "reference", recipe.train.recompute)
        dispatcher = build_dispatcher(
            layout.dispatch,
            mesh,
            model.n_routed_experts,
            recipe.fp8_dispatch,
            layout.dispatch_chunks,
            numerics.row_align,
        )
        layers = split_layers(model, stages, layout.layers_per_stage)
        experts = 0, model.n_routed_experts // layout.expert
        with balanced(dispatcher, recipe, load):
            for number, held in enumerate(layers):
                key = (number == 0, number == stages - 1, *(model.is_moe(layer) for layer in held))
                if key not in seen:
                    with torch.device("meta"):
                        stage = build(model, numerics, dispatcher, (number,), layers, experts)[number]
                    attach_main_grads(stage, numerics.main_grad_dtype)

                    def batch() -> Microbatch:
                        tokens = torch.empty(shape[0], shape[1] + 1, dtype=torch.int64, device="meta")
                        return Microbatch(0, tokens, shape, dict.fromkeys(LOSSES, 1.0))

                    seen[key] = study(stage, numerics, batch, shape, {EMBEDDING})
                    numerics.bump()
                found[number] = seen[key]
    return found
