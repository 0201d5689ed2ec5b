"""ZeRO-1: every rank of a replica group keeps a share of the masters and moments, DeepSpeed's `BF16_Optimizer` inside.

Parameters with the same replicas form a bucket. DeepSpeed lays a bucket out flat: parameters, gradients (`main_grad`
views, in the wide dtype) and this rank's equal share of the masters. What DeepSpeed would do for its own parallelism is
done here for any replica groups: the sum over the group, a norm that counts every element once, a step that may be
skipped, and shards by parameter name for checkpoints. Buckets come from `parallel/replicas.py`, AdamW from
`train/optim.py`.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.nn import Parameter

from parallel.experts.shard import global_shape, global_span
from parallel.flat_shard import FlatShard
from parallel.trace import OFF, Trace

# Known beforehand, DeepSpeed need not guess it, nor print that it did.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.precision_config import DeepSpeedBF16Config

deepspeed.ops.__compatible_ops__ = {}  # asked for, it would probe compilers and build a shared-memory collective (40 s)
bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it collects garbage and prints, several times a bucket
# torch 2.13 has new names for two collectives, which torch 2.11 and DeepSpeed lack.
warnings.filterwarnings("ignore", message=".*(reduce_scatter|all_gather)_single", category=FutureWarning)


PIECE = 1 << 16  # elements whose squares are summed at a time: widened, they still fit a cache


@dataclass(frozen=True)
class Bucket:
    """Parameters that the same ranks replicate, in an order on which those ranks agree.

    A parameter may be a part of a global tensor (`parallel.experts.shard`).
    stages: the pipeline stages that use the parameters; several use a tied one.
    """

    ranks: tuple[int, ...]
    kind: str  # "dense" | "experts"
    group: dist.ProcessGroup
    parameters: dict[str, Parameter]
    stages: frozenset[int] = frozenset()


class ShardOptimizer(Protocol):
    """What ZeRO-1 asks of an optimizer over flat shards, one shard a group.

    A group's "decayed" lists the parts of its shard that decay; `state[shard]` holds moments of the shard's shape.
    """

    param_groups: list[dict[str, Any]]
    applied_steps: int

    def start(self) -> None:
        """Allocate the moments."""

    def step(self) -> None:
        """Move every shard by its `grad`."""


class ZeRO1(bf16_optimizer.BF16_Optimizer):
    """The optimizer of one rank's buckets.

    adamw: makes the optimizer from torch's parameter groups. clip: the largest global gradient norm.
    wide: dtype of masters and gradients: FP32, or FP64 when parameters are FP64, whose masters would lose bits in FP32.

    gradient_scale: what gradients have been multiplied by before they come here; norm and step take it out again. Exact
    for a power of two.

    From construction on, parameters are views of flat buffers and `main_grad` is a view that stays the same tensor.
    Construction communicates with nobody; the other calls do so within the buckets' groups, in the buckets' order, and
    `grad_norm` with the whole world.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        adamw: Callable[[list[dict[str, Any]]], ShardOptimizer],
        *,
        clip: float,
        wide: torch.dtype = torch.float32,
        trace: Trace = OFF,
    ):
        for bucket in buckets:
            if len({parameter.dtype for parameter in bucket.parameters.values()}) != 1:
                raise ValueError(f"the {bucket.kind} bucket of ranks {bucket.ranks} must hold one dtype")
            if dist.get_process_group_ranks(bucket.group) != list(bucket.ranks):
                raise ValueError(f"the group of the {bucket.kind} bucket must hold its ranks {bucket.ranks}, in order")
        self.buckets = buckets
        self.groups = [bucket.group for bucket in buckets]
        self.wide = wide
        self.trace = trace
        self.gradient_scale = 1.0
        self.reducing: dict[int, Any] = {}  # bucket -> its reduction in flight
        self.watching = False
        self.not_finite: dict[str, int] = {}
        # Tells deepspeed.comm of the process group that exists.
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
        super().__init__(
            adamw([{"params": list(bucket.parameters.values())} for bucket in buckets]),
            param_names={parameter: name for bucket in buckets for name, parameter in bucket.parameters.items()},
            bfloat16_config=DeepSpeedBF16Config(enabled=True),
            clip_grad=clip,
            dp_process_group=self.groups[0],
            grad_acc_dtype=torch.float32,  # the widest that DeepSpeed lets pass; replaced below
        )
        for parameters, gradients in zip(self.bf16_groups, self.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.main_grad = gradient.view_as(parameter)
        for group in self.param_groups:
            group["decayed"] = []
        for _, parameter, fragment in self.fragments():
            if parameter.dim() > 1:  # gains of norms do not decay
                self.param_groups[fragment.param_group_index]["decayed"].append(fragment.hp_fragment.detach())
        self.optimizer.start()
        self._lazy_init_hp_params_optimizer_state()

    def _setup_for_real_optimizer(self) -> None:
        self.real_dp_process_group = self.groups
        self.grad_acc_dtype = self.wide
        super()._setup_for_real_optimizer()

    def _link_all_hp_params(self) -> None:
        # DeepSpeed has just made FP32 masters; this is the last moment at which others can take their place.
        if self.wide != torch.float32:
            for index, (group, shares) in enumerate(zip(self.groups, self.bf16_partitioned_groups, strict=True)):
                master = shares[dist.get_rank(group)].detach().clone().to(self.wide).requires_grad_()
                self.masters[index] = master
                self.param_groups[index]["params"] = [master]
        super()._link_all_hp_params()
        # A view keeps what it views: DeepSpeed's maps would lead back to the parameters that hold them, a circle
        # through C++ that the garbage collector cannot see, with gradients, masters and process groups in it.
        for _, _, fragment in self.fragments():
            fragment.lp_fragment, fragment.hp_fragment = fragment.lp_fragment.data, fragment.hp_fragment.data

    @property
    def masters(self) -> list[torch.Tensor]:
        """This rank's share of each bucket's master weights, flat, in the wide dtype."""
        return self.fp32_groups_flat_partition

    @property
    def gradient_shards(self) -> list[torch.Tensor]:
        """The same share of each bucket's gradients: parts of the buffers that `main_grad` views."""
        return self.fp32_groups_gradient_flat_partition

    def fragments(self) -> Iterator[tuple[str, Parameter, Any]]:
        """(name, parameter, DeepSpeed's map of its part) of every parameter that reaches into this rank's shares."""
        for parameters in self.bf16_groups:
            for parameter in parameters:
                if parameter._hp_mapping is not None:
                    yield self.param_names[parameter], parameter, parameter._hp_mapping

    def reduce_stage(self, stage: int) -> None:
        """Start to sum the gradients of the parameters that `stage` alone uses: the last of them has been added.

        All ranks of a group must start its reductions in one order. Tied parameters wait for `reduce_gradients`.
        """
        for index, bucket in enumerate(self.buckets):
            if bucket.stages == {stage}:
                self._reduce(index)

    def reduce_gradients(self) -> None:
        """Sum each bucket's gradients over its group, each rank into its share. Other parts hold garbage afterwards.

        Starts what has not been started yet, in the buckets' order, and waits for all.
        """
        for index in range(len(self.buckets)):
            if index not in self.reducing:
                self._reduce(index)
        for work in self.reducing.values():
            self.trace.wait("gradients", "gradients", work)
        self.reducing.clear()

    @torch.no_grad()
    def _reduce(self, index: int) -> None:
        if self.watching:
            for name, gradient in zip(self.buckets[index].parameters, self.fp32_groups_gradients[index], strict=True):
                if count := int((~gradient.isfinite()).sum()):
                    self.not_finite[name] = count
        whole, shard, group = self.fp32_groups_gradients_flat[index], self.gradient_shards[index], self.groups[index]
        if group.size() > 1:
            work = dist.reduce_scatter_tensor(shard, whole, group=group, async_op=True)
            self.reducing[index] = work
            stages = " and ".join(map(str, sorted(self.buckets[index].stages)))
            self.trace.post("gradients", f"{self.buckets[index].kind}, stage {stages}", work, whole.nbytes)

    def watch(self, on: bool) -> None:
        """Whether to count, parameter by parameter, what is not finite in this rank's own gradients before the sum.

        `not_finite` then holds the counts above zero since this call.
        """
        self.watching, self.not_finite = on, {}

    @torch.no_grad()
    def grad_norm(self, spoilt: bool = False) -> torch.Tensor:
        """The global L2 norm of the reduced gradients: a FP64 scalar, the same on every rank of the world.

        Each element lies in exactly one rank's share, so that nothing is counted twice, however often it is replicated.
        spoilt: make it NaN, for all.
        """
        pieces = (piece.double() for shard in self.gradient_shards for piece in shard.split(PIECE))
        total = torch.stack([torch.dot(piece, piece) for piece in pieces]).sum()
        if spoilt:
            total.fill_(float("nan"))
        dist.all_reduce(total)
        return total.sqrt() / self.gradient_scale

    @torch.no_grad()
    def step(self, lr: float, norm: torch.Tensor, allowed: bool = True) -> bool:
        """Clip by the global norm, apply AdamW to the masters, cast and gather the parameters, clear the gradients.

        With a norm that is not finite, or unless it is `allowed` (the same on all ranks), nothing moves, the gradients
        are cleared and the answer is False, on all ranks.
        """
        if not (allowed and torch.isfinite(norm)):
            self.zero_grad()
            return False
        scale = min(1.0, self.clip_grad / (norm.item() + 1e-6)) / self.gradient_scale
        for master, shard in zip(self.masters, self.gradient_shards, strict=True):
            master.grad = shard.mul_(scale)
        for group in self.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.update_lp_params()
        self.zero_grad()
        return True

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear the gradients where they are: a parameter's `grad` may be its `main_grad`, and stays that."""
        super().zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: `{"master", "exp_avg", "exp_avg_sq": {name: FlatShard}, "applied_steps": scalar}`.

        The shards share this rank's memory, so that loading into them restores it; `load_state_dict` then finishes.
        """
        state: dict[str, Any] = {"applied_steps": torch.tensor(self.optimizer.applied_steps)}
        for name, parameter, fragment in self.fragments():
            shards = {"master": fragment.hp_fragment.detach(), **fragment.optim_fragment}
            for key, shard in shards.items():
                state.setdefault(key, {})[name] = flat_shard(shard, parameter, fragment)
        return state

    def by_name(self, flats: list[torch.Tensor]) -> dict[str, FlatShard]:
        """Tensors laid out as `masters`, one a bucket (an average of them, say), cut as those are for a checkpoint."""
        found = {}
        for name, parameter, fragment in self.fragments():
            index = fragment.param_group_index
            first = fragment.hp_fragment.storage_offset() - self.masters[index].storage_offset()
            shard = flats[index][first : first + fragment.hp_fragment.numel()]
            found[name] = flat_shard(shard, parameter, fragment)
        return found

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that was loaded into `state_dict()`'s tensors: parameters become the cast of the masters."""
        self.optimizer.applied_steps = int(state["applied_steps"])
        self.update_lp_params()
        self.zero_grad()


def flat_shard(local: torch.Tensor, parameter: Parameter, fragment: Any) -> FlatShard:
    """`local` as the part of the global parameter that DeepSpeed's map of this rank's part says."""
    return FlatShard(local, global_span(parameter)[0] + fragment.lp_fragment_address.start, global_shape(parameter))
