"""A router's bias has seen the load of every applied training step, once, and nothing else.

The judge is one process that nothing disturbs, and the rule of the bias by hand. That a resumed run's biases go on
where they were is seen in `test_trainer`, in the run that is killed.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kernels.recompute import CHOICES
from tests.train.layouts import LAYOUTS, batch_of, small_recipe
from train.engine import Engine, Totals

EVERYTHING_ON = LAYOUTS["dualpipe 2, data 2, expert 2"]
SPEED, STEPS = 0.01, 3
MODEL = small_recipe(EVERYTHING_ON, "fp64").model
MTP = MODEL.num_hidden_layers


def run_batch(engine: Engine, number: int) -> Totals:
    size, rows = engine.recipe.train.batch.start, batch_of(number, engine.recipe)
    tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()} if engine.needs_tokens else {}
    return engine.forward_backward(tokens, size, 0.3)


def evaluate(engine: Engine) -> None:
    """On rows that fill no pipeline evenly."""
    rows = batch_of(20, engine.recipe)[:5]
    tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(5).items()} if engine.needs_tokens else {}
    engine.evaluate(tokens, 5)


def skip(engine: Engine) -> None:
    """A step whose gradient is not finite on one rank."""
    honest, engine.pipeline.reduce = engine.pipeline.reduce, lambda stage: None
    totals = run_batch(engine, 21)
    if dist.get_rank() == 0:
        next(iter(engine.buckets[0].parameters.values())).main_grad.fill_(float("nan"))
    applied, _ = engine.update(1e-3, SPEED, totals)
    assert not applied
    engine.pipeline.reduce = honest


BETWEEN = {"nothing": lambda engine: None, "evaluations": evaluate, "skipped steps": skip}


def train(layout: dict[str, Any], recompute: list[str], between: str) -> dict[str, Any]:
    """Loads of each applied step, and the biases held here after the last."""
    recipe = small_recipe(layout, "fp64")
    recipe.train.recompute = recompute
    engine, loads = Engine(recipe, torch.device("cpu")), []
    for step in range(STEPS):
        BETWEEN[between](engine)
        totals = run_batch(engine, step)
        assert engine.update(1e-3, SPEED, totals)[0]
        loads.append(totals.loads)
    return {"loads": loads, "biases": {n: r.e_score_correction_bias.clone() for n, r in engine.routers().items()}}


@dataclass
class Judge:
    """loads: of each step and layer, in one process. biases: what these loads make of them."""

    loads: list[dict[int, torch.Tensor]]
    biases: dict[int, torch.Tensor]

    def agrees(self, parts: list[dict[str, Any]]) -> None:
        """Loads on every rank, and the biases of every copy of a router, are those."""
        held = defaultdict(list)
        for part in parts:
            for one, other in zip(self.loads, part["loads"], strict=True):
                assert one.keys() == other.keys() and all(torch.equal(one[number], other[number]) for number in one)
            for number, bias in part["biases"].items():
                held[number].append(bias)
        assert held.keys() == self.biases.keys()
        for number, copies in held.items():
            assert len(copies) == 4, "on both ranks of the pipeline that hold its layer, of two pipelines"
            assert all(torch.equal(bias, self.biases[number]) for bias in copies), f"layer {number}"


@pytest.fixture(scope="module")
def alone(workers) -> Judge:
    [found] = workers(1).run(train, LAYOUTS["one process"], [], "nothing")
    biases = {number: torch.zeros(MODEL.n_routed_experts) for number in found["biases"]}
    for loads in found["loads"]:
        for number, load in loads.items():
            lacking = [sum(load.tolist()) / len(load) - each for each in load.tolist()]
            biases[number] += torch.tensor([SPEED * ((each > 0) - (each < 0)) for each in lacking])
    assert all(bias.any() for bias in biases.values())
    return Judge(found["loads"], biases)


def test_both_directions_of_dualpipe_count_into_the_same_biases(workers, alone):
    alone.agrees(workers(4).run(train, EVERYTHING_ON, [], "nothing"))


def test_a_token_counts_once_in_every_layer_and_mtp_s_is_one(alone):
    assert alone.biases.keys() == {1, 2, 3, 4, MTP}
    for loads in alone.loads:
        for number, load in loads.items():
            tokens = 8 * (32 - (number == MTP))  # MTP has no last token to look at
            assert load.sum() == MODEL.num_experts_per_tok * tokens


def test_recomputation_does_not_count_again(workers, alone):
    alone.agrees(workers(4).run(train, EVERYTHING_ON, list(CHOICES), "nothing"))


def test_evaluations_leave_counts_and_biases_alone(workers, alone):
    alone.agrees(workers(4).run(train, EVERYTHING_ON, [], "evaluations"))


def test_skipped_steps_leave_counts_and_biases_alone(workers, alone):
    alone.agrees(workers(4).run(train, EVERYTHING_ON, [], "skipped steps"))


# ---------------------------------------------------------------- force-balanced
def force_balanced() -> list[dict[int, torch.Tensor]]:
    recipe = small_recipe(EVERYTHING_ON, "fp32")
    recipe.train.force_balanced = True
    engine, loads = Engine(recipe, torch.device("cpu")), []
    for step in range(2):
        totals = run_batch(engine, step)
        assert engine.update(1e-3, SPEED, totals)[0]
        loads.append(totals.loads)
    return loads


def test_force_balanced_routing_gives_every_expert_the_same(workers):
    """A sequence of 32 tokens divides by groups and experts; MTP's 31 come as near as they can."""
    for part in workers(4).run(force_balanced):
        for loads in part:
            assert all(set(load.tolist()) == {8 * 32 * 4 / 16} for number, load in loads.items() if number < MTP)
            assert loads[MTP].sum() == 8 * 31 * 4 and loads[MTP].max() - loads[MTP].min() <= 8
