"""Pictures of a pipeline program: `text` for a terminal, `svg` in the style of the report's Figure 5.

Both lay the ideal step out on a grid of time, one row a rank, one column a unit (a forward takes 1, a backward 2, its
halves 1 each, an overlapped pair 3). Each lane has its own colour and letters: a direction of travel, or, where
micro-batches visit a rank several times, one of those visits. As in the report, each direction numbers its
micro-batches from 0, while the program itself counts on through both. See docs/explanations/pipeline.md.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

from parallel.schedule.program import UNIT_COSTS, Program, passes

NAMES = {"F": "forward", "B": "backward", "I": "backward for input", "W": "backward for weights"}


@dataclass(frozen=True)
class _Lane:
    """What the micro-batches that enter at one rank do on their first, second, ... visit to any rank."""

    entry: int
    microbatches: list[int]
    stages: list[int]  # visited then; empty if there is only one visit

    def __str__(self) -> str:
        enter = "enter" if len(self.microbatches) > 1 else "enters"
        visited = f"; {_span('stage', self.stages)}" if self.stages else ""
        return f"{_span('micro-batch', self.microbatches, 'es')} {enter} at rank {self.entry}{visited}"


def _span(noun: str, numbers: list[int], plural: str = "s") -> str:
    """`stage 3`, `stages 0 to 3`."""
    return f"{noun}{plural} {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{noun} {numbers[0]}"


@dataclass(frozen=True)
class Pass:
    """One pass on the grid; `number` is its micro-batch's in its direction, `paired` half of an overlapped pair."""

    start: int
    kind: str
    stage: int
    mb: int
    lane: int
    number: int
    paired: bool

    @property
    def units(self) -> int:
        return int(UNIT_COSTS[self.kind])


class Grid:
    """A program laid out in time: rows[rank] holds its passes in order, `units` is the length of the step."""

    def __init__(self, program: Program, title: str) -> None:
        entries: dict[int, list[int]] = {}
        for mb in range(program.microbatches):
            entries.setdefault(program.host(0, mb), []).append(mb)
        self.lanes: list[_Lane] = []
        lane_of: dict[tuple[int, int], int] = {}  # (stage, mb) -> number of its lane
        for entry, microbatches in entries.items():
            visits = _visits(program, microbatches[0])  # the others that enter there go the same way
            for visit in range(1 + max(visits)):
                stages = [stage for stage, each in enumerate(visits) if each == visit]
                lane_of |= {(stage, mb): len(self.lanes) for stage in stages for mb in microbatches}
                self.lanes.append(_Lane(entry, microbatches, stages if max(visits) else []))

        self.rows: list[list[Pass]] = []
        for ends, instructions in zip(program.ends(), program.program, strict=True):
            row = []
            for end, ins in zip(ends, instructions, strict=True):
                start = int(end - UNIT_COSTS[ins[0]])
                for kind, stage, mb in passes(ins):
                    lane = lane_of[stage, mb]
                    number = self.lanes[lane].microbatches.index(mb)
                    row.append(Pass(start, kind, stage, mb, lane, number, paired=ins[0] == "FB"))
                    start += row[-1].units
            self.rows.append(row)
        self.units = max(row[-1].start + row[-1].units for row in self.rows)
        self.kinds = [kind for kind in NAMES if any(each.kind == kind for row in self.rows for each in row)]
        self.paired = any(each.paired for row in self.rows for each in row)

        idle = [round(each) for each in program.idle()]
        bubble = f"{min(idle)}" if min(idle) == max(idle) else f"{min(idle)} to {max(idle)}"
        self.heading = f"{title}: " if title else ""
        self.heading += f"{program.ranks} ranks, {program.stages} stages, {program.microbatches} micro-batches"
        self.summary = (
            f"{self.units} units of time; each rank idles for {bubble} ({100 * max(idle) / self.units:.1f} %) "
            f"and holds the activations of at most {max(program.peak_tapes())} micro-batches"
            f"{', each of one stage' if any(lane.stages for lane in self.lanes) else ''}"
        )


def _visits(program: Program, mb: int) -> list[int]:
    """For each stage, how often the micro-batch has been on that stage's rank before."""
    hosts = [program.host(stage, mb) for stage in range(program.stages)]
    return [hosts[:stage].count(host) for stage, host in enumerate(hosts)]


# ---------------------------------------------------------------- a terminal

# Background and foreground (of 256 colours) of each lane's passes: orange for the first, blue for the second.
ANSI = (
    {"F": (223, 16), "B": (208, 16), "I": (166, 231), "W": (230, 130)},
    {"F": (153, 16), "B": (39, 16), "I": (25, 231), "W": (195, 24)},
    {"F": (157, 16), "B": (71, 16), "I": (28, 231), "W": (194, 28)},
    {"F": (183, 16), "B": (135, 231), "I": (91, 231), "W": (225, 91)},
)
Character = tuple[str, tuple[int, int] | None]  # with its colours, if any


