"""Pictures of programs: read back and compared with the program that they show."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from launch import draw
from parallel.schedule import build
from parallel.schedule.program import passes
from tests.parallel.schedule.notation import shorthand

PROGRAMS = [
    ("dualpipe", 4, 8),
    ("dualpipe", 8, 20),
    ("dualpipe", 16, 120),
    ("dualpipe", 4, 2),
    ("1f1b", 3, 5),
    ("1f1b", 1, 1),
]
SVG = "{http://www.w3.org/2000/svg}"


def rows(text: str, ranks: int) -> list[str]:
    """Each rank's bands, put together again, without spaces."""
    bands = [[line for line in text.splitlines() if line.startswith(f"rank {rank} ")] for rank in range(ranks)]
    return ["".join(line[len(f"rank {rank}") :] for line in lines).replace(" ", "") for rank, lines in enumerate(bands)]


def test_dualpipe_of_4_ranks_is_drawn_as_by_hand() -> None:
    assert draw.text(build("dualpipe", 4, 8), "dualpipe").splitlines()[:8] == [
        "dualpipe: 4 ranks, 4 stages, 8 micro-batches",
        "26 units of time; each rank idles for 2 (7.7 %) and holds the activations of at most 5 micro-batches",
        "",
        "time    0         5         10        15        20        25",
        "rank 0  F0F1F2f0i0w0f1[F3b1]· [f2B0]b2──· [f3B1]b3──I2W2I3W3",
        "rank 1  · F0f0F1f1F2b0──[f2B0][F3b1][f3B1]b2──B2──· i3I3w3W3",
        "rank 2  · f0F0f1F1f2B0──[F2b0][f3B1][F3b1]B2──b2──· I3i3W3w3",
        "rank 3  f0f1f2F0I0W0F1[f3B1]· [F2b0]B2──· [F3b1]B3──i2w2i3w3",
    ]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), PROGRAMS)
@pytest.mark.parametrize("width", [24, 80, 10_000])
def test_text_holds_every_pass_in_order_and_keeps_to_the_width(
    name: str, ranks: int, microbatches: int, width: int
) -> None:
    program = build(name, ranks, microbatches)
    text = draw.text(program, colour=False, width=width)
    assert all(len(line) <= width for line in text.splitlines() if line.startswith(("rank ", "time ")))
    for rank, row in enumerate(rows(text, ranks)):
        expected = re.findall(r"([FBIW])([ab])(\d+)", shorthand(program, rank))
        assert re.findall(r"[FBIWfbiw]\d+", row) == [
            (kind if direction == "a" else kind.lower()) + number for kind, direction, number in expected
        ]


def test_colours_only_add_to_the_text_and_are_off_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    program = build("dualpipe", 8, 20)
    plain = draw.text(program, colour=False, width=100)
    coloured = draw.text(program, colour=True, width=100)
    assert "\033[" in coloured and "\033[" not in plain
    bare = re.sub(r"\033\[[\d;]*m", "", coloured)
    # what colours can say, the legend need not say in letters
    assert [" ".join(line.split()) for line in bare.splitlines()] == [
        " ".join(line.split()) for line in plain.splitlines()
    ]
    assert draw.text(program) == draw.text(program, colour=False, width=10_000)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    assert draw.text(program) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert draw.text(program) == plain


@pytest.mark.parametrize(("name", "ranks", "microbatches"), PROGRAMS)
def test_svg_shows_every_pass_once_where_and_when_it_runs(name: str, ranks: int, microbatches: int) -> None:
    program = build(name, ranks, microbatches)
    root = ElementTree.fromstring(draw.svg(program, name))
    lines: dict[int, list[tuple[int, int, str, str]]] = {}
    for group in root.iter(f"{SVG}g"):
        hint = group.findtext(f"{SVG}title")
        if hint:
            box = group.find(f"{SVG}rect")
            assert box is not None
            x, y, width = (int(box.attrib[key]) for key in ("x", "y", "width"))
            assert x >= 0 and x + width <= int(root.attrib["width"]) and y < int(root.attrib["height"])
            lines.setdefault(y, []).append((x, width, hint, group.findtext(f"{SVG}text") or ""))
    assert len(lines) == ranks
    origin = min(x for line in lines.values() for x, *_ in line)
    for (_, line), row, ends in zip(sorted(lines.items()), program.program, program.ends(), strict=True):
        line.sort()
        assert [hint for _, _, hint, _ in line] == [
            f"{draw.NAMES[kind]} of stage {stage}, micro-batch {mb}" for ins in row for kind, stage, mb in passes(ins)
        ]
        stops = [
            (x + width - origin) / line[0][1] for x, width, *_ in line
        ]  # every rank begins with a forward: one unit
        assert set(ends) <= set(stops)
        assert all(a[0] + a[1] <= b[0] for a, b in pairwise(line))
        assert all(int(number) < microbatches for *_, number in line)
    frames = [box for box in root.iter(f"{SVG}rect") if box.get("class") == "pair"]
    pairs = sum(ins[0] == "FB" for row in program.program for ins in row)
    assert len(frames) == pairs + (pairs > 0)  # the legend has one


def test_svg_survives_any_title() -> None:
    root = ElementTree.fromstring(draw.svg(build("1f1b", 2, 2), 'a <b> & "c"'))
    assert root.attrib["aria-label"].startswith('a <b> & "c": 2 ranks')
