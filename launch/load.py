"""The load of a run's experts: `text` for a terminal, `svg` as a picture (`weft load RUN`).

The picture has a heat map of all layers at the end of the run, one of the most unbalanced layer from its beginning to
its end, the biases of that layer, and the course of the violation. A colour is a load relative to the mean of its layer
at that time: white is the mean, orange more, blue less, black nothing. Source: `load.jsonl` and `metrics.jsonl`
(docs/reference/metrics.md).
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from launch.charts import INNER, LEFT, WIDTH, Point, bins, chart, label, page
from parallel.errors import UserError

LAST = 100  # steps that count as the end of a run
LINES = 64  # about so many biases at most are drawn
FORCED = "train.force_balanced=true: tokens went round the experts, no router chose this"


@dataclass(frozen=True)
class Record:
    """What each expert of each layer got in the `steps` steps up to number `step`."""

    step: int
    steps: int
    load: dict[str, list[int]]


@dataclass(frozen=True)
class History:
    """Records in order, and what `metrics.jsonl` says besides.

    course: figures by name, as (step, value). biases: of each expert by layer, likewise. forced: no router chose.
    """

    records: list[Record]
    course: dict[str, list[Point]]
    biases: dict[str, list[list[Point]]]
    forced: bool

    @property
    def layers(self) -> list[str]:
        return list(self.records[0].load)

    def total(self, layer: str, records: Iterable[Record]) -> list[int]:
        """Tokens of each expert in all of `records`."""
        return [sum(each) for each in zip(*(record.load[layer] for record in records), strict=True)]

    def end(self) -> list[Record]:
        """The records that hold the last `LAST` steps."""
        last = self.records[-1].step
        return [record for record in self.records if record.step - record.steps >= last - LAST] or self.records[-1:]

    def worst(self) -> str:
        """The most unbalanced layer at the end."""
        return max(self.layers, key=lambda layer: max(relative(self.total(layer, self.end()))))


# Figures of metrics.jsonl that are drawn: what they are called, colour and width of the line.
FIGURES = {
    "max_violation": ("each batch, its worst layer", "#ffa94d", 1.2),
    "max_violation_global_mean": ("global, mean of layers", "#1862ab", 2.2),
}


def read(run: Path) -> History:
    """What `run` wrote down. Raises `UserError` if there is nothing to see."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; expected that of a run, as runs/NAME")
    records = [Record(each["step"], each["steps"], each["load"]) for each in lines(run / "load.jsonl")]
    if not records:
        raise UserError(f"{run}: nothing in {run}/load.jsonl; expected a run of weft train with log.load_every above 0")
    steps = list(lines(run / "metrics.jsonl"))
    course = {key: [(each["step"], each[key]) for each in steps if each.get(key) is not None] for key in FIGURES}
    told = [each for each in steps if "router_bias" in each]
    biases = {
        layer: [
            [(each["step"], bias) for each, bias in zip(told, course, strict=True)]
            for course in zip(*(each["router_bias"][layer] for each in told), strict=True)
        ]
        for layer in (records[0].load if told else ())
    }
    return History(records, course, biases, any(each.get("force_balanced") for each in steps))


