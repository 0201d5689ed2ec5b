"""docs/explanations/pipeline.md and dualpipe.md show what weft really draws, counts and writes."""

import re
from itertools import accumulate
from pathlib import Path

import pytest

from launch import draw
from parallel.schedule import Program, build
from parallel.schedule.program import UNIT_COSTS, passes

DOCS = Path(__file__).parents[2] / "docs"
PIPELINE, DUALPIPE = ((DOCS / "explanations" / page).read_text() for page in ("pipeline.md", "dualpipe.md"))

# A lone pass waits for its expert communication, as long as 0.8 of the computation; a pair hides it.
WITH_TRAFFIC = {"F": 2.2, "I": 2.2, "W": 1, "B": 3.2, "FB": 3}


@pytest.mark.parametrize("picture", sorted(set(re.findall(r"pictures/(\S+-\d+x\d+).svg", PIPELINE + DUALPIPE))))
def test_a_picture_is_the_one_that_weft_draws(picture: str) -> None:
    name, sizes = picture.rsplit("-", 1)
    program = build(name, *map(int, sizes.split("x")))
    assert (DOCS / "pictures" / f"{picture}.svg").read_text() == draw.svg(program, name)


def test_the_terminal_text_is_what_weft_prints() -> None:
    shown = draw.text(build("dualpipe", 4, 8), "dualpipe").split("\n\nF forward")[0]
    assert shown in PIPELINE


def held(program: Program) -> int:
    """Most activations of a rank, those of a split backward until its weight half."""
    lives = (accumulate((p[0] == "F") - (p[0] in "BW") for ins in row for p in passes(ins)) for row in program.program)
    return max(max(live) for live in lives)


def test_the_numbers_are_those_of_the_programs() -> None:
    number = r" ([\d.]+)(?: %)? \|"
    rows = re.findall(r"^\| `([\w-]+)`(?:, (\d) chunks)? \|" + 8 * number, DUALPIPE, re.MULTILINE)
    assert len(rows) == 16
    for name, chunks, ranks, microbatches, *numbers in rows:
        program = build(name, int(ranks), int(microbatches), int(chunks or 2))
        copies = sum(map(len, program.placement)) / program.stages
        depth = program.stages / program.ranks  # stages that make up a rank's share of the model
        step, with_traffic = (
            max(ends[-1] for ends in program.ends(costs)) / depth for costs in (UNIT_COSTS, WITH_TRAFFIC)
        )
        idle = max(program.idle()) / depth
        counted = [step, idle, 100 * idle / step, held(program) / depth, copies, with_traffic]
        assert [float(each) for each in numbers] == pytest.approx(counted, abs=0.051), (name, ranks)


def test_the_json_is_what_weft_writes() -> None:
    shown = next(block for block in re.findall(r"```\n(.*?)```", PIPELINE, re.DOTALL) if block.startswith('{"version"'))
    assert shown == build("dualpipe", 2, 4).to_json()
    assert Program.from_json(shown) == build("dualpipe", 2, 4)
