"""The model as it lives on this rank, and the phases of a step that run across ranks.

`Engine` puts together what `parallel` and `train.model` define: mesh, stages, pipeline, expert dispatch, ZeRO-1. It
knows nothing of data files, time or metrics; the trainer's loop calls its phases in order.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.fp8.health import shares
from kernels.linear import Numerics, attach_main_grads
from parallel import schedule
from parallel.experts import Dispatcher
from parallel.experts.build import build as build_dispatcher
from parallel.experts.dispatch import OPERATIONS
from parallel.experts.lockstep import agree, exchanges, predict
from parallel.mesh import Mesh
from parallel.passes import Microbatch
from parallel.pipeline import Pipeline
from parallel.replicas import buckets
from parallel.schedule import Program
from parallel.trace import OFF, Trace
from parallel.zero import ZeRO1
from train.load import RowLimit
from train.model.init import initialise
from train.model.router import Router
from train.model.stage import EMBEDDING, build, embedding_stages, split_layers
from train.optim import MOMENTS, AdamW16
from train.precision import fp8_backend
from train.recipe import Recipe

LOSSES = ("loss", "mtp_loss", "balance_loss")


@dataclass(frozen=True)
class Totals:
    """What one step, or one evaluation, added up over the whole global batch.

    losses: raw sums by name. loads: router number -> tokens that chose each expert, FP64 [E]. inside, across: bytes
    sent between ranks of a node, and between nodes, by operation of the dispatcher. asked: ranks asked to stop.
    """

    losses: dict[str, float]
    loads: dict[int, Tensor]
    inside: dict[str, int]
    across: dict[str, int]
    asked: int = 0


class Engine:
    """One rank's stages, pipeline and optimizer; parameters initialised by name, equal in every layout."""

    def __init__(self, recipe: Recipe, device: torch.device, trace: Trace = OFF) -> None:
        """The default process group exists and has the layout's size. All ranks construct their Engine together."""
        layout, model = recipe.parallel, recipe.model
        self.recipe, self.device = recipe, device
        self.numerics = Numerics(recipe.precision, fp8_backend(recipe, device), recompute=recipe.train.recompute)
        self.mesh = Mesh(
            layout.pipeline,
            layout.data,
            layout.context,
            layout.expert,
            rank=dist.get_rank(),
            node_size=layout.node_size or layout.world_size,
            timeout=timedelta(seconds=layout.timeout_seconds),
            comm_sms=layout.comm_sms,
        )
        self.mesh.connect()
        self.dispatcher = self._dispatcher()
        self.programs: dict[int, Program] = {}  # by sequences of the global batch
        program = self.program(recipe.train.batch.start)
        layers = split_layers(model, program.stages, layout.layers_per_stage)
        local = model.n_routed_experts // layout.expert
        held = program.placement[self.mesh.pipeline_rank]
        with torch.device(device):
            experts = self.mesh.expert_rank * local, local
            self.stages = build(model, self.numerics, self.dispatcher, held, layers, experts)
        for stage in self.stages.values():
            initialise(stage, recipe.train.seed, model.initializer_range)
        for router in self.routers().values():
            router.force_balanced = recipe.train.force_balanced
        tied = {EMBEDDING: embedding_stages(model, program.stages)}
        self.buckets = buckets(self.mesh, program.placement, self.stages, tied)
        optim = recipe.optim
        adamw = partial(
            AdamW16,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            moments=MOMENTS[optim.moments],
        )
        wide = self.numerics.main_grad_dtype
        self.optimizer = ZeRO1(self.buckets, adamw, clip=optim.clip, wide=wide, trace=trace)
        for stage in self.stages.values():
            attach_main_grads(stage, wide)
        self.pipeline = Pipeline(
            self.mesh,
            self.stages,
            self.numerics.weight_grads,
            self.numerics.dtype,
            device,
            self.optimizer.reduce_stage,
            trace,
        )
        self.in_lockstep: set[Program] = set()

    def _dispatcher(self) -> Dispatcher:
        """How tokens reach their experts in this layout."""
        recipe, layout = self.recipe, self.recipe.parallel
        experts, chunks = recipe.model.n_routed_experts, layout.dispatch_chunks
        align, limit = self.numerics.row_align, RowLimit.of(recipe, self.mesh.rank)
        return build_dispatcher(layout.dispatch, self.mesh, experts, recipe.fp8_dispatch, chunks, align, limit)

    # -- the batch
    @property
    def needs_tokens(self) -> bool:
        """Whether this rank feeds or scores micro-batches."""
        return any(stage.is_first or stage.is_last for stage in self.stages.values())

    def sequences(self, batch: int) -> dict[int, range]:
        """Which sequences (numbered in the global batch of `batch`) each micro-batch of this rank's pipeline has.

        As even as can be, over pipelines and then over micro-batches; some have none if there are too few.
        """
        mine = _share(range(batch), self.mesh.data_rank, self.mesh.data)
        count = self.program(batch).microbatches
        return {mb: _share(mine, mb, count) for mb in range(count)}

    def program(self, batch: int) -> Program:
        """The program of a global batch of `batch` sequences: the fewest micro-batches that the schedule can serve."""
        if batch not in self.programs:
            layout = self.recipe.parallel
            multiple = schedule.named(layout.schedule).multiple
            groups = -(-batch // (layout.data * layout.microbatch_size * multiple))
            built = schedule.build(layout.schedule, layout.pipeline, groups * multiple, layout.chunks)
            self.programs[batch] = built
        return self.programs[batch]

    def seeds(self, batch: int, length: int, mtp_weight: float) -> dict[str, float]:
        """Gradient of the objective by each raw loss sum: L_main + lambda/D sum_k L_k + alpha mean_sequences(L_bal).

        Times `loss_scale(batch * length)`, which the optimizer takes out again.
        """
        tokens = batch * length
        depths, scale = max(self.recipe.model.num_nextn_predict_layers, 1), loss_scale(tokens)
        return {
            "loss": scale / tokens,
            "mtp_loss": scale * mtp_weight / (depths * tokens),
            "balance_loss": scale * self.recipe.train.balance_alpha / batch,
        }

    # -- the phases of a step
    def forward_backward(
        self,
        tokens: Mapping[int, Tensor],
        batch: int,
        mtp_weight: float,
        length: int | None = None,
        asked: bool = False,
    ) -> Totals:
        """Run the step's program. Each stage's gradients, summed in `main_grad`, are on their way to its other copies.

        tokens: [sequences, length+1] int64 of each micro-batch, where `needs_tokens`. batch: sequences of the global
        batch. length: of each, in tokens, in this step; the recipe's unless told. asked: whether this rank has been
        asked to stop, which all learn from the totals.
        """
        length = length or self.recipe.train.sequence_length
        self.optimizer.gradient_scale = loss_scale(batch * length)
        return self._run(tokens, batch, length, self.seeds(batch, length, mtp_weight), training=True, asked=asked)

    def evaluate(self, tokens: Mapping[int, Tensor], batch: int) -> Totals:
        """Forward only, through the same program, for any number of sequences; routers stay as they are."""
        return self._run(tokens, batch, self.recipe.train.sequence_length, {}, training=False)

    def update(
        self,
        lr: float,
        bias_speed: float,
        totals: Totals,
        allows: Callable[[float], bool] | None = None,
        spoilt: bool = False,
    ) -> tuple[bool, float]:
        """Reduce, clip and apply the gradients, and move the router biases; returns (applied, gradient norm).

        A gradient that is not finite anywhere leaves everything everywhere as it was, and so does a norm that `allows`
        refuses (the same on all ranks). spoilt: this rank has found a reason to leave the step out; the norm is NaN.
        """
        self.optimizer.reduce_gradients()
        norm = self.optimizer.grad_norm(spoilt)
        applied = self.optimizer.step(lr, norm, allows is None or allows(float(norm)))
        if applied:
            self.numerics.bump()
            for number, router in self.routers().items():
                router.balance(totals.loads[number].to(self.device), bias_speed)
        return applied, float(norm)

    def fp8_health(self) -> dict[str, dict[str, Any]]:
        """By layer and kind what the FP8 of the last step did to it, over all ranks (`kernels/fp8/health.py`).

        Called by every rank, after a step that `numerics.health` was told to look at.
        """
        model = self.recipe.model
        layers = range(model.num_hidden_layers + model.num_nextn_predict_layers)
        counts, reaches = self.numerics.health.tables(layers, self.device)
        dist.all_reduce(counts)
        dist.all_reduce(reaches, dist.ReduceOp.MAX)
        return shares(layers, counts, reaches)

    def routers(self) -> dict[int, Router]:
        """The routers held here by global layer number."""
        return {number: router for stage in self.stages.values() for number, router in stage.routers().items()}

    # -- inside
    def _run(
        self,
        tokens: Mapping[int, Tensor],
        batch: int,
        length: int,
        seeds: Mapping[str, float],
        training: bool,
        asked: bool = False,
    ) -> Totals:
        program = self.program(batch)
        if not training:
            program = program.evaluation()
        width = self.recipe.model.hidden_size
        batches = {
            mb: Microbatch(mb, tokens.get(mb), (len(ids), length, width), seeds, training=training)
            for mb, ids in self.sequences(batch).items()
        }
        self._step(program, batches)
        return self._totals(batches, asked)

    def _step(self, program: Program, batches: Mapping[int, Microbatch]) -> None:
        """Run the program; the first time, make sure that the expert group does so in lockstep."""
        first_time, experts = program not in self.in_lockstep, self.mesh.group(self.mesh.expert_ranks(), "all-to-all")
        if first_time:  # what they are about to issue: ranks with unlike recipes would wait for each other forever
            visits = {number: exchanges(stage.segments) for number, stage in self.stages.items()}
            agree(experts, predict(program, self.mesh.pipeline_rank, visits, self.dispatcher.issues))
        self.dispatcher.log.clear()
        self.dispatcher.traffic.clear()
        self.pipeline.step(program, batches)
        if first_time:
            agree(experts, self.dispatcher.log)
            self.in_lockstep.add(program)

    def _totals(self, batches: Mapping[int, Microbatch], asked: bool) -> Totals:
        """Add up losses, router loads and bytes sent over the world, and clear the loads.

        Each loss of a micro-batch is computed, and each token routed by each layer, on one rank of a pipeline. Losses
        keep their places in a table while they are gathered, and are added in one order: the same in every schedule.
        """
        model = self.recipe.model
        depths = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
        routed = [number for number in (*range(model.num_hidden_layers), *depths) if model.is_moe(number)]
        columns = [("loss", model.num_hidden_layers)]
        columns += [("mtp_loss", number) for number in depths] + [("balance_loss", number) for number in routed]
        table = torch.zeros(len(batches), len(columns), dtype=torch.float64, device=self.device)
        for row, batch in zip(table, batches.values(), strict=True):
            for key, value in batch.losses.items():
                row[columns.index(key)] = value
        routers = self.routers()
        loads = torch.zeros(len(routed), model.n_routed_experts, dtype=torch.float64, device=self.device)
        for number, router in routers.items():
            loads[routed.index(number)] = router.load
            router.load.zero_()
        traffic = self.dispatcher.traffic
        sent = [[kind[operation] for operation in OPERATIONS] for kind in (traffic.inside, traffic.across)]
        sizes = torch.tensor(sent, dtype=torch.float64, device=self.device)
        asks = torch.tensor([asked], dtype=torch.float64, device=self.device)
        flat = torch.cat([table.flatten(), loads.flatten(), sizes.flatten(), asks])
        dist.all_reduce(flat)
        summed = flat.split([table.numel(), loads.numel(), sizes.numel(), 1])
        sums = summed[0].view_as(table).sum(0).tolist()
        losses = dict.fromkeys(LOSSES, 0.0)
        for (name, _), value in zip(columns, sums, strict=True):
            losses[name] += value
        inside, across = (
            dict(zip(OPERATIONS, map(int, numbers), strict=True)) for numbers in summed[2].view_as(sizes).tolist()
        )
        counted = dict(zip(routed, summed[1].view_as(loads).cpu(), strict=True))
        return Totals(losses, counted, inside, across, int(summed[3]))


def loss_scale(tokens: int) -> float:
    """The power of two nearest to `tokens`: times a mean over so many, gradients are about as large as one token's own.

    Else they would shrink as the batch grows, in FP8 below the floor of a tile's scale (`kernels/fp8/formats.py`). In
    other precisions a power of two changes no bit.
    """
    return 2.0 ** round(math.log2(tokens))


def _share(whole: range, index: int, count: int) -> range:
    """Part `index` of `count` parts as equal as can be."""
    return whole[len(whole) * index // count : len(whole) * (index + 1) // count]
