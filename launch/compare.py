"""A measured step under its program: what `weft schedule --compare RUN` draws, beside `draw.py`.

Each rank has two rows on one axis of seconds. Above, the program as it would run if messages took no time, at the mean
cost that each kind of instruction had; below, what was measured, standing still marked. A lone forward or backward
has nothing to hide its expert communication behind, so the program's cost of one includes the wait; that of a pair does
not. The traces are those of the run's first pipeline (`parallel/timeline.py`).
"""

import os
import shutil
import sys
from dataclasses import dataclass
from statistics import fmean
from xml.sax.saxutils import escape

from launch.draw import ANSI, GAP, LEFT, NAMES, ROW, Character, Grid, Pass, join, legend, name_of, opening, svg_legend
from parallel.schedule.program import Instruction, passes, spell
from parallel.timeline import Bar, Measured

HEADINGS = ("program", "measured")
WIDTH = 1200  # pixels of the axis
TOP = 120


@dataclass(frozen=True)
class Cost:
    """Mean seconds of a kind of instruction in the program, of which `exposed` it stands still for experts."""

    seconds: float
    exposed: float


class Comparison:
    """Both versions of a step: `rows[rank]` holds (program, measured), lists of bars that begin at 0 seconds."""

    def __init__(self, measured: Measured, title: str) -> None:
        program = measured.program
        self.grid = Grid(program, "")
        self.look = {(each.kind, each.stage, each.mb): each for row in self.grid.rows for each in row}
        self.instructions = program.program
        costs = fit(measured)
        ends = program.ends({kind: cost.seconds for kind, cost in costs.items()})
        zero = min(row[0].begin for row in measured.rows)
        self.rows: list[tuple[list[Bar], list[Bar]]] = []
        for ran, row, instructions in zip(measured.rows, ends, program.program, strict=True):
            timed = zip(row, instructions, strict=True)
            ideal = [Bar(spell(ins), end - costs[ins[0]].seconds, end, ()) for end, ins in timed]
            self.rows.append((ideal, [shifted(bar, zero) for bar in ran]))
        makespan, took = (max(rows[which][-1].end for rows in self.rows) for which in (0, 1))
        self.seconds = max(makespan, took)

        busy = [sum(costs[ins[0]].seconds for ins in row) for row in program.program]
        exposed = [sum(costs[ins[0]].exposed for ins in row) for row in program.program]
        ideal_shares = {"bubble": 1 - fmean(busy) / makespan, "exposed_comm": fmean(exposed) / makespan}
        kinds = ", ".join(f"{kind.replace('FB', 'F&B')} {1e3 * cost.seconds:.1f}" for kind, cost in costs.items())
        self.heading = f"{title}, step {measured.step}: {self.grid.heading}"
        self.notes = [
            f"program   {makespan:.3f} s: {in_words(ideal_shares)}, at mean measured costs in ms: {kinds}",
            f"measured  {took:.3f} s: {in_words(measured.shares)}",
        ]


def fit(measured: Measured) -> dict[str, Cost]:
    """What each kind of instruction cost on average, without the waits that its program does not ask for."""
    seen: dict[str, list[Cost]] = {}
    for bars, instructions in zip(measured.rows, measured.program.program, strict=True):
        for bar, (kind, *_) in zip(bars, instructions, strict=True):
            waits = {lane: sum(end - begin for on, begin, end in bar.waits if on == lane) for lane in LANES}
            exposed = 0.0 if kind == "FB" else waits["experts"]
            seconds = bar.end - bar.begin - waits["pipeline"] - waits["experts"] + exposed
            seen.setdefault(kind, []).append(Cost(seconds, exposed))
    return {
        kind: Cost(fmean(each.seconds for each in costs), fmean(each.exposed for each in costs))
        for kind, costs in seen.items()
    }


def shifted(bar: Bar, zero: float) -> Bar:
    """The same, with its times counted from `zero`."""
    waits = tuple((lane, begin - zero, end - zero) for lane, begin, end in bar.waits)
    return Bar(bar.name, bar.begin - zero, bar.end - zero, waits)


def in_words(shares: dict[str, float]) -> str:
    """`bubble 12.0 %, exposed communication 3.4 % (1.2 % of the pairs)`, of what is known."""
    words = [f"{name} {100 * shares[key]:.1f} %" for key, name in SHARES.items() if key in shares]
    pairs = shares.get("exposed_comm_pairs")
    return ", ".join(words) + (f" ({100 * pairs:.1f} % of the pairs)" if pairs is not None else "")


SHARES = {"bubble": "bubble", "exposed_comm": "exposed communication"}
LANES = {"pipeline": "·", "experts": "░"}  # how waits are drawn in a text


