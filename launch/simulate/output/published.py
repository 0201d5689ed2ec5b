"""Published figures of steps that were really run, to lay a simulated one beside them; nothing is fitted to them."""

from dataclasses import dataclass, field

from train.recipe import Recipe

SOURCE = "DeepSeek, Insights into DeepSeek-V3 (ISCA 2025, arXiv 2505.09343), table 4, multi-plane network"


@dataclass(frozen=True)
class Published:
    """One step. breakdown: seconds by `result.KINDS`. mfu: of the BF16 peak, in percent."""

    source: str
    step_seconds: float
    tokens_per_day: float
    breakdown: dict[str, float] = field(default_factory=dict)
    mfu: dict[str, float] = field(default_factory=dict)


V3 = Published(
    SOURCE,
    step_seconds=19.926,
    tokens_per_day=272.80e9,
    breakdown={
        "forward": 1.13,
        "backward_input": 1.99,
        "backward_weight": 0.48,
        "overlapped": 13.95,
        "bubble": 2.06,
        "optimizer": 0.29,
    },
    mfu={"causal": 38.94, "noncausal": 43.73},
)


def of(recipe: Recipe, cluster: str, tokens: int) -> Published | None:
    """What is published of this step; None unless model, layout, precision, batch and cluster are those of V3's run."""
    model, layout = recipe.model, recipe.parallel
    run = (
        *(cluster, recipe.precision, tokens, recipe.train.sequence_length),
        *(model.hidden_size, model.num_hidden_layers, model.n_routed_experts),
        *(layout.schedule, layout.pipeline, layout.data, layout.expert, layout.microbatch_size),
    )
    same = run == ("h800x2048", "fp8", 62_914_560, 4096, 7168, 61, 256, "dualpipe", 16, 128, 64, 1)
    return V3 if same else None
