"""Pictures of a pipeline program: `text` for a terminal, `svg` in the style of the report's Figure 5.

Both lay the ideal step out on a grid of time, one row a rank, one column a unit (a forward takes 1, a backward 2, its
halves 1 each, an overlapped pair 3). As in the report, each direction numbers its micro-batches from 0, while the
program itself counts on through both. See docs/explanations/pipeline.md.
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
class _Direction:
    """The micro-batches that enter the pipeline at one rank."""

    entry: int
    microbatches: list[int]

    def __str__(self) -> str:
        first, last = self.microbatches[0], self.microbatches[-1]
        if first == last:
            return f"micro-batch {first} enters at rank {self.entry}"
        return f"micro-batches {first} to {last} enter at rank {self.entry}"


@dataclass(frozen=True)
class _Pass:
    """One pass on the grid; `paired` if it is half of an overlapped pair."""

    start: int
    kind: str
    stage: int
    mb: int
    paired: bool

    @property
    def units(self) -> int:
        return int(UNIT_COSTS[self.kind])


class _Grid:
    """A program laid out in time: rows[rank] holds its passes in order, `units` is the length of the step."""

    def __init__(self, program: Program, title: str) -> None:
        self.rows: list[list[_Pass]] = []
        for ends, instructions in zip(program.ends(), program.program, strict=True):
            row = []
            for end, ins in zip(ends, instructions, strict=True):
                start = int(end - UNIT_COSTS[ins[0]])
                for kind, stage, mb in passes(ins):
                    row.append(_Pass(start, kind, stage, mb, paired=ins[0] == "FB"))
                    start += row[-1].units
            self.rows.append(row)
        self.units = max(row[-1].start + row[-1].units for row in self.rows)

        entries: dict[int, list[int]] = {}
        for mb in range(program.microbatches):
            entries.setdefault(program.host(0, mb), []).append(mb)
        self.directions = [_Direction(*item) for item in entries.items()]
        self.numbers = {
            mb: (direction, number)
            for direction, each in enumerate(self.directions)
            for number, mb in enumerate(each.microbatches)
        }
        self.kinds = [kind for kind in NAMES if any(each.kind == kind for row in self.rows for each in row)]

        self.paired = any(each.paired for row in self.rows for each in row)

        idle = [round(each) for each in program.idle()]
        bubble = f"{min(idle)}" if min(idle) == max(idle) else f"{min(idle)} to {max(idle)}"
        self.heading = f"{title}: " if title else ""
        self.heading += f"{program.ranks} ranks, {program.stages} stages, {program.microbatches} micro-batches"
        self.summary = (
            f"{self.units} units of time; each rank idles for {bubble} ({100 * max(idle) / self.units:.1f} %) "
            f"and holds the activations of at most {max(program.peak_tapes())} micro-batches"
        )


# ---------------------------------------------------------------- a terminal

# Background and foreground (of 256 colours) of each direction's passes: orange for the first, blue for the other.
_ANSI = (
    {"F": (223, 16), "B": (208, 16), "I": (166, 231), "W": (230, 130)},
    {"F": (153, 16), "B": (39, 16), "I": (25, 231), "W": (195, 24)},
)
_Character = tuple[str, tuple[int, int] | None]  # with its colours, if any


def text(program: Program, title: str = "", *, colour: bool | None = None, width: int | None = None) -> str:
    """The program as a grid of characters, cut into bands of at most `width` columns.

    By default a terminal is filled and coloured (unless NO_COLOR is set), and a file gets one plain band.
    """
    terminal = sys.stdout.isatty()
    if colour is None:
        colour = terminal and not os.environ.get("NO_COLOR")
    if width is None:
        width = shutil.get_terminal_size().columns if terminal else sys.maxsize
    grid = _Grid(program, title)
    columns = 1 + max(len(str(number)) for _, number in grid.numbers.values())  # a letter and a number in each unit
    label = len(f"rank {program.ranks - 1}  ")
    band = max(5, (width - label) // columns // 5 * 5)

    rows = [_characters(grid, row, columns) for row in grid.rows]
    lines = [grid.heading, grid.summary, ""]
    for begin in range(0, grid.units, band):
        end = min(begin + band, grid.units)
        lines.append("time".ljust(label) + "".join(f"{unit:<{5 * columns}}" for unit in range(begin, end, 5)).rstrip())
        for rank, row in enumerate(rows):
            lines.append(f"rank {rank}".ljust(label) + _join(row[begin * columns : end * columns], colour))
        lines.append("")
    return "\n".join([*lines, *_legend(grid, colour)]) + "\n"


def _characters(grid: _Grid, row: list[_Pass], columns: int) -> list[_Character]:
    """One rank's line."""
    line: list[_Character] = [("·" if at % columns == 0 else " ", None) for at in range(grid.units * columns)]
    for each in row:
        direction, number = grid.numbers[each.mb]
        shown, at = _name(each.kind, direction, number), each.start * columns
        if not each.paired:
            shown = shown.ljust(columns).ljust(each.units * columns, "─")
        elif each.kind == "F":
            shown = "[" + shown.ljust(columns)
        else:
            shown, at = shown.rjust(2 * columns - 2) + "]", at + 1
        line[at : at + len(shown)] = [(character, _ANSI[direction % 2][each.kind]) for character in shown]
    return line


