"""A pipeline stage: consecutive layers, with the embedding on the first and head and MTP on the last.

`split_layers` shares the layers out by cost; `build` makes the stages that one rank holds, sharing the tensors of tied
parameters (the embedding, which MTP uses again) where both uses are on that rank. Parameters carry Hugging Face's names
with global layer numbers, whatever the layout.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from kernels.linear import Numerics
from parallel.errors import UserError
from parallel.experts import Dispatcher
from parallel.passes import Segment
from train.model.config import ModelConfig
from train.model.head import Embedding, output_head, scoring
from train.model.layer import Layer
from train.model.moe import MoE
from train.model.mtp import MTPModule
from train.model.parts import Norm
from train.model.router import Router

EMBEDDING = "model.embed_tokens.weight"


class Body(nn.Module):
    """What Hugging Face calls `model`: embedding, layers by global number, final norm; a stage has some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()


class Stage(nn.Module):
    """Stage `index` of `count`. Its `segments` are what the passes of `parallel` walk through."""

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics,
        dispatcher: Dispatcher,
        index: int,
        count: int,
        layers: range,
        embed: Embedding | None,
        experts: tuple[int, int],
    ) -> None:
        """layers: global numbers; embed: the embedding if this stage uses it; experts: (first, local) held here."""
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == count - 1
        self.model = Body()
        segments: list[Segment] = []
        if embed is not None:
            self.model.embed_tokens = embed
        if self.is_first and embed is not None:
            segments.append(embed.segment())
        for number in layers:
            layer = Layer(config, number, numerics, *experts)
            self.model.layers[str(number)] = layer
            segments += layer.segments(dispatcher)
        if self.is_last:
            self.model.norm = Norm(config.hidden_size, config.rms_norm_eps, numerics)
            self.lm_head = output_head(config, numerics)
            segments.append(scoring(config.num_hidden_layers, self.model.norm, self.lm_head, 0))
            for depth in range(1, config.num_nextn_predict_layers + 1):
                assert embed is not None
                module = MTPModule(config, depth, numerics, *experts)
                self.model.layers[str(module.number)] = module
                segments += module.chain(dispatcher, embed, self.lm_head)
        self.segments: Sequence[Segment] = segments

    def routers(self) -> dict[int, Router]:
        """The router of each MoE layer, MTP's included, by global layer number."""
        layers = ((int(number), layer.mlp) for number, layer in self.model.layers.items())
        return {number: mlp.gate for number, mlp in layers if isinstance(mlp, MoE)}


def embedding_stages(config: ModelConfig, count: int) -> set[int]:
    """The stages that use the embedding: the first, and the last when there is MTP."""
    return {0, count - 1} if config.num_nextn_predict_layers else {0}


def build(
    config: ModelConfig,
    numerics: Numerics,
    dispatcher: Dispatcher,
    held: Iterable[int],
    layers: Sequence[range],
    experts: tuple[int, int],
) -> dict[int, Stage]:
    """The stages `held` by a rank, by number; layers: those of every stage. Parameters are not initialised."""
    count = len(layers)
    users = embedding_stages(config, count)
    embed = Embedding(config, numerics) if users & set(held) else None
    return {
        index: Stage(
            config, numerics, dispatcher, index, count, layers[index], embed if index in users else None, experts
        )
        for index in sorted(held)
    }


# ---------------------------------------------------------------- sharing out the layers
def layer_costs(config: ModelConfig) -> tuple[list[float], float]:
    """Multiply-adds a token of each layer, and of what the last stage does besides (head, MTP)."""
    heads, width = config.num_attention_heads, config.hidden_size
    queries = config.q_lora_rank or 0
    attention = (
        (width * queries + queries * heads * config.qk_head_dim if queries else width * heads * config.qk_head_dim)
        + width * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * width
    )
    dense = attention + 3 * width * config.intermediate_size
    active = config.num_experts_per_tok + config.n_shared_experts
    moe = attention + 3 * width * config.moe_intermediate_size * active + width * config.n_routed_experts
    head = width * config.vocab_size
    ends = head + config.num_nextn_predict_layers * (moe + 2 * width * width + head)
    return [moe if config.is_moe(number) else dense for number in range(config.num_hidden_layers)], ends


def split_layers(config: ModelConfig, count: int, given: Sequence[int] | None = None) -> list[range]:
    """The layers of each of `count` stages: `given` numbers of layers, or so that the costliest stage is cheapest.

    Raises UserError if there are fewer layers than stages, or `given` does not add up.
    """
    total = config.num_hidden_layers
    if given is None:
        if total < count:
            raise UserError(f"model.num_hidden_layers={total}: expected at least one layer for each of {count} stages")
        given = _even(*layer_costs(config), count)
    if len(given) != count or sum(given) != total or min(given) < 1:
        raise UserError(
            f"parallel.layers_per_stage={list(given)}: expected {count} numbers of at least 1 that add up to "
            f"model.num_hidden_layers={total}; these are {len(given)} and add up to {sum(given)}"
        )
    starts = [sum(given[:index]) for index in range(count + 1)]
    return [range(starts[index], starts[index + 1]) for index in range(count)]


def _even(costs: list[float], ends: float, count: int) -> list[int]:
    """Numbers of consecutive layers that minimise the costliest stage, `ends` being added to the last."""
    total = len(costs)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # layers shared out -> (costliest stage, numbers)
    for stage in range(count):
        last = stage == count - 1
        reached: dict[int, tuple[float, list[int]]] = {}
        for done, (worst, numbers) in best.items():
            room = range(total, total + 1) if last else range(done + 1, total - (count - 1 - stage) + 1)
            for upto in room:
                cost = max(worst, sum(costs[done:upto]) + (ends if last else 0.0))
                if upto > done and (upto not in reached or cost < reached[upto][0]):
                    reached[upto] = (cost, [*numbers, upto - done])
        best = reached
    return best[total][1]
