"""Pictures of programs: read back and compared with the program that they show."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from launch import draw
from parallel.schedule import Program, build
from parallel.schedule.program import passes

PROGRAMS = [
    ("dualpipe", 4, 8, 1),
    ("dualpipe", 8, 20, 1),
    ("dualpipe", 16, 120, 1),
    ("dualpipe", 4, 2, 1),
    ("gpipe", 3, 5, 1),
    ("1f1b", 3, 5, 1),
    ("1f1b", 1, 1, 1),
    ("zb-h1", 4, 6, 1),
    ("interleaved", 3, 12, 1),
    ("interleaved", 3, 12, 6),
    ("zbv", 4, 10, 1),
    ("dualpipev", 4, 10, 1),
    ("dualpipev", 1, 1, 1),
]
SVG = "{http://www.w3.org/2000/svg}"


def rows(text: str, ranks: int) -> list[str]:
    """Each rank's bands, put together again, without spaces."""
    bands = [[line for line in text.splitlines() if line.startswith(f"rank {rank} ")] for rank in range(ranks)]
    return ["".join(line[len(f"rank {rank}") :] for line in lines).replace(" ", "") for rank, lines in enumerate(bands)]


def lane(name: str, program: Program, stage: int, mb: int) -> int:
    """Direction of travel in dualpipe, which of the rank's stages in all others."""
    return mb // (program.microbatches // 2) if name == "dualpipe" else stage // program.ranks


def number(name: str, program: Program, mb: int) -> int:
    return mb % (program.microbatches // 2) if name == "dualpipe" else mb


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


def test_stages_of_a_rank_are_told_apart_as_by_hand() -> None:
    assert draw.text(build("zbv", 2, 3), "zbv").splitlines() == [
        "zbv: 2 ranks, 4 stages, 3 micro-batches",
        "19 units of time; each rank idles for 1 (5.3 %) and holds the activations of at most 4 micro-batches, "
        "each of one stage",
        "",
        "time    0         5         10        15",
        "rank 0  F0F1F2f0i0w0f1i1w1I0W0f2i2w2I1W1I2W2·",
        "rank 1  · F0f0F1f1i0w0F2I0W0f2i1w1I1i2I2W1w2W2",
        "",
        "F forward   I backward for input   W backward for weights   "
        "(micro-batches 0 to 2 enter at rank 0; stages 0 to 1)",
        "f forward   i backward for input   w backward for weights   "
        "(micro-batches 0 to 2 enter at rank 0; stages 2 to 3)",
        "· idle",
    ]
    assert draw.text(build("interleaved", 1, 1, 4)).splitlines()[3:9] == [
        "time    0              5              10",
        "rank 0  F0 f0 F'0f'0b'0───B'0───b0 ───B0 ───",
        "",
        "F forward   B backward   (micro-batch 0 enters at rank 0; stage 0)",
        "f forward   b backward   (micro-batch 0 enters at rank 0; stage 1)",
        "F' forward   B' backward   (micro-batch 0 enters at rank 0; stage 2)",
    ]


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), PROGRAMS)
@pytest.mark.parametrize("width", [34, 80, 10_000])
def test_text_holds_every_pass_in_order_and_keeps_to_the_width(
    name: str, ranks: int, microbatches: int, chunks: int, width: int
) -> None:
    program = build(name, ranks, microbatches, chunks)
    text = draw.text(program, colour=False, width=width)
    assert all(len(line) <= width for line in text.splitlines() if line.startswith(("rank ", "time ")))
    for row, instructions in zip(rows(text, ranks), program.program, strict=True):
        expected = []
        for kind, stage, mb in (each for ins in instructions for each in passes(ins)):
            primes, small = divmod(lane(name, program, stage, mb), 2)
            expected.append((kind.lower() if small else kind) + "'" * primes + str(number(name, program, mb)))
        assert re.findall(r"[FBIWfbiw]'*\d+", row) == expected


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


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), PROGRAMS)
def test_svg_shows_every_pass_once_where_and_when_it_runs(
    name: str, ranks: int, microbatches: int, chunks: int
) -> None:
    program = build(name, ranks, microbatches, chunks)
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
        shown = [number(name, program, mb) for ins in row for _, _, mb in passes(ins)]
        assert [int(label.rstrip("'")) for *_, label in line] == shown
    frames = [box for box in root.iter(f"{SVG}rect") if box.get("class") == "pair"]
    pairs = sum(ins[0] == "FB" for row in program.program for ins in row)
    assert len(frames) == pairs + (pairs > 0)  # the legend has one


def test_svg_survives_any_title() -> None:
    root = ElementTree.fromstring(draw.svg(build("1f1b", 2, 2), 'a <b> & "c"'))
    assert root.attrib["aria-label"].startswith('a <b> & "c": 2 ranks')


def test_svg_gives_each_of_a_ranks_stages_its_own_look() -> None:
    program = build("interleaved", 3, 6, 6)
    root = ElementTree.fromstring(draw.svg(program))
    looks: dict[int, set[tuple[str, int]]] = {}
    for group in root.iter(f"{SVG}g"):
        if hint := group.findtext(f"{SVG}title"):
            stage = int(hint.split("stage ")[1].split(",")[0])
            primes = (group.findtext(f"{SVG}text") or "").count("'")
            looks.setdefault(stage // program.ranks, set()).add((group.attrib["class"][1:], primes))
    assert all(len(look) == 1 for look in looks.values())
    assert len(set.union(*looks.values())) == 6
    style = root.findtext(f"{SVG}style") or ""
    assert all(f".F{colour} rect" in style for look in looks.values() for colour, _ in look)
