"""The router: sigmoid affinities, node-limited top-k, balance by a bias that no gradient trains.

The order of operations is that of the report (section 2.1.2, equations 12 to 20) where it and the released code agree,
and of the code where they differ: the bias enters selection only, a group's score is the sum of its two best biased
affinities, unchosen groups are -inf, and a token's weights are its unbiased affinities over their sum, times the route
scale. T tokens, E experts, K chosen experts, G groups, B sequences.
"""

import torch
from torch import Tensor, nn

from kernels.linear import Numerics, linear
from train.model.config import ModelConfig


class Router(nn.Module):
    """Chooses K experts for each token; named `gate` in the model, as in Hugging Face's.

    e_score_correction_bias: FP32 [E], moved once a step by `balance`. load: int64 [E], tokens that chose each expert
    since the last step, over this rank's micro-batches. force_balanced: `go_round` instead of `choose`.
    """

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics
        self.force_balanced = False
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, dtype=numerics.dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, x_TD: Tensor, experts_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, K] and affinities [T, E], both in the wide dtype, and chosen experts [T, K].

        experts_TK: what was chosen before, if these tokens have been routed already.
        """
        config = self.config
        (logits_TE,) = linear(x_TD, (self.weight,), self.numerics, fp8=False, wide_out=True)
        scores_TE = logits_TE.sigmoid()
        if experts_TK is None:
            detached = scores_TE.detach()
            experts_TK = self.go_round(detached) if self.force_balanced else self.choose(detached)
        weights_TK = scores_TE.gather(1, experts_TK)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK * config.routed_scaling_factor, scores_TE, experts_TK

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The K best experts of the best `topk_group` groups, by biased affinity: [T, K]."""
        config = self.config
        biased_TE = scores_TE + self.e_score_correction_bias
        if config.topk_group < config.n_group:
            grouped_TGE = biased_TE.unflatten(1, (config.n_group, -1))
            group_scores_TG = grouped_TGE.topk(2, -1).values.sum(-1)
            chosen = group_scores_TG.topk(config.topk_group, -1, sorted=False).indices
            left_out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, chosen, False)
            biased_TE = grouped_TGE.masked_fill(left_out_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return biased_TE.topk(config.num_experts_per_tok, -1).indices

    def go_round(self, scores_TE: Tensor) -> Tensor:
        """K experts for each token by its number alone, as benchmarks use them: [T, K], whatever the affinities.

        Token t takes its experts in turn from `topk_group` neighbouring groups, the first being group t mod G; each
        group gives its own in turn. All loads are equal if G divides T and E divides T*K, and nearly so otherwise.
        """
        config, device = self.config, scores_TE.device
        groups, window, chosen = config.n_group, config.topk_group, config.num_experts_per_tok
        size = config.n_routed_experts // groups
        group_G = torch.arange(groups, device=device)
        place_GG = (group_G - group_G.unsqueeze(1)) % groups  # [first group of a window, group]: its place in there
        takes_GG = torch.where(place_GG < window, (chosen - 1 - place_GG) // window + 1, 0)  # by one token
        before_GG = takes_GG.cumsum(0) - takes_GG  # by the tokens since the last whole round of G
        token_T1, turn_K = torch.arange(len(scores_TE), device=device).unsqueeze(1), torch.arange(chosen, device=device)
        first_T1 = token_T1 % groups
        group_TK = (first_T1 + turn_K % window) % groups
        given_TK = token_T1 // groups * chosen + before_GG[first_T1, group_TK] + turn_K // window
        return group_TK * size + given_TK % size

    def count(self, experts_TK: Tensor) -> None:
        """Add this micro-batch's choices to `load`."""
        chosen = experts_TK.flatten()
        self.load.scatter_add_(0, chosen, torch.ones_like(chosen))  # unlike bincount, nothing for the host to wait for

    @torch.no_grad()
    def balance(self, load_E: Tensor, speed: float) -> None:
        """Move the bias against the load of the whole global batch: up for experts below the mean, down above it."""
        load_E = load_E.to(self.e_score_correction_bias.dtype)
        self.e_score_correction_bias += speed * torch.sign(load_E.mean() - load_E)


def balance_loss(scores_BTE: Tensor, chosen: int) -> Tensor:
    """Sum over sequences of sum_i f_i P_i (equations 17 to 20, without alpha).

    f_i: share of tokens whose unbiased, ungrouped top-K contains expert i, scaled so that uniform routing gives 1.
    P_i: mean over the sequence of the affinity's share among all experts.
    """
    _, tokens, experts = scores_BTE.shape
    best = scores_BTE.detach().topk(chosen, -1, sorted=False).indices.flatten(1)
    counts_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add_(1, best, torch.ones_like(best, dtype=scores_BTE.dtype))
    share_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (counts_BE * (experts / (chosen * tokens)) * share_BE).sum()


def max_violation(load_E: Tensor) -> float:
    """(largest load - mean load) / mean load: 0 when perfectly balanced."""
    mean = load_E.double().mean()
    return float((load_E.max() - mean) / mean) if mean > 0 else 0.0
