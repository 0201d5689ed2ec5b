"""docs/explanations/pipeline.md shows what weft really draws, counts and writes."""

import re
from pathlib import Path

from launch import draw
from parallel.schedule import Program, build

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "explanations" / "pipeline.md").read_text()


def test_the_picture_is_the_one_that_weft_draws() -> None:
    assert (DOCS / "pictures" / "dualpipe-8x20.svg").read_text() == draw.svg(build("dualpipe", 8, 20), "dualpipe")


def test_the_terminal_text_is_what_weft_prints() -> None:
    shown = draw.text(build("dualpipe", 4, 8), "dualpipe").split("\n\nF forward")[0]
    assert shown in PAGE


def test_the_numbers_are_those_of_the_programs() -> None:
    rows = re.findall(r"\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) % \| (\d+) \|", PAGE)
    assert len(rows) == 4
    for name, ranks, microbatches, step, idle, share, activations in rows:
        program = build(name, int(ranks), int(microbatches))
        assert max(ends[-1] for ends in program.ends()) == int(step)
        assert program.idle() == [int(idle)] * program.ranks
        assert f"{100 * int(idle) / int(step):.1f}" == share
        assert max(program.peak_tapes()) == int(activations)


def test_the_json_is_what_weft_writes() -> None:
    shown = next(block for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if block.startswith('{"version"'))
    assert shown == build("dualpipe", 2, 4).to_json()
    assert Program.from_json(shown) == build("dualpipe", 2, 4)
