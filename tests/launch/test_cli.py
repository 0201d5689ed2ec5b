"""`weft VERB`: what each verb prints, and that Hydra's own flags work on top."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from omegaconf import OmegaConf

from launch import cli
from parallel.schedule import Program, build
from train.compose import CommandLine, compose


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weft(capsys, *words: str) -> str:
    """What a command that succeeds prints."""
    try:
        code = cli.main(list(words))
    except SystemExit as ended:  # Hydra's --help
        code = ended.code or 0
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return printed.out


def test_help_names_every_verb_and_version_the_package(capsys):
    text = weft(capsys, "--help")
    assert text == weft(capsys) and all(f"weft {verb}" in text for verb in cli.VERBS)
    assert not re.search(r"import|launch", text), "a verb that does not exist yet"


def test_schedule_writes_the_verified_program_whatever_the_model(capsys, tmp_path):
    words = ["schedule", "parallel.pipeline=8", "parallel.microbatches=20", "--json", "program.json"]
    assert weft(capsys, *words) == ""
    assert Program.from_json((tmp_path / "program.json").read_text()) == build("dualpipe", 8, 20)
    assert weft(capsys, *words[:3], "--json", "-") == (tmp_path / "program.json").read_text()


def test_schedule_derives_micro_batches_from_the_batch(capsys):
    assert json.loads(weft(capsys, "schedule", "recipe=v3", "--json", "-"))["microbatches"] == 24
    assert json.loads(weft(capsys, "schedule", "train.batch.start=16", "--json=-"))["microbatches"] == 8


def test_schedule_draws_for_terminals_and_as_svg(capsys, tmp_path):
    text = weft(capsys, "schedule", "parallel.schedule=1f1b")
    assert "rank 0" in text and "rank 1" in text
    assert weft(capsys, "schedule", "--svg", "program.svg") == ""
    assert ElementTree.parse(tmp_path / "program.svg").getroot().tag.endswith("svg")


def test_cfg_job_prints_the_composed_recipe_and_runs_nothing(capsys, tmp_path):
    printed = OmegaConf.create(weft(capsys, "train", "recipe=v3", "--cfg", "job", "--resolve"))
    assert printed == OmegaConf.create(weft(capsys, "train", "--cfg", "job", "recipe=v3"))
    assert (printed.parallel.pipeline, printed.train.max_skips) == (16, compose(["data=stdlib"]).train.max_skips)
    part = weft(capsys, "train", "--cfg", "job", "--package", "train.batch", "train.batch.start=32")
    assert "start: 32" in part and "pipeline" not in part
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_s_help_tells_what_it_takes(capsys, name):
    verb, text = cli.VERBS[name], weft(capsys, *name.split(), "--help")
    assert text.startswith(f"weft {name}") and verb.example in text and verb.does in text
    assert all(flag in text and does in text for flag, does in verb.flags.items())
    assert all(f"{key}=" in text and does in text for key, (_, does) in verb.keys.items())
    groups = "model: tiny, v3, v3-16b" in text and "data: hf, stdlib" in text and "microbatch_size: 1" in text
    assert groups == verb.recipe


def test_multirun_runs_the_verb_for_each_value(capsys):
    text = weft(capsys, "schedule", "-m", "parallel.microbatches=4,6", "parallel.pipeline=2", "--json", "-")
    assert re.findall(r'"microbatches": (\d+)', text) == ["4", "6"]


def test_data_prepare_makes_rows_once_and_says_where(capsys, tmp_path):
    lines = (json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 20}) for i in range(200))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    words = ["data", "prepare", "data=hf", "data.path=text.jsonl", "data.cache=cache", "data.vocab_size=300"]
    words += ["train.sequence_length=64", "data.heldout=0.1"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert re.fullmatch(r"cache/data/\w+: \d+ rows to train on, \d+ held out\n", first)
    assert cli.main(words) == 0
    assert capsys.readouterr().out == first


def test_doctor_says_what_is_there_and_what_was_never_tried(capsys):
    code = cli.main(["doctor"])
    text = capsys.readouterr().out
    assert re.search(r"^ok +python +3\.", text, re.MULTILINE)
    assert re.search(r"^note +never run on a GPU", text, re.MULTILINE)
    assert code == (1 if "BAD" in text else 0)


def test_every_command_of_the_reference_is_accepted(capsys):
    page = (Path(__file__).parents[2] / "docs/reference/cli.md").read_text()
    commands = re.findall(r"^weft ((?:train|schedule) .*?)(?:  .*)?$", page, re.MULTILINE)
    assert len(commands) == 5
    for words in (command.split() for command in commands):
        if "--multirun" in words:
            assert CommandLine.read(words[2:], sweep=True).compose().train.steps
        else:
            weft(capsys, *(words if {"--cfg", "--help"} & set(words) else [*words, "--cfg", "job"]))
