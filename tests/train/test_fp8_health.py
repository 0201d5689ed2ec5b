"""FP8 health of a run: the same in every layout, in `metrics.jsonl` when it is due, and cheap."""

import contextlib
import io
import json
from typing import Any

import pytest
import torch

from tests.train.layouts import LAYOUTS, batch_of, small_recipe
from train.compose import compose
from train.engine import Engine
from train.trainer import Trainer


def health_of(layout: dict[str, Any], recompute: list[str]) -> list[dict]:
    """What each of three steps says; the second is not looked at."""
    recipe = small_recipe(layout, "fp8")
    recipe.train.recompute = recompute
    engine, size, found = Engine(recipe, torch.device("cpu")), recipe.train.batch.start, []
    for step in range(3):
        engine.numerics.health.begin(on=step != 1)
        rows = batch_of(step, recipe)
        tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
        totals = engine.forward_backward(tokens if engine.needs_tokens else {}, size, 0.3)
        found.append(engine.fp8_health())
        engine.evaluate(tokens if engine.needs_tokens else {}, size)
        assert engine.fp8_health() == found[-1], "an evaluation counts for nothing"
        engine.update(1e-3, 1e-3, totals)
    return found


@pytest.fixture(scope="module")
def one_process(workers) -> list[dict]:
    return workers(1).run(health_of, {}, [])[0]


def test_every_layer_has_figures_of_activations_and_gradients(one_process):
    looked_at, not_looked_at, _ = one_process
    assert not_looked_at == {}
    assert looked_at.keys() == {"0", "1", "2", "3", "4", "5"}, "five layers, and the MTP module"
    for layer in looked_at.values():
        assert layer.keys() == {"activation", "gradient"}
        for figures in layer.values():
            smallest, largest = figures["amax"]
            assert 0 < smallest < largest
            assert 0 <= figures["underflow"] < 0.2 and 0 <= figures["saturation"] < 0.5
        assert layer["gradient"]["underflow"] < 0.01, "gradients are far above the floor of a tile's scale"


@pytest.mark.parametrize("recompute", [[], ["norms", "mla_up", "swiglu"], ["layer"]], ids=" ".join)
def test_a_pipeline_sees_what_one_process_sees(workers, one_process, recompute):
    for found in workers(2).run(health_of, LAYOUTS["dualpipe 2"], recompute):
        for step, expected in zip(found, one_process, strict=True):
            assert step.keys() == expected.keys()
            for layer, kinds in expected.items():
                for kind, figures in kinds.items():
                    assert step[layer][kind] == {name: pytest.approx(v, rel=1e-6) for name, v in figures.items()}


def fit(words: list[str]) -> None:
    Trainer(compose(words), torch.device("cpu")).fit()


@pytest.mark.parametrize(("precision", "every", "due"), [("fp8", 2, [2, 4]), ("fp8", 0, []), ("bf16", 2, [])])
@pytest.mark.slow
def test_records_have_health_when_it_is_due(workers, tmp_path, precision, every, due):
    one = ["parallel.pipeline=1", "parallel.data=1", "parallel.expert=1", "parallel.schedule=1f1b"]
    small = small_recipe({}, "fp8", vocab_size=512).model
    sizes = [f"model.{key}={getattr(small, key)}" for key in ("hidden_size", "num_hidden_layers", "vocab_size")]
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": "a line of no meaning\n" * 300}) + "\n") * 20)
    data = ["data=hf", f"data.path={tmp_path}/text.jsonl", "data.heldout=0.2", f"data.cache={tmp_path}/cache"]
    rest = ["train.sequence_length=32", "train.steps=4", "train.eval_rows=0", f"run.dir={tmp_path}", "run.name=run"]
    words = ["recipe=tiny", *one, *sizes, *data, *rest, f"precision={precision}", f"log.health_every={every}"]
    with contextlib.redirect_stdout(io.StringIO()):
        workers(1).run(fit, words)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "fp8_health" in line] == due
    for line in (line for line in lines if line["step"] in due):
        assert line["fp8_health"]["0"]["activation"].keys() == {"underflow", "saturation", "amax"}
