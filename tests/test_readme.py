"""What the README tells people to type exists: targets of make, verbs, keys and values, and the pages it links to."""

import re
import shlex
from pathlib import Path

import pytest

from launch import draw
from launch.cli import main
from parallel.schedule import build
from train.compose import compose

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LINES = [
    line.split(" #")[0].strip() for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.split("\n")
]
WEFT = [line for line in LINES if line.startswith("weft ")]


def test_the_commands_are_found():
    assert len(WEFT) >= 5


@pytest.mark.parametrize("line", WEFT)
def test_command_of_weft_is_understood(line, capsys):
    words = shlex.split(line)[1:]
    takes_recipe = words[0] in ("train", "data")
    assert main([*words, "--cfg", "job"] if takes_recipe else words) == 0  # composed, checked, and shown or done
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("torchrun ")])
def test_command_of_torchrun_is_understood(line):
    words = shlex.split(line)
    recipe = compose(words[words.index("train") + 1 :]).validate()
    assert recipe.parallel.world_size == int(words[words.index("--nproc-per-node") + 1])


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_has_the_target(line):
    assert re.search(rf"^{line.split()[1]}\b.*:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("page", sorted(ROOT.glob("**/*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    if ".venv" in page.parts:
        return
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_picture_is_that_of_the_demo():
    parallel = compose(["recipe=tiny"]).parallel
    microbatches = compose(["recipe=tiny"]).microbatches(compose(["recipe=tiny"]).train.batch.start)
    program = build(parallel.schedule, parallel.pipeline, microbatches)
    assert draw.svg(program, parallel.schedule) == (ROOT / "docs" / "pictures" / "tiny.svg").read_text()