def _name(kind: str, direction: int, number: int) -> str:
    """A capital letter in the first direction, a small one in the other."""
    return f"{kind if direction == 0 else kind.lower()}{number}"


def _join(characters: list[_Character], colour: bool) -> str:
    """The characters as one string, coloured in runs."""
    if not colour:
        return "".join(character for character, _ in characters).rstrip()
    runs = ((style, "".join(c for c, _ in run)) for style, run in groupby(characters, key=lambda each: each[1]))
    return "".join(f"\033[48;5;{style[0]};38;5;{style[1]}m{run}\033[0m" if style else run for style, run in runs)


def _legend(grid: _Grid, colour: bool) -> list[str]:
    """What letters, brackets and dots mean."""
    lines = []
    for number, direction in enumerate(grid.directions):
        letters = []
        for kind in grid.kinds:
            letter: list[_Character] = [(c, _ANSI[number % 2][kind]) for c in f" {_name(kind, number, 0)[0]} "]
            letters.append(f"{_join(letter, True) if colour else letter[1][0]} {NAMES[kind]}")
        lines.append(f"{'   '.join(letters)}   ({direction})")
    pair = "[F b]" if len(grid.directions) > 1 else "[F B]"
    lines.append(f"{pair} a forward overlapped with a backward   · idle" if grid.paired else "· idle")
    return lines


# ---------------------------------------------------------------- a picture

# Fill and ink of each direction's passes. A weight half is pale: it fills waits.
_PAINT = (
    {"F": ("#ffd8a8", "#5c2e00"), "B": ("#ff922b", "#331a00"), "I": ("#d9480f", "#fff"), "W": ("#fff0dc", "#a64b00")},
    {"F": ("#bfe0ff", "#0b3a66"), "B": ("#4dabf7", "#06243f"), "I": ("#1862ab", "#fff"), "W": ("#e6f2fd", "#1862ab")},
)
_UNIT, _ROW, _GAP, _LEFT, _TOP = 20, 24, 4, 76, 84  # pixels: a unit of time, a rank's bar, between bars, margins
_STYLE = """
text { font: 12px Inter, "Helvetica Neue", Helvetica, Arial, sans-serif; fill: #343a40 }
.heading { font-size: 16px; font-weight: 600; fill: #212529 }
.faint { font-size: 11px; fill: #868e96 }
.tick, g text { font-size: 11px; text-anchor: middle }
g rect { stroke: #fff }
.idle { fill: #f1f3f5 }
.pair { fill: none; stroke: #212529; stroke-width: 1.6 }
""" + "\n".join(
    f".{kind}{direction} rect {{ fill: {fill} }} .{kind}{direction} text {{ fill: {ink} }}"
    for direction, paints in enumerate(_PAINT)
    for kind, (fill, ink) in paints.items()
)