def text(program: Program, title: str = "", *, colour: bool | None = None, width: int | None = None) -> str:
    """The program as a grid of characters, cut into bands of at most `width` columns.

    By default a terminal is filled and coloured (unless NO_COLOR is set), and a file gets one plain band.
    """
    terminal = sys.stdout.isatty()
    if colour is None:
        colour = terminal and not os.environ.get("NO_COLOR")
    if width is None:
        width = shutil.get_terminal_size().columns if terminal else sys.maxsize
    grid = Grid(program, title)
    columns = max(len(name_of(each)) for row in grid.rows for each in row)  # a unit of time shows a name
    label = len(f"rank {program.ranks - 1}  ")
    band = max(5, (width - label) // columns // 5 * 5)

    rows = [_characters(grid, row, columns) for row in grid.rows]
    lines = [grid.heading, grid.summary, ""]
    for begin in range(0, grid.units, band):
        end = min(begin + band, grid.units)
        lines.append("time".ljust(label) + "".join(f"{unit:<{5 * columns}}" for unit in range(begin, end, 5)).rstrip())
        for rank, row in enumerate(rows):
            lines.append(f"rank {rank}".ljust(label) + join(row[begin * columns : end * columns], colour))
        lines.append("")
    return "\n".join([*lines, *legend(grid, colour)]) + "\n"


def _characters(grid: Grid, row: list[Pass], columns: int) -> list[Character]:
    """One rank's line."""
    line: list[Character] = [("·" if at % columns == 0 else " ", None) for at in range(grid.units * columns)]
    for each in row:
        shown, at = name_of(each), each.start * columns
        if not each.paired:
            shown = shown.ljust(columns).ljust(each.units * columns, "─")
        elif each.kind == "F":
            shown = "[" + shown.ljust(columns)
        else:
            shown, at = shown.rjust(2 * columns - 2) + "]", at + 1
        line[at : at + len(shown)] = [(character, ANSI[each.lane % len(ANSI)][each.kind]) for character in shown]
    return line


def name_of(each: Pass) -> str:
    return f"{_letter(each.kind, each.lane)}{each.number}"


def _letter(kind: str, lane: int) -> str:
    """Capital, small, then the same with one more prime: F, f, F', f', F'', ..."""
    return (kind if lane % 2 == 0 else kind.lower()) + "'" * (lane // 2)


def join(characters: list[Character], colour: bool) -> str:
    """The characters as one string, coloured in runs."""
    if not colour:
        return "".join(character for character, _ in characters).rstrip()
    runs = ((style, "".join(c for c, _ in run)) for style, run in groupby(characters, key=lambda each: each[1]))
    return "".join(f"\033[48;5;{style[0]};38;5;{style[1]}m{run}\033[0m" if style else run for style, run in runs)


def legend(grid: Grid, colour: bool) -> list[str]:
    """What letters, brackets and dots mean."""
    lines = []
    for number, lane in enumerate(grid.lanes):
        letters = []
        for kind in grid.kinds:
            letter = _letter(kind, number)
            shown: list[Character] = [(c, ANSI[number % len(ANSI)][kind]) for c in f" {letter} "]
            letters.append(f"{join(shown, True) if colour else letter} {NAMES[kind]}")
        lines.append(f"{'   '.join(letters)}   ({lane})")
    pair = "[F b]" if len(grid.lanes) > 1 else "[F B]"
    lines.append(f"{pair} a forward overlapped with a backward   · idle" if grid.paired else "· idle")
    return lines


# ---------------------------------------------------------------- a picture

# Fill and ink of each lane's passes. A weight half is pale: it fills waits.
PAINT = (
    {"F": ("#ffd8a8", "#5c2e00"), "B": ("#ff922b", "#331a00"), "I": ("#d9480f", "#fff"), "W": ("#fff0dc", "#a64b00")},
    {"F": ("#bfe0ff", "#0b3a66"), "B": ("#4dabf7", "#06243f"), "I": ("#1862ab", "#fff"), "W": ("#e6f2fd", "#1862ab")},
    {"F": ("#c3eecb", "#0f4a1f"), "B": ("#51bf69", "#06280f"), "I": ("#237a38", "#fff"), "W": ("#e6f8ea", "#237a38")},
    {"F": ("#e2ccf7", "#41166b"), "B": ("#b07ce8", "#260744"), "I": ("#7132ab", "#fff"), "W": ("#f5edfc", "#7132ab")},
)
_UNIT, ROW, GAP, LEFT, TOP = 20, 24, 4, 76, 84  # pixels: a unit of time, a rank's bar, between bars, margins
_STYLE = """
text { font: 12px Inter, "Helvetica Neue", Helvetica, Arial, sans-serif; fill: #343a40 }
.heading { font-size: 16px; font-weight: 600; fill: #212529 }
.faint { font-size: 11px; fill: #868e96 }
.tick, g text { font-size: 11px; text-anchor: middle }
g rect { stroke: #fff }
.idle { fill: #f1f3f5 }
.pair { fill: none; stroke: #212529; stroke-width: 1.6 }
"""


def svg(program: Program, title: str = "") -> str:
    """The program as an SVG picture; pointing at a pass in a browser names it in full."""
    grid = Grid(program, title)
    bottom = TOP + program.ranks * (ROW + GAP)
    width = max(LEFT + grid.units * _UNIT + 24, 860)
    height = bottom + 38 + (len(grid.lanes) + 1) * (ROW + GAP)
    out = opening(grid, width, height, grid.heading, grid.summary)
    for unit in range(0, grid.units + 1, 5):
        x = LEFT + unit * _UNIT
        out.append(f'<path d="M{x} {TOP - 4}V{bottom}" stroke="#e9ecef"/>')
        out.append(f'<text class="tick faint" x="{x}" y="{TOP - 10}">{unit}</text>')
    for rank, row in enumerate(grid.rows):
        y = TOP + rank * (ROW + GAP)
        out.append(f'<text x="16" y="{y + 16}">rank {rank}</text>')
        out.append(_svg_bar("idle", LEFT, y, grid.units))
        for each in row:
            hint = f"{NAMES[each.kind]} of stage {each.stage}, micro-batch {each.mb}"
            out.append(_svg_pass(LEFT + each.start * _UNIT, y, each.kind, each.lane, str(each.number), hint))
        out += [_svg_pair(LEFT + each.start * _UNIT, y) for each in row if each.paired and each.kind == "F"]
    return "\n".join([*out, *svg_legend(grid, bottom + 30), "</svg>"]) + "\n"


def opening(grid: Grid, width: int, height: int, heading: str, *notes: str) -> list[str]:
    """The first lines of a picture: size, style with the colours of the grid's lanes, heading and notes under it."""
    paints = "\n".join(
        f".{kind}{lane} rect {{ fill: {fill} }} .{kind}{lane} text {{ fill: {ink} }}"
        for lane, paint in enumerate(PAINT[: len(grid.lanes)])
        for kind, (fill, ink) in paint.items()
    )
    label = escape(heading, {'"': "&quot;"})
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{label}">',
        f"<style>{_STYLE}{paints}\n</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="heading" x="16" y="28">{label}</text>',
        *(f'<text class="faint" x="16" y="{48 + 18 * line}">{escape(note)}</text>' for line, note in enumerate(notes)),
    ]


def _svg_bar(style: str, x: int, y: int, units: int) -> str:
    return f'<rect class="{style}" x="{x}" y="{y}" width="{units * _UNIT}" height="{ROW}"/>'


def _svg_pass(x: int, y: int, kind: str, lane: int, number: str = "", hint: str = "") -> str:
    """One pass; lanes that share a colour are told apart by primes."""
    width = int(UNIT_COSTS[kind]) * _UNIT
    number += "'" * (lane // len(PAINT))
    return (
        f'<g class="{kind}{lane % len(PAINT)}"><rect x="{x}" y="{y}" width="{width}" height="{ROW}"/>'
        + (f'<text x="{x + width // 2}" y="{y + 16}">{number}</text>' if number else "")
        + (f"<title>{hint}</title></g>" if hint else "</g>")
    )


def _svg_pair(x: int, y: int) -> str:
    """The frame that ties a forward and a backward into an overlapped pair."""
    width = int(UNIT_COSTS["FB"]) * _UNIT
    return f'<rect class="pair" x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{ROW - 2}" rx="1"/>'


def svg_legend(grid: Grid, y: int) -> list[str]:
    out = []
    for number, lane in enumerate(grid.lanes):
        x = LEFT
        for kind in grid.kinds:
            out.append(_svg_pass(x, y, kind, number))
            x += int(UNIT_COSTS[kind]) * _UNIT + 8
            out.append(f'<text x="{x}" y="{y + 16}">{NAMES[kind]}</text>')
            x += 22 + round(6.7 * len(NAMES[kind]))
        out.append(f'<text class="faint" x="{x}" y="{y + 16}">{lane}</text>')
        y += ROW + GAP
    x = LEFT
    if grid.paired:
        out += [_svg_pass(x, y, "F", 0), _svg_pass(x + _UNIT, y, "B", len(grid.lanes) - 1), _svg_pair(x, y)]
        out.append(f'<text x="{x + 3 * _UNIT + 8}" y="{y + 16}">a forward and a backward, overlapped</text>')
        x += 3 * _UNIT + 280
    out += [_svg_bar("idle", x, y, 1), f'<text x="{x + _UNIT + 8}" y="{y + 16}">idle</text>']
    return out
