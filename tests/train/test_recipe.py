"""Recipes: what they compose to, what they refuse, and that what a run writes down is what it read."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import UserError
from parallel.schedule import SCHEDULES
from train.compose import CommandLine, compose, keys_of, load, recipe_names, recipe_of, save
from train.model.config import RopeScaling
from train.optim import batch_size, learning_rate, piecewise
from train.recipe import BatchConfig, ParallelConfig, Recipe, TrainConfig


def test_every_recipe_of_weft_is_valid_and_has_data_to_name():
    assert recipe_names() == ["tiny", "v3", "v3-16b"]
    for name in recipe_names():
        assert compose([f"recipe={name}", "data=stdlib"]).run.name == name


def test_tiny_is_the_default_and_has_everything_on():
    recipe = compose([])
    assert recipe == compose(["recipe=tiny"])
    assert recipe.parallel.world_size == 4
    assert (recipe.parallel.schedule, recipe.precision, recipe.data.source) == ("dualpipe", "fp8", "stdlib")
    assert recipe.parallel.expert == 2 and recipe.model.num_nextn_predict_layers == 1
    assert recipe.train.bias_speed[0][1] > 0 and recipe.checkpoint.every > 0


def test_v3_is_the_report_s_section_4_2():
    recipe = compose(["recipe=v3", "data=stdlib"])
    assert recipe.parallel.world_size == 2048
    batch = recipe.train.batch
    assert [batch_size(batch, tokens) for tokens in (0, 469e9, 14e12)] == [3072, 15360, 15360]
    rates = {27e9: 2.2e-4, 9.99e12: 2.2e-4, 14.4e12: 2.2e-5, 14.7e12: 7.3e-6}
    for tokens, rate in rates.items():
        assert learning_rate(recipe.optim.lr, tokens) == pytest.approx(rate)
    assert [piecewise(recipe.train.mtp_weight, tokens) for tokens in (0, 9.9e12, 10e12)] == [0.3, 0.3, 0.1]
    assert [piecewise(recipe.train.bias_speed, tokens) for tokens in (0, 14.29e12, 14.3e12)] == [0.001, 0.001, 0]


def test_v3_warms_up_for_2000_steps():
    recipe = compose(["recipe=v3", "data=stdlib"])
    tokens = 0
    for _ in range(2000):
        tokens += batch_size(recipe.train.batch, tokens) * recipe.train.sequence_length
    assert tokens == recipe.optim.lr.warmup_tokens


def test_batch_keys_follow_the_start_unless_set():
    batch = compose(["recipe=tiny", "train.batch.start=16"]).train.batch
    assert (batch.start, batch.end, batch.multiple_of) == (16, 16, 16)


def test_a_saved_recipe_loads_equal_and_is_itself_a_recipe(tmp_path):
    recipe = compose(["recipe=v3", "data=stdlib", "run.name=mine", "wandb.mode=offline", "train.steps=3"])
    save(recipe, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == recipe
    again = compose([f"recipe={tmp_path / 'config.yaml'}", "train.steps=4", "train.threads=2"])
    assert (again.train.steps, again.train.threads, again.run.name) == (4, 2, "mine")


def test_a_user_s_file_extends_a_recipe_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text("hidden_size: 512\n")
    text = "defaults: [tiny, override /model: wide, _self_]\ntrain: {steps: 5}\n"
    (tmp_path / "my.own.yaml").write_text(text)
    monkeypatch.chdir("/")
    recipe = compose([f"recipe={tmp_path}/my.own.yaml", "optim=v3", "parallel.pipeline=4"])
    assert (recipe.model.hidden_size, recipe.train.steps, recipe.run.name) == (512, 5, "my.own")
    assert (recipe.optim.lr.peak, recipe.parallel.pipeline) == (2.2e-4, 4)


def test_a_nested_section_can_be_given_whole():
    recipe = compose(["recipe=tiny", "model.rope_scaling={factor:4,original_max_position_embeddings:64}"])
    assert recipe.model.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=64)


def test_a_key_in_a_section_that_is_null_makes_the_section():
    assert compose(["model.rope_scaling.factor=4"]).model.rope_scaling == RopeScaling(factor=4.0)
    assert compose(["+model.rope_scaling.factor=4", "model.rope_scaling.mscale=2"]).model.rope_scaling == RopeScaling(
        factor=4.0, mscale=2.0
    )


def test_whole_numbers_are_welcome_in_schedules():
    assert compose(["train.mtp_weight=[[0,1],[100000,0]]"]).train.mtp_weight == [[0, 1], [100000, 0]]


def test_every_key_of_the_schema_can_be_set_to_its_own_value():
    recipe = compose(["recipe=tiny"])
    for key, value in flat(asdict(recipe)).items():
        if isinstance(value, int | float | str) and key in keys_of(Recipe):
            line = CommandLine.read([f"{key}={str(value).lower() if isinstance(value, bool) else value}"])
            assert line.overrides == [f"++{key}={str(value).lower() if isinstance(value, bool) else value}"]
    words = [f"{k}={v}" for k, v in flat(asdict(recipe)).items() if type(v) in (int, float) or k == "precision"]
    assert compose(words) == recipe


def flat(tree: dict, prefix: str = "") -> dict:
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def test_code_in_a_file_that_is_extended_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    callback = f"hydra: {{callbacks: {{x: {{_target_: os.system, command: 'touch {marker}'}}}}}}\n"
    (tmp_path / "base.yaml").write_text("defaults: [tiny, _self_]\n" + callback)
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\n")
    with pytest.raises(UserError, match="_target_ is refused"):
        compose([f"recipe={tmp_path}/mine.yaml"])
    assert not marker.exists()


def test_yaml_tags_of_python_are_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "mine.yaml").write_text(f"train: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(UserError, match="mine"):
        compose([f"recipe={tmp_path}/mine.yaml"])
    assert not marker.exists()


@given(
    pipeline=st.integers(1, 6),
    data=st.integers(1, 6),
    expert=st.integers(1, 6),
    size=st.integers(1, 3),
    batch=st.integers(1, 48),
    schedule=st.sampled_from(sorted(SCHEDULES)),
)
def test_a_layout_is_accepted_exactly_when_its_arithmetic_has_no_rest(pipeline, data, expert, size, batch, schedule):
    recipe = Recipe(train=TrainConfig(steps=1, batch=BatchConfig(batch, batch, 0, batch)))
    recipe.model.n_routed_experts, recipe.model.n_group, recipe.model.topk_group = 24, 1, 1
    recipe.parallel = ParallelConfig(
        pipeline=pipeline, data=data, expert=expert, microbatch_size=size, schedule=schedule
    )
    ends = 2 if schedule == "dualpipe" else 1
    works = [pipeline % ends == 0, data % expert == 0, 24 % expert == 0]
    works += [batch % (data * size) == 0, batch // (data * size) % ends == 0]
    if all(works):
        assert recipe.validate().microbatches(batch) * data * size == batch
    else:
        with pytest.raises(UserError, match="expected"):
            recipe.validate()


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [("gpipe", 4), ("1f1b", 4), ("interleaved", 12), ("zb-h1", 4), ("zbv", 8), ("dualpipe", 4), ("dualpipev", 8)],
)
def test_every_stage_of_a_schedule_needs_a_layer(schedule, stages):
    recipe = Recipe(train=TrainConfig(steps=1))
    recipe.parallel = ParallelConfig(pipeline=4, schedule=schedule, chunks=3)
    recipe.model.num_hidden_layers = stages
    assert recipe.validate().parallel.program(8).stages == stages
    recipe.parallel.layers_per_stage = [1] * stages
    recipe.validate()
    recipe.parallel.layers_per_stage = [1] * (stages - 2) + [2]
    with pytest.raises(UserError, match=f"{stages - 1} stages"):
        recipe.validate()
    recipe.model.num_hidden_layers, recipe.parallel.layers_per_stage = stages - 1, None
    with pytest.raises(UserError, match=f"num_hidden_layers={stages - 1}, a layer for each of its stages"):
        recipe.validate()


def test_a_recipe_is_composed_without_leaving_hydra_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(["recipe=tiny"])
    line = CommandLine.read(["recipe=v3"])
    assert recipe_of(line.compose(), line.name).parallel.pipeline == 16
    assert list(Path(tmp_path).iterdir()) == []


def test_the_reference_lists_every_key_and_no_other():
    page = (Path(__file__).parents[2] / "docs/reference/recipe.md").read_text()
    described = set(re.findall(r"^\| `([a-z0-9_.]+)` \|", page, re.MULTILINE)) - {"tiny", "v3"}
    keys = keys_of(Recipe)
    assert described == {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