def svg(program: Program, title: str = "") -> str:
    """The program as an SVG picture; pointing at a pass in a browser names it in full."""
    grid = _Grid(program, title)
    bottom = _TOP + program.ranks * (_ROW + _GAP)
    width = max(_LEFT + grid.units * _UNIT + 24, 860)
    height = bottom + 38 + (len(grid.directions) + 1) * (_ROW + _GAP)
    heading = escape(grid.heading, {'"': "&quot;"})
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{heading}">',
        f"<style>{_STYLE}\n</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="heading" x="16" y="28">{heading}</text>',
        f'<text class="faint" x="16" y="48">{grid.summary}</text>',
    ]
    for unit in range(0, grid.units + 1, 5):
        x = _LEFT + unit * _UNIT
        out.append(f'<path d="M{x} {_TOP - 4}V{bottom}" stroke="#e9ecef"/>')
        out.append(f'<text class="tick faint" x="{x}" y="{_TOP - 10}">{unit}</text>')
    for rank, row in enumerate(grid.rows):
        y = _TOP + rank * (_ROW + _GAP)
        out.append(f'<text x="16" y="{y + 16}">rank {rank}</text>')
        out.append(_svg_bar("idle", _LEFT, y, grid.units))
        for each in row:
            direction, number = grid.numbers[each.mb]
            hint = f"{NAMES[each.kind]} of stage {each.stage}, micro-batch {each.mb}"
            out.append(_svg_pass(_LEFT + each.start * _UNIT, y, each.kind, direction, str(number), hint))
        out += [_svg_pair(_LEFT + each.start * _UNIT, y) for each in row if each.paired and each.kind == "F"]
    return "\n".join([*out, *_svg_legend(grid, bottom + 30), "</svg>"]) + "\n"


def _svg_bar(style: str, x: int, y: int, units: int) -> str:
    return f'<rect class="{style}" x="{x}" y="{y}" width="{units * _UNIT}" height="{_ROW}"/>'


def _svg_pass(x: int, y: int, kind: str, direction: int, number: str = "", hint: str = "") -> str:
    width = int(UNIT_COSTS[kind]) * _UNIT
    return (
        f'<g class="{kind}{direction % 2}"><rect x="{x}" y="{y}" width="{width}" height="{_ROW}"/>'
        + (f'<text x="{x + width // 2}" y="{y + 16}">{number}</text>' if number else "")
        + (f"<title>{hint}</title></g>" if hint else "</g>")
    )


def _svg_pair(x: int, y: int) -> str:
    """The frame that ties a forward and a backward into an overlapped pair."""
    width = int(UNIT_COSTS["FB"]) * _UNIT
    return f'<rect class="pair" x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{_ROW - 2}" rx="1"/>'


def _svg_legend(grid: _Grid, y: int) -> list[str]:
    out = []
    for direction, each in enumerate(grid.directions):
        x = _LEFT
        for kind in grid.kinds:
            out.append(_svg_pass(x, y, kind, direction))
            x += int(UNIT_COSTS[kind]) * _UNIT + 8
            out.append(f'<text x="{x}" y="{y + 16}">{NAMES[kind]}</text>')
            x += 22 + round(6.7 * len(NAMES[kind]))
        out.append(f'<text class="faint" x="{x}" y="{y + 16}">{each}</text>')
        y += _ROW + _GAP
    x = _LEFT
    if grid.paired:
        out += [_svg_pass(x, y, "F", 0), _svg_pass(x + _UNIT, y, "B", len(grid.directions) - 1), _svg_pair(x, y)]
        out.append(f'<text x="{x + 3 * _UNIT + 8}" y="{y + 16}">a forward and a backward, overlapped</text>')
        x += 3 * _UNIT + 280
    out += [_svg_bar("idle", x, y, 1), f'<text x="{x + _UNIT + 8}" y="{y + 16}">idle</text>']
    return out
