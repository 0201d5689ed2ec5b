"""Lines over the steps of a run, as a picture (SVG): what `weft load` and the studies in tests/benchmarks draw with.

A picture is a `page` with a heading, whose body is made of `chart`s and of `label`s; sizes are in pixels.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any
from xml.sax.saxutils import escape

Point = tuple[float, float]
LEFT, RIGHT, WIDTH = 76, 130, 960  # pixels: margins, and the whole
INNER = WIDTH - LEFT - RIGHT
STYLE = """
text { font: 12px Inter, "Helvetica Neue", Helvetica, Arial, sans-serif; fill: #343a40 }
.heading { font-size: 16px; font-weight: 600; fill: #212529 }
.title { font-size: 13px; font-weight: 600; fill: #212529 }
.faint { font-size: 11px; fill: #868e96 }
.warning { font-weight: 600; fill: #d9480f }
.small { font-size: 10px }
.middle { text-anchor: middle }
.end { text-anchor: end }
.grid { stroke: #e9ecef }
.cells { shape-rendering: crispEdges }
polyline { fill: none; stroke-linejoin: round }
"""


def page(heading: str, note: str, height: int, body: list[str]) -> str:
    """A picture with its heading and a note under it."""
    heading = escape(heading, {'"': "&quot;"})
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{heading}">',
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text class="heading" x="16" y="28">{heading}</text>',
            label(16, 48, note, "faint"),
            *body,
            "</svg>\n",
        ]
    )


def chart(title: str, courses: Sequence[tuple[str, str, float, Sequence[Point]]], top: int, height: int) -> list[str]:
    """Lines over steps from 0, or the lowest below it, each (name, colour, width, points).

    Those with a name are listed, and their last values stand at their ends.
    """
    out, right = [label(16, top - 12, title, "title")], LEFT + INNER
    for name, paint, width, course in reversed(courses):
        if course and name:
            right -= round(5.6 * len(name)) + 44
            out.append(f'<path d="M{right} {top - 16}h18" stroke="{paint}" stroke-width="{width}"/>')
            out.append(label(right + 24, top - 12, name, "faint"))
    points = [point for *_, course in courses for point in course]
    if not points:
        return [*out, label(LEFT, top + 20, "not recorded", "faint")]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    highest, lowest = max(y for _, y in points), min(0.0, *(y for _, y in points))
    unit = tick((highest - lowest) / 4)
    below, above = math.floor(lowest / unit), math.ceil(highest / unit)
    above += below == above
    across, up = INNER / max(last - first, 1), height / (above - below)

    def place(x: float, y: float) -> Point:
        return LEFT + (x - first) * across, top + up * (above - y / unit)

    for number in range(below, above + 1):
        y = place(first, number * unit)[1]
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{INNER}"/>')
        out.append(label(LEFT - 8, round(y) + 4, f"{number * unit:g}", "faint end"))
    apart = max(1, round(tick((last - first) / 8)))
    for step in range(math.ceil(first / apart) * apart, int(last) + 1, apart):
        out.append(label(round(place(step, 0)[0]), top + height + 16, f"{step:,}", "faint middle"))
    out.append(label(LEFT + INNER + 26, top + height + 16, "step", "faint"))
    ends = []
    for name, paint, width, course in courses:
        thinned = [place(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in bins(course, INNER // 2)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in thinned)
        out.append(f'<polyline points="{line}" stroke="{paint}" stroke-width="{width}"/>')
        ends += [(thinned[-1][1] + 4, paint, course[-1][1])] if course and name else []
    bottom, at = top + height + 4, -math.inf
    for under, (y, paint, value) in zip(range(len(ends) - 1, -1, -1), sorted(ends), strict=True):
        at = max(at + 15, min(y, bottom - 15 * under))  # so that numbers neither cover each other nor leave the chart
        out.append(f'<text x="{LEFT + INNER + 12}" y="{at:.0f}" style="fill:{paint}">{value:.2f}</text>')
    return out


def tick(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(power * times for times in (1, 2, 5, 10) if power * times >= least * (1 - 1e-9))


def bins(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """`items` in at most `most` parts as equal as can be."""
    count = min(most, len(items))
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]


def label(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" class="{style}">{escape(words)}</text>'
