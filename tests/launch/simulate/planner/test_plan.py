"""A plan is legal, has the price that `weft simulate` gives it, and whoever is rejected is told why."""

import json
from dataclasses import replace

import pytest

from launch import cli
from launch.simulate.cluster import sheet
from launch.simulate.memory import together
from launch.simulate.planner import layouts, plan
from launch.simulate.planner.layers import Studies
from launch.simulate.planner.layouts import Layout, variants
from launch.simulate.stages import world
from launch.simulate.step.race import race
from parallel import schedule
from train.compose import compose

SMALL = (
    "recipe=tiny",
    "precision=bf16",
    "model.num_hidden_layers=2",
    "model.first_k_dense_replace=1",
    "model.num_nextn_predict_layers=0",
    "train.recompute=[norms,swiglu]",
)


@pytest.fixture(scope="module")
def h800():
    return sheet.read("h800x2048")


@pytest.fixture(scope="module")
def found(h800):
    return plan.plan(compose([*SMALL]), h800, gpus=2)


def test_stages_made_of_short_ones_are_those_that_were_looked_at_whole(h800):
    again = "train.recompute=[norms,mla_up,swiglu]"
    layers = ["model.num_hidden_layers=13", "parallel.layers_per_stage=[4,5,4]", "parallel.schedule=1f1b"]
    recipe = compose(["recipe=tiny", *layers, "parallel.pipeline=3", again])
    program = schedule.generate("1f1b", 3, 4)
    whole, made = world.study_stages(recipe, program.placement), Studies().of(recipe, program.placement)
    for stage, work in whole.items():
        for kind, one in work.passes.items():
            other = made[stage].passes[kind]
            assert sorted(map(repr, one.operators)) == sorted(map(repr, other.operators)), (stage, kind)
            assert race([one], h800).seconds == pytest.approx(race([other], h800).seconds, rel=1e-12)
            assert [+each for each in together([one])] == [+each for each in together([other])], (stage, kind)
        assert sorted(map(repr, work.once)) == sorted(map(repr, made[stage].once))
        for name in ("cached", "turned", "message", "dense", "tied", "experts"):
            assert getattr(work, name) == getattr(made[stage], name)


def test_the_front_gets_slower_and_smaller_and_the_rejected_have_reasons(found):
    assert found.front and found.winner and found.gpus == 2
    pairs = [(each.seconds, each.memory) for each in found.front]
    assert pairs == sorted(pairs) and [m for _, m in pairs] == sorted((m for _, m in pairs), reverse=True)
    assert all(each.kind and each.reason for each in found.rejected)
    layouts = [each.layout for each in (*found.front, *found.rejected)]
    assert len(set(layouts)) == len(layouts) and Layout.of(found.recipe) in layouts


def test_nothing_priced_is_better_than_the_winner(found, h800):
    fitting = [each for each in found.rejected if each.seconds and each.memory <= h800.memory_bytes]
    same = [each for each in fitting if each.layout.pipeline * each.layout.data == found.gpus]
    assert same and all(each.seconds >= found.winner.step_seconds for each in same)


def test_what_is_learnt_stays(found):
    before, after = found.recipe, found.winner.recipe.validate(data=False)
    assert after.model == before.model and after.optim == before.optim and after.precision == before.precision
    assert replace(after.train, recompute=before.train.recompute) == before.train


def test_the_explanation_adds_up_to_the_step(found):
    assert sum(plan.parts(found.winner).values()) == pytest.approx(found.winner.step_seconds, rel=1e-9)
    assert f"{found.winner.step_seconds:.3f} s" in plan.explain(found)


def test_a_cluster_without_room_is_told_what_does_not_fit(h800):
    small = plan.plan(compose([*SMALL, "train.recompute=[layer]"]), replace(h800, memory_bytes=2**24), gpus=2)
    assert small.winner is None and "No plan of 2 GPUs fits" in plan.explain(small)
    needs = [each.reason for each in small.rejected if each.kind.startswith("memory")]
    assert needs and all("GiB" in reason for reason in needs)


def test_variants_recompute_more_or_less_and_try_other_dispatch():
    own = Layout(2, 16, 16, "1f1b", 2, 1, "auto", ("norms",), "fp8")
    less = {each.recompute for each in variants(own, 8, fits=True) if each.dispatch == "auto"}
    more = {each.recompute for each in variants(own, 8, fits=False) if each.dispatch == "auto"}
    assert less == {()}
    assert more == {("norms", "mla_up"), ("norms", "swiglu"), ("norms", "mla_up", "swiglu"), ("layer",)}
    assert {each.dispatch for each in variants(own, 8, fits=True)} == {"auto", "all_to_all"}
    assert {each.dispatch for each in variants(replace(own, expert=8), 8, fits=True)} == {"auto"}


def test_the_cluster_is_filled_as_far_as_the_batch_can_be_shared_out(h800):
    v3 = compose(["recipe=v3", "data.path=none"])
    assert layouts.world_size(v3, h800) == 2048
    assert layouts.world_size(v3, h800, 2047) == 1984  # 31 positions of 64 pipelines
    assert layouts.world_size(compose(["recipe=tiny"]), h800, 6) == 4


def test_the_best_plan_is_a_recipe_that_others_take(found, capsys, tmp_path):
    file = tmp_path / "best.yaml"
    assert cli.main(["plan", *SMALL, "gpus=2", "--recipe", str(file), "--json", "-"]) == 0
    planned = json.loads(capsys.readouterr().out)
    best = planned["winner"]
    for key in ("front", "rejected", "explanation"):  # the same every time
        assert planned[key] == json.loads(found.to_json())[key]
    assert cli.main(["simulate", f"recipe={file}", "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["step_seconds"] == pytest.approx(best["step_seconds"], rel=1e-9)
    assert again["memory_gb"] == best["memory_gb"]
    assert cli.main(["train", f"recipe={file}", "--cfg", "job"]) == 0
    assert "pipeline:" in capsys.readouterr().out


def test_more_gpus_than_there_are_is_refused(capsys):
    assert cli.main(["plan", "recipe=tiny", "gpus=4096"]) == 2
    assert "gpus=4096: expected a number from 1 to the cluster's 2048" in capsys.readouterr().err