def lines(path: Path) -> Iterable[dict[str, Any]]:
    """The whole objects of a file of JSON lines; the last may be torn while a run goes on."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            return


def relative(load: Sequence[float]) -> list[float]:
    """Loads over their mean."""
    mean = fmean(load)
    return [each / mean if mean else 1.0 for each in load]


def recorded(run: Path) -> bool:
    """Whether there is something to draw."""
    return any(True for _ in lines(run / "load.jsonl"))


def write(run: Path) -> Path:
    """Draw the load of `run` into its `pictures` folder; returns the file."""
    file = run / "pictures/load.svg"
    picture = svg(read(run), str(run))
    file.parent.mkdir(exist_ok=True)
    file.write_text(picture)
    return file


# ---------------------------------------------------------------- a terminal


def text(history: History, title: str) -> str:
    """A row a layer: its busiest and its idlest expert over the last steps."""
    end = history.end()
    out = [f"{title}: tokens of an expert over the mean of its layer, {span(end)}"]
    out += [FORCED, ""] if history.forced else [""]
    out.append(f"{'layer':>5}  {'most':>6}  {'expert':<6}  {'least':>6}  expert")
    for layer in history.layers:
        loads = relative(history.total(layer, end))
        busy, idle = loads.index(max(loads)), loads.index(min(loads))
        out.append(f"{layer:>5}  {loads[busy]:>6.2f}  {busy:<6}  {loads[idle]:>6.2f}  {idle}")
    return "\n".join(out)


def span(records: Sequence[Record]) -> str:
    """`steps 901 to 1000`."""
    return f"steps {records[0].step - records[0].steps + 1:,} to {records[-1].step:,}"


# ---------------------------------------------------------------- a picture

NOTHING = "#212529"
STOPS = (  # log2 of a relative load, and its colour
    (-2.0, (0x18, 0x62, 0xAB)),
    (-1.0, (0x4D, 0xAB, 0xF7)),
    (-0.4, (0xBF, 0xE0, 0xFF)),
    (0.0, (0xFA, 0xFA, 0xFA)),
    (0.4, (0xFF, 0xD8, 0xA8)),
    (1.0, (0xFF, 0x92, 0x2B)),
    (2.0, (0xD9, 0x48, 0x0F)),
)


def svg(history: History, title: str) -> str:
    """The whole picture."""
    layers, end, worst = history.layers, history.end(), history.worst()
    experts = len(end[0].load[worst])
    heading = f"{title}: load of {experts} experts in {len(layers)} layers"
    note = "tokens of an expert over the mean of its layer, summed over the steps of a cell"

    y = 108
    body = [label(16, 66, FORCED, "warning")] if history.forced else []
    body += [*scale(WIDTH - 246, 20), label(16, y - 12, f"All layers, {span(end)}", "title")]
    rows = [relative(history.total(layer, end)) for layer in layers]
    row, small = (20, "") if len(layers) <= 16 else (12, "small")
    body += heat_map(rows, y, row, [f"layer {layer}" for layer in layers])
    body.append(label(LEFT + INNER + 12, y - 12, "least", "faint"))
    body.append(label(LEFT + INNER + 62, y - 12, "most", "faint"))
    for number, loads in enumerate(rows):
        at = y + number * row + row // 2 + 4
        body += [label(LEFT + INNER + 12 + 50 * i, at, f"{f(loads):.2f}", small) for i, f in enumerate((min, max))]
    y += len(layers) * row
    body += [label(x, y + 16, str(e), "faint middle") for e, x in every(experts, INNER / experts)]
    body.append(label(LEFT + INNER + 26, y + 16, "expert", "faint"))

    y += 68
    columns = bins(history.records, 160)
    body.append(label(16, y - 12, f"Layer {worst}, the most unbalanced, from the first step to the last", "title"))
    over_time = [relative(history.total(worst, column)) for column in columns]
    row = max(2, min(12, 256 // experts))
    body += heat_map(list(zip(*over_time, strict=True)), y, row, [])
    body += [
        label(68, y + round((e + 0.5) * row) + 4, str(e), "faint end") for e in range(0, experts, step_of(experts))
    ]
    body.append(label(16, y + 12, "expert", "faint"))
    y += experts * row
    width = INNER / len(columns)
    for column, x in every(len(columns), width):
        body.append(label(x, y + 16, f"{columns[column][-1].step:,}", "faint middle"))
    body.append(label(LEFT + INNER + 26, y + 16, "step", "faint"))

    y += 68
    biases = sorted(history.biases.get(worst, []), key=lambda course: course[-1][1])
    shown = biases[:: math.ceil(experts / LINES)]  # from the lowest, blue, to the highest, orange
    paints = [colour(2 ** (4 * i / max(len(shown) - 1, 1) - 2)) for i in range(len(shown))]
    curves = [("", paint, 1.0, points) for paint, points in zip(paints, shown, strict=True)]
    body += chart(f"Layer {worst}: biases of its experts", curves, y, 120)
    y += 120 + 68
    courses = [(*look, history.course[figure]) for figure, look in FIGURES.items()]
    body += chart("Violation: how far the busiest expert is above the mean", courses, y, 150)
    return page(heading, note, y + 150 + 44, body)


def scale(x: int, y: int) -> list[str]:
    """What the colours mean: nothing, then a quarter of the mean to four times."""
    out = [
        f'<rect x="{x}" y="{y}" width="14" height="12" fill="{NOTHING}"/>',
        label(x + 7, y + 26, "0", "faint middle"),
    ]
    steps, left, width = 40, x + 22, 5
    for i in range(steps):
        paint = colour(2 ** (4 * (i + 0.5) / steps - 2))
        out.append(f'<rect class="cells" x="{left + width * i}" y="{y}" width="{width}" height="12" fill="{paint}"/>')
    marks = ("¼", "½", "mean", "2", "4 ×")
    return out + [label(left + i * steps * width // 4, y + 26, mark, "faint middle") for i, mark in enumerate(marks)]


def colour(value: float) -> str:
    """Of a relative load, in steps of a sixteenth of a doubling."""
    if value <= 0:
        return NOTHING
    at = min(max(round(16 * math.log2(value)) / 16, STOPS[0][0]), STOPS[-1][0])
    (low, one), (high, other) = next(pair for pair in pairwise(STOPS) if at <= pair[1][0])
    part = (at - low) / (high - low)
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(one, other, strict=True))


def heat_map(rows: Sequence[Sequence[float]], top: int, height: int, names: Sequence[str]) -> list[str]:
    """Rows of cells, one path for each colour, so that a large model's picture stays small."""
    paths: dict[str, list[str]] = defaultdict(list)
    edges = [LEFT + round(INNER * i / len(rows[0])) for i in range(len(rows[0]) + 1)]
    gap = 1 if height >= 8 else 0
    for number, row in enumerate(rows):
        y = top + number * height
        for (left, right), value in zip(pairwise(edges), row, strict=True):
            wide = right - left - (1 if right - left >= 8 else 0)
            paths[colour(value)].append(f"M{left} {y}h{wide}v{height - gap}h-{wide}z")
    out = [f'<path class="cells" fill="{paint}" d="{"".join(parts)}"/>' for paint, parts in paths.items()]
    style = "end" if height >= 14 else "end small"
    return out + [label(LEFT - 8, top + i * height + height // 2 + 4, name, style) for i, name in enumerate(names)]


def step_of(count: int) -> int:
    """Between numbers on an axis of `count` cells: 8 to 16 of them are shown."""
    return 1 if count <= 16 else 2 ** math.ceil(math.log2(count / 16))


def every(count: int, width: float) -> list[tuple[int, int]]:
    """(number, middle in pixels) of the cells that are named on an axis."""
    return [(i, LEFT + round((i + 0.5) * width)) for i in range(0, count, step_of(count))]
