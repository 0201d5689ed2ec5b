"""Rows 12 to 14: recipes that name code, keys that do not exist, layouts that do not divide. Each is one message."""

import pytest
import yaml

from launch import cli
from tests.commands import ROOT, refused, train


@pytest.mark.fault(12)
def test_a_recipe_that_names_code_is_refused_on_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = f"touch {tmp_path / 'executed'}"
    written = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text())
    for name, place in (("top", written), ("deep", written["train"])):
        place["_target_"] = "os.system"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(written))
        del place["_target_"]
    lines = [
        [*command, *words]
        for command in (["train"], ["schedule"], ["simulate"], ["plan"], ["data", "prepare"])
        for words in (
            ["+_target_=os.system", f"+command={target}"],
            ["+train._target_=os.system"],
            ["model={_target_:os.system}"],
            ["recipe=top.yaml"],
            ["recipe=deep.yaml"],
            ["hydra.callbacks.mine._target_=os.system"],
            ["--multirun", "train.seed=1,2", "+optim._target_=os.system"],
        )
    ]
    for words in lines:
        assert cli.main(words) == 2, words
        assert "_target_ is refused" in capsys.readouterr().err
    for words in (["+train._target_=os.system"], ["recipe=deep.yaml"], ["--config", "top.yaml"]):
        code, said = train(*words)
        assert code == 2 and "_target_" in said, words
    assert not (tmp_path / "executed").exists()


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trian.steps=20", "weft: trian.steps: no such key in a recipe; did you mean 'train.steps'?\n"),
        ("+trian.steps=20", "weft: trian.steps: no such key in a recipe; did you mean 'train.steps'?\n"),
        ("train.steps=many", "weft: train.steps: expected an integer or null; "),
    ],
)
def test_a_wrong_key_or_type_is_one_message(capsys, tmp_path, word, answer):
    told = refused(capsys, "train", word, f"run.dir={tmp_path}")
    assert told.startswith(answer) and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("word", "arithmetic"),
    [
        ("parallel.pipeline=3", "parallel.pipeline=3"),
        ("parallel.expert=3", "parallel.data=2 x parallel.context=1 = 2"),
        ("parallel.microbatch_size=3", "= 12"),
        ("train.batch.start=6", "= 4"),
        ("parallel.layers_per_stage=[9,9]", "18 layers"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_arithmetic(capsys, tmp_path, word, arithmetic):
    assert arithmetic in refused(capsys, "train", word, f"run.dir={tmp_path}")
    assert not list(tmp_path.iterdir())