# ---------------------------------------------------------------- a terminal
def text(measured: Measured, title: str, *, colour: bool | None = None, width: int | None = None) -> str:
    """Two lines of characters a rank, `width` wide; by default as wide and colourful as the terminal is."""
    terminal = sys.stdout.isatty()
    if colour is None:
        colour = terminal and not os.environ.get("NO_COLOR")
    step = Comparison(measured, title)
    labels = [f"rank {rank}  {heading:<8}  " for rank in range(len(step.rows)) for heading in HEADINGS]
    margin = max(map(len, labels))
    columns = max((width or (shutil.get_terminal_size().columns if terminal else 160)) - margin, 20)
    lines = [step.heading, *step.notes, ""]
    ticks = [f"{step.seconds * at / 4:.3f} s" for at in range(4)]
    lines.append("time".ljust(margin) + "".join(tick.ljust(columns // 4) for tick in ticks).rstrip())
    for rank, rows in enumerate(step.rows):
        for heading, bars in zip(HEADINGS, rows, strict=True):
            label = f"rank {rank}" if heading == HEADINGS[0] else ""
            drawn = _characters(step, bars, step.instructions[rank], columns)
            lines.append(f"{label:<{margin - 10}}{heading:<8}  " + join(drawn, colour))
    return "\n".join([*lines, "", *legend(step.grid, colour), "░ stands still for experts"]) + "\n"


def _characters(
    step: Comparison, bars: list[Bar], instructions: tuple[Instruction, ...], columns: int
) -> list[Character]:
    """One row: a name where it fits, a line as long as the instruction lasts, waits over it."""
    line: list[Character] = [("·", None)] * columns
    scale = columns / step.seconds
    for bar, ins in zip(bars, instructions, strict=True):
        first, last = round(bar.begin * scale), round(bar.end * scale)
        halves = [step.look[half] for half in passes(ins)]
        cells: list[Character] = []
        for at in range(first, last):
            half = halves[-1] if 2 * (at - first) >= last - first else halves[0]
            cells.append(("─", ANSI[half.lane % len(ANSI)][half.kind]))
        for lane, begin, end in bar.waits:
            for at in range(round(begin * scale) - first, round(end * scale) - first):
                cells[at : at + 1] = [(LANES[lane], None)]
        name = "".join(name_of(half) for half in halves)
        shown = f"[{name}]" if len(halves) > 1 else name
        free = {at for at, (character, _) in enumerate(cells) if character == "─"}
        fits = [at for at in sorted(free) if free.issuperset(range(at, at + len(shown)))]
        for at, character in enumerate(shown, fits[0]) if fits else ():
            cells[at] = (character, cells[at][1])
        line[first:last] = cells
    return line


# ---------------------------------------------------------------- a picture
STYLE = """<style>
.still { fill: #c92a2a; fill-opacity: .75 }
.waits { fill: #f1f3f5 }
</style>"""


def svg(measured: Measured, title: str) -> str:
    """The comparison as an SVG picture; pointing at a bar in a browser says what it is and how long it took."""
    step = Comparison(measured, title)
    scale = WIDTH / step.seconds
    pitch = 2 * ROW + 3 * GAP
    bottom = TOP + len(step.rows) * pitch
    width, height = LEFT + WIDTH + 90, bottom + 38 + (len(step.grid.lanes) + 2) * (ROW + GAP)
    out = [*opening(step.grid, width, height, step.heading, *step.notes), STYLE]
    for tick in range(11):
        x = LEFT + tick * WIDTH / 10
        out.append(f'<path d="M{x:.0f} {TOP - 4}V{bottom}" stroke="#e9ecef"/>')
        out.append(f'<text class="tick faint" x="{x:.0f}" y="{TOP - 10}">{step.seconds * tick / 10:.3f} s</text>')
    for rank, rows in enumerate(step.rows):
        y = TOP + rank * pitch
        out.append(f'<text x="16" y="{y + ROW + 6}">rank {rank}</text>')
        for heading, bars in zip(HEADINGS, rows, strict=True):
            out.append(f'<rect class="idle" x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW}"/>')
            out.append(f'<text class="faint" x="{LEFT + WIDTH + 8}" y="{y + 16}">{heading}</text>')
            for bar, ins in zip(bars, step.instructions[rank], strict=True):
                out += _svg_bar(bar, [step.look[half] for half in passes(ins)], y, scale)
            y += ROW + GAP // 2
    out += svg_legend(step.grid, bottom + 30)
    y = height - ROW - GAP
    out.append(f'<rect class="still" x="{LEFT}" y="{y}" width="20" height="{ROW}"/>')
    out.append(f'<text x="{LEFT + 28}" y="{y + 16}">stands still for experts</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _svg_bar(bar: Bar, halves: list[Pass], y: int, scale: float) -> list[str]:
    """An instruction, the forward of a pair over its backward, and the waits in it."""
    x, width, height = LEFT + bar.begin * scale, (bar.end - bar.begin) * scale, ROW / len(halves)
    hint = " with ".join(f"{NAMES[half.kind]} of stage {half.stage}, micro-batch {half.mb}" for half in halves)
    hint = escape(f"{hint}: {1e3 * (bar.end - bar.begin):.2f} ms")
    out = []
    for at, half in enumerate(halves):
        top = y + at * height
        out.append(
            f'<g class="{half.kind}{half.lane % len(ANSI)}">'
            f'<rect x="{x:.2f}" y="{top:g}" width="{width:.2f}" height="{height:g}"/>'
        )
        if width > 14:
            out.append(f'<text x="{x + width / 2:.2f}" y="{top + height / 2 + 4:g}">{half.number}</text>')
        out.append(f"<title>{hint}</title></g>")
    for lane, begin, end in bar.waits:
        style = "still" if lane == "experts" else "waits"
        box = f'x="{LEFT + begin * scale:.2f}" y="{y}" width="{(end - begin) * scale:.2f}" height="{ROW}"'
        of = "experts" if lane == "experts" else "another pipeline rank"
        out.append(
            f'<rect class="{style}" {box}><title>stands still for {of}: {1e3 * (end - begin):.2f} ms</title></rect>'
        )
    return out
