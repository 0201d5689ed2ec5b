"""What a MoE layer of DeepSeek-V3 keeps of a token until backward: `python -m tests.benchmarks.activation_memory`.

The real segments of one layer at the shapes of recipe `v3` run forward on fake tensors: as much memory as on a GPU,
none of it touched. What is still alive when forward has ended is what their graphs and the tape keep. It is counted
once, whoever holds it, and told apart by its shape. Routing is even, all experts are in one place: a rank with 4 of 256
experts gets as many rows from its 64 ranks. On a GPU attention keeps 512 bytes more: FP32 sums of exponentials, one for
each head.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.linear import Numerics
from parallel.experts import LocalExperts, local
from parallel.passes import Microbatch, Segment, Tape, forward, merge
from train.compose import compose
from train.model.config import ModelConfig
from train.model.layer import Layer
from train.model.router import Router

TOKENS = 4096


class Allocated(TorchDispatchMode):
    """Remembers, weakly, the memory of everything that operators return, with the shape that it had first."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int, torch.Size]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for tensor in _tensors(results):
            memory = tensor.untyped_storage()
            if memory._cdata not in given:  # else a view of what was there
                self.seen[memory._cdata] = StorageWeakRef(memory), memory.nbytes(), tensor.shape
        return results

    def alive(self) -> list[tuple[torch.Size, int]]:
        """Shape and bytes of what is still held by somebody."""
        return [(shape, size) for memory, size, shape in self.seen.values() if not memory.expired()]


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class OneLayer:
    """A stage of one layer, whose output nobody keeps."""

    segments: list[Segment]
    index: int = 0
    is_first: bool = False
    is_last: bool = True
    tape: Tape = field(default_factory=list)


def widths(config: ModelConfig) -> dict[str, tuple[int, set[int]]]:
    """Parts of a layer: rows of each token, and how wide they are. In FP8 and E5M6 every 128 values have a scale."""
    out, expert = config.num_attention_heads * config.v_head_dim, config.moe_intermediate_size
    chosen = config.num_experts_per_tok

    def with_scales(*wide: int) -> set[int]:
        return {*wide, *(-(-each // 128) for each in wide)}

    return {
        "residual stream, before and after attention": (1, {config.hidden_size}),
        "latents": (1, {config.q_lora_rank or 0, config.kv_lora_rank, config.qk_rope_head_dim}),
        "attention output": (1, {*with_scales(out), out // 8 * 3}),
        "routed experts' input": (chosen, with_scales(config.hidden_size)),
        "routed experts' gate and up": (chosen, with_scales(2 * expert)),
        "shared expert's gate, up and SwiGLU output": (1, with_scales(config.n_shared_experts * expert)),
        "routed experts' SwiGLU output": (chosen, with_scales(expert)),
    }


REST = "routing, and what norms keep of a row"


def kept(precision: str, recompute: Collection[str] | None = None, tokens: int = TOKENS) -> dict[str, float]:
    """Bytes of each part that one MoE layer keeps of a token; recompute: as recipe `v3` unless told."""
    recipe = compose(["recipe=v3", "data.path=none"])
    config, experts = recipe.model, recipe.model.n_routed_experts
    even = [tokens * config.num_experts_per_tok // experts] * experts
    with (
        FakeTensorMode(),
        patch.object(local, "host_counts", lambda counts: even),
        patch.object(Router, "count", lambda router, experts_TK: None),
    ):
        numerics = Numerics(precision, recompute=recipe.train.recompute if recompute is None else recompute)
        layer = Layer(config, config.first_k_dense_replace, numerics, 0, experts)
        stage = OneLayer(layer.segments(LocalExperts(experts)))
        run(stage, tokens, config.hidden_size)  # what is computed once: rotations, quantised weights
        stage.tape.clear()
        with Allocated() as memory:
            run(stage, tokens, config.hidden_size)
        found = dict.fromkeys([*widths(config), REST], 0.0)
        for shape, size in memory.alive():
            found[part_of(shape, tokens, config)] += size / tokens
    return found


def run(stage: OneLayer, tokens: int, width: int) -> None:
    """Forward of one sequence; the stage's tape has it afterwards."""
    hidden = torch.empty(1, tokens, width, dtype=torch.bfloat16)
    merge(forward(stage, hidden, Microbatch(0, None), stage.tape))


def part_of(shape: torch.Size, tokens: int, config: ModelConfig) -> str:
    """The part that a tensor of this shape belongs to."""
    for part, (rows, wide) in widths(config).items():
        for dimensions in (1, 2):  # attention's output has its heads apart
            if shape[:-dimensions].numel() == rows * tokens and shape[-dimensions:].numel() in wide:
                return part
    return REST


COLUMNS: dict[str, tuple[str, Collection[str] | None]] = {
    "BF16, `norms` and `mla_up` recomputed": ("bf16", ("norms", "mla_up")),
    "BF16, `swiglu` too": ("bf16", None),
    "FP8": ("fp8", None),
}
"""FP8 makes SwiGLU's output again in either case."""


def table() -> str:
    """All columns and the ratios to FP8, in Markdown."""
    columns = [kept(*of) for of in COLUMNS.values()]
    lines = [["bytes of a token", *COLUMNS, "FP8 / first", "FP8 / second"], ["---"] * (len(COLUMNS) + 3)]
    for part in [*columns[0], "sum"]:
        found = [sum(column.values()) if part == "sum" else column[part] for column in columns]
        ratios = [f"{found[-1] / other:.3f}" if other else "" for other in found[:-1]]
        lines.append([part, *(f"{size:,.0f}" for size in found), *ratios])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
