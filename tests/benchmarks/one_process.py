"""Recipe `tiny` in one process, step by step: what the benchmarks measure.

The engine is the one that `weft train` runs, in a world of one without a launcher; the phases of a step are those of
the trainer's loop, and the rows are the recipe's own real text in the order of a run.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train import data
from train.compose import compose
from train.data.sampler import row_ids
from train.engine import Engine, Totals
from train.optim import learning_rate, piecewise
from train.recipe import Recipe

LAYOUT = ("parallel.pipeline=1", "parallel.data=1", "parallel.expert=1", "parallel.schedule=1f1b")
WITHOUT_MTP = "model.num_nextn_predict_layers=0"


def start_world_of_one() -> None:
    """The process group that an engine needs, of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def recipe_of(*overrides: str) -> Recipe:
    """Recipe `tiny` for one process."""
    return compose(["recipe=tiny", *LAYOUT, *overrides])


def stretched(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with `steps` steps, and the learning rate's schedule stretched to them."""
    assert recipe.train.steps
    lr, stretch = recipe.optim.lr, steps / recipe.train.steps
    lr.warmup_tokens, lr.constant_until, lr.cosine_tokens = (
        tokens * stretch for tokens in (lr.warmup_tokens, lr.constant_until, lr.cosine_tokens)
    )
    recipe.train.steps = steps
    return recipe.validate()


class Batches:
    """Batches of the recipe's training rows by step. The rows are those of the recipe's seed, whatever the order's."""

    def __init__(self, recipe: Recipe) -> None:
        self.rows = data.prepare(
            recipe.data,
            vocab_size=recipe.model.vocab_size,
            sequence_length=recipe.train.sequence_length,
            seed=recipe.train.seed,
        ).train
        self.size = recipe.train.batch.start

    def __call__(self, step: int, seed: int = 0) -> Tensor:
        """The batch of step number `step`, counted from 0: [sequences, T+1]."""
        return self.rows[row_ids(step * self.size, self.size, len(self.rows), seed)]


class OneProcess:
    """An engine and the phases of its step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.engine = Engine(recipe, torch.device("cpu"))
        [self.stage] = self.engine.stages.values()

    def gradients(self, step: int, rows: Tensor) -> Totals:
        """Forward and backward of one step; gradients are in `main_grad` afterwards. The loss comes as a mean."""
        batch = len(rows)
        tokens = {mb: rows[list(ids)] for mb, ids in self.engine.sequences(batch).items()}
        weight = piecewise(self.recipe.train.mtp_weight, step * rows[:, 1:].numel())
        totals = self.engine.forward_backward(tokens, batch, weight)
        means = {name: total / rows[:, 1:].numel() for name, total in totals.losses.items()}
        return replace(totals, losses=means)

    def update(self, step: int, rows: Tensor, totals: Totals) -> None:
        """Apply the gradients of one step."""
        began, ended = (number * rows[:, 1:].numel() for number in (step, step + 1))
        lr = learning_rate(self.recipe.optim.lr, ended)
        applied, _ = self.engine.update(lr, piecewise(self.recipe.train.bias_speed, began), totals)
        if not applied:
            raise FloatingPointError(f"step {step}: the gradient is not finite")

    def state(self) -> dict[str, Any]:
        """What steps change, as plain tensors that share this process's memory."""
        state = self.engine.optimizer.state_dict()
        plain = {
            f"{kind}.{name}": shard.local
            for kind, shards in state.items()
            if isinstance(shards, dict)
            for name, shard in shards.items()
        }
        biases = {f"bias.{layer}": router.e_score_correction_bias for layer, router in self.engine.routers().items()}
        return {**plain, **biases, "applied_steps": state["applied_steps"]}

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
        self.engine.optimizer.load_state_dict(saved)
        self.engine.numerics.bump()

    def step(self, step: int, rows: Tensor) -> float:
        """A whole step; returns its mean loss."""
        totals = self.gradients(step, rows)
        self.update(step, rows, totals)
        return totals.losses["loss"]
