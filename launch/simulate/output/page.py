"""A simulated step as one HTML page that needs nothing else: no network, no server, no other file.

Figures and tables are written here and can be read without JavaScript; `page.js` draws the timeline of all pipeline
ranks, which zooms and pans down to the segments inside an instruction; `page.css` has a light and a dark face. Where
figures of the very step are published (`published`), they stand beside the simulated ones.
"""

import json
from collections import Counter
from dataclasses import fields, is_dataclass
from html import escape
from importlib.resources import files
from statistics import fmean
from typing import Any

from launch.simulate.cluster.sheet import Sheet
from launch.simulate.output import published
from launch.simulate.output.trace import SHOWN
from launch.simulate.result import Result
from parallel.schedule.program import spell

GIB = 2**30
NAMES = {
    "forward": "forward (1F)",
    "backward_input": "backward for inputs (1B)",
    "backward_weight": "backward for weights (1W)",
    "overlapped": "overlapped pairs (1F1B)",
    "bubble": "bubble",
    "optimizer": "optimizer",
    "checkpoint": "checkpoints, on average",
}
ABOUT = {"name", "gpus", "node_size", "sms", "provenance"}  # of a sheet: what the cluster is, not what it can do


def html(result: Result) -> str:
    """The page."""
    title = f"{result.recipe.run.name or 'recipe'} on {result.sheet.name}"
    layout = result.recipe.parallel
    facts = [
        f"{layout.world_size:,} of {result.sheet.gpus:,} GPUs",
        f"{layout.schedule}, {layout.pipeline} ranks a pipeline",
        f"{result.program.microbatches} micro-batches of {layout.microbatch_size}",
        f"experts over {layout.expert} ranks",
        result.recipe.precision,
        f"{result.tokens:,} tokens a step",
    ]
    folder = files("launch.simulate.output")
    style, script = ((folder / name).read_text() for name in ("page.css", "page.js"))
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · weft simulate</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>\n{style}</style></head><body><main>",
            f"<header><p>weft simulate</p><h1>{escape(title)}</h1>",
            f"<p>{escape(' · '.join(facts))}</p></header>",
            _headline(result),
            _timeline(),
            f'<div class="pair">{_breakdown(result)}{_exposed(result)}</div>',
            _memory(result),
            f'<div class="pair">{_cost(result)}{_uncovered(result)}</div>',
            _confidence(result.sheet),
            f"<footer>Simulated in {result.wall_seconds:.1f} s. No GPU was used.</footer></main>",
            f'<script type="application/json" id="data">{data(result)}</script>',
            f"<script>\n{script}</script></body></html>",
        ]
    )


def data(result: Result) -> str:
    """What the page draws, as JSON.

    Races once each; for each rank [name, begin, end, race] in microseconds, and MiB held at most during an instruction
    and after it. Where all races differ, those that a rank has shown `SHOWN` times the like of have no lanes.
    """
    races = {id(slot.race): slot.race for row in result.timeline.ranks for slot in row}
    numbers = {key: number for number, key in enumerate(races)}
    shown = shown_races(result)
    spans = [
        {
            "seconds": race.seconds,
            "exposed": race.exposed,
            "spans": [
                [each.lane, each.name, each.layer, _micro(each.begin), _micro(each.end)]
                for each in race.spans
                if key in shown
            ],
        }
        for key, race in races.items()
    ]
    ranks = [
        {
            "stages": held,
            "slots": [[spell(s.instruction), _micro(s.begin), _micro(s.end), numbers[id(s.race)]] for s in row],
            "held": [[round(size / 2**20) for size in sizes] for sizes in peak.curve],
        }
        for held, row, peak in zip(result.program.placement, result.timeline.ranks, result.memory, strict=True)
    ]
    lines = {"end": _micro(result.timeline.seconds), "step": _micro(result.step_seconds)}
    lines["stages"] = result.program.stages
    lines["memory"] = round(result.sheet.memory_bytes / 2**20)
    text = json.dumps({**lines, "races": spans, "ranks": ranks}, separators=(",", ":"))
    return text.replace("</", "<\\/")


def shown_races(result: Result) -> set[int]:
    """Ids of the races whose lanes are drawn."""
    shown, times = set[int](), Counter[tuple[object, ...]]()
    for rank, row in enumerate(result.timeline.ranks):
        for slot in row:
            like = rank, slot.instruction[0], *slot.instruction[1::2]
            times[like] += 1
            if times[like] <= SHOWN:
                shown.add(id(slot.race))
    return shown


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)


# ---------------------------------------------------------------- pieces
def _section(title: str, note: str, *body: str, name: str = "") -> str:
    opening = f'<section id="{name}">' if name else "<section>"
    return f'{opening}<h2>{title}</h2><p class="note">{note}</p>{"".join(body)}</section>'


def _table(heads: list[str], rows: list[list[str]], numeric: bool = True) -> str:
    """Cells are HTML. With `numeric`, all columns but the first are aligned to the right."""
    head = "".join(f"<th>{each}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    style = ' class="numeric"' if numeric else ""
    return f'<div class="wide"><table{style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bar(parts: list[tuple[str, float, str]], full: float, mark: float | None = None) -> str:
    """Parts of a whole as (class, size, hint) on a track of length `full`, with a line at `mark`."""
    cells = "".join(
        f'<i class="{style}" style="width:{100 * size / full:.3f}%" title="{escape(hint)}"></i>'
        for style, size, hint in parts
        if size > 0
    )
    line = f'<b style="left:{100 * mark / full:.3f}%"></b>' if mark is not None else ""
    return f'<div class="bar">{cells}{line}</div>'


def _legend(names: list[tuple[str, str]]) -> str:
    return '<p class="legend">' + "".join(f'<span><i class="{c}"></i>{n}</span>' for c, n in names) + "</p>"


def _headline(result: Result) -> str:
    real = published.of(result.recipe, result.sheet.name, result.tokens)
    hours = result.gpu_hours_per_trillion_tokens
    step = f"published: {real.step_seconds:.3f} s" if real else f"{result.tokens:,} tokens"
    day = (
        f"published: {real.tokens_per_day / 1e9:.1f} B" if real else f"{1e12 / result.tokens_per_day:.2f} days for 1 T"
    )
    most = max(peak.total for peak in result.memory)
    room = (result.sheet.memory_bytes - most) / GIB
    cards = [
        ("step", f"{result.step_seconds:.3f} s", step),
        ("tokens a day", _short(result.tokens_per_day), day),
        ("GPU-hours for 1 T tokens", _short(hours), f"{1e12 / result.tokens_per_day:.2f} days"),
        ("money for 1 T tokens", _short(hours * result.sheet.price_per_hour), f"at {_price(result.sheet)}"),
        *_mfu(result, real),
        (
            "most memory of a rank",
            f"{most / GIB:.1f} GiB",
            f"{abs(room):.1f} GiB {'free' if room >= 0 else 'too much'}",
        ),
    ]
    body = "".join(
        f"<div{' class=bad' if 'too much' in note else ''}><p>{name}</p><strong>{figure}</strong><p>{note}</p></div>"
        for name, figure, note in cards
    )
    return f'<div class="cards" id="headline">{body}</div>'


def _mfu(result: Result, real: published.Published | None) -> list[tuple[str, str, str]]:
    found = result.as_json().get("mfu") or {}
    cards = []
    for key, words in (("causal", "causal attention"), ("noncausal", "full attention")):
        if key in found:
            note = f"published: {real.mfu[key]:.2f} %" if real else "of the BF16 peak"
            cards.append((f"MFU, {words}", f"{100 * found[key]:.1f} %", note))
    return cards


def _short(number: float) -> str:
    """Three to four digits and a letter."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.1f}"


def _price(sheet: Sheet) -> str:
    return f"{sheet.price_per_hour:.2f} a GPU-hour"


def _timeline() -> str:
    keys = (
        "Wheel or <kbd>+</kbd> <kbd>−</kbd> zooms, dragging or <kbd>←</kbd> <kbd>→</kbd> moves, <kbd>0</kbd> shows "
        "the whole step. Closer by, a bar shows two lanes: SMs above, network below. A click shows one bar large."
    )
    legend = _legend(
        [
            ("f0", "forward of what enters at the first rank"),
            ("b0", "its backward"),
            ("f1", "forward of what enters elsewhere"),
            ("b1", "its backward"),
            ("w", "weight gradients"),
            ("x", "expert exchange"),
            ("wait", "waits for it"),
        ]
    )
    return _section(
        "Timeline",
        keys,
        legend,
        '<div class="stage"><canvas id="timeline" tabindex="0" aria-label="timeline of all pipeline ranks"></canvas>'
        '<div id="hint" hidden></div></div><canvas id="inside" aria-label="one instruction"></canvas>'
        "<noscript>The timeline needs JavaScript; everything else does not.</noscript>",
        name="steps",
    )


def _breakdown(result: Result) -> str:
    real = published.of(result.recipe, result.sheet.name, result.tokens)
    rows = []
    for kind, took in [*result.breakdown.items(), ("step", result.step_seconds)]:
        row = [NAMES.get(kind, kind), f"{took:.3f} s", f"{100 * took / result.step_seconds:.1f} %"]
        if real:
            there = real.step_seconds if kind == "step" else real.breakdown.get(kind)
            row += [f"{there:.3f} s", f"{100 * (took / there - 1):+.1f} %"] if there else ["", ""]
        rows.append(row)
    parts = [(f"k-{kind}", took, f"{NAMES[kind]}: {took:.3f} s") for kind, took in result.breakdown.items()]
    heads = ["a rank's seconds", "simulated", "share"] + (["published", "deviation"] if real else [])
    note = "Mean over pipeline ranks; what is overlapped counts once."
    note += f" Published: {escape(real.source)}. No figure of the sheet is fitted to it." if real else ""
    legend = _legend([(f"k-{kind}", NAMES[kind].split(" (")[0]) for kind in result.breakdown])
    return _section("Breakdown", note, _bar(parts, sum(result.breakdown.values())), legend, _table(heads, rows))


def _exposed(result: Result) -> str:
    """Per rank: computing, standing still for experts, for other ranks."""
    rows, whole = [], result.timeline.seconds
    pairs = [slot for row in result.timeline.ranks for slot in row if slot.instruction[0] == "FB"]
    for rank, row in enumerate(result.timeline.ranks):
        still = sum(slot.race.exposed for slot in row)
        busy = sum(slot.end - slot.begin for slot in row) - still
        times = {"busy": busy, "wait": still, "idle": whole - busy - still}
        words = {"busy": "computes", "wait": "waits for experts", "idle": "waits for other ranks"}
        parts = [(key, took, f"{words[key]}: {took:.3f} s") for key, took in times.items()]
        rows.append([str(rank), _bar(parts, whole), f"{still:.2f} s", f"{times['idle']:.2f} s"])
    note = f"Standing still for experts: {result.exposed_comm:.3f} s of a rank's step on average, "
    note += f"{100 * result.exposed_comm / result.step_seconds:.1f} %"
    if pairs:
        inside = fmean(slot.race.exposed / slot.race.seconds for slot in pairs)
        note += f"; {100 * inside:.1f} % of an overlapped pair"
    legend = _legend([("busy", "computes"), ("wait", "waits for experts"), ("idle", "waits for other ranks")])
    heads = ["rank", "", "for experts", "for ranks"]
    return _section("Exposed communication", note + ".", legend, _table(heads, rows), name="exposed")


def _memory(result: Result) -> str:
    capacity = result.sheet.memory_bytes
    full = 1.02 * max(capacity, *(peak.total for peak in result.memory))
    names = [*result.memory[0].parts]
    rows = []
    for rank, peak in enumerate(result.memory):
        parts = [(f"m{names.index(n)}", size, f"{n}: {size / GIB:.2f} GiB") for n, size in peak.parts.items()]
        room = (capacity - peak.total) / GIB
        fits = f"{room:.1f} free" if room >= 0 else f'<em class="bad">{-room:.1f} too much</em>'
        bar = _bar(parts, full, capacity)
        rows.append([str(rank), bar, f"{peak.total / GIB:.1f}", fits, f"<code>{spell(peak.instruction)}</code>"])
    note = f"When each pipeline rank holds most. The line is what a GPU has: {capacity / GIB:.1f} GiB."
    detail = _table(
        ["rank", *names],
        [[str(r), *(f"{p.parts[n] / GIB:.2f}" for n in names)] for r, p in enumerate(result.memory)],
    )
    return _section(
        "Memory",
        note,
        _legend([(f"m{number}", name) for number, name in enumerate(names)]),
        _table(["rank", "", "GiB", "GiB", "at"], rows),
        '<p class="note">Over the step; the dot is the peak, the line what a GPU has.</p>',
        '<canvas id="held" aria-label="memory of all pipeline ranks over the step"></canvas>',
        f"<details><summary>by part, in GiB</summary>{detail}</details>",
        name="memory",
    )


def _cost(result: Result) -> str:
    ranks, price = result.recipe.parallel.world_size, result.sheet.price_per_hour
    goals = [("one step", float(result.tokens)), ("1 T tokens", 1e12)]
    if result.recipe.train.tokens:
        goals.append((f"the recipe's {_short(result.recipe.train.tokens)} tokens", float(result.recipe.train.tokens)))
    rows = []
    for name, tokens in goals:
        days = tokens / result.tokens_per_day
        took = f"{days:.2f} days" if days > 0.1 else f"{days * 86400:.2f} s"
        hours = days * 24 * ranks
        rows.append([name, took, _short(hours), _short(hours * price)])
    note = f"{ranks:,} GPUs at {_price(result.sheet)}, every step at the full batch, no failures, no evaluation."
    return _section("Cost", note, _table(["", "time", "GPU-hours", "money"], rows), name="cost")


def _uncovered(result: Result) -> str:
    note = "Operators of shapes that no curve of the sheet was fitted near; their times are roofline estimates."
    items = "".join(f"<li><code>{escape(each)}</code></li>" for each in result.uncovered)
    body = f"<details open><summary>{len(result.uncovered)}</summary><ul>{items}</ul></details>" if items else ""
    return _section("Uncovered shapes", note, body or "<p>none</p>", name="uncovered")


def _confidence(sheet: Sheet) -> str:
    rows = []
    for each in fields(sheet):
        if each.name in ABOUT:
            continue
        value = getattr(sheet, each.name)
        inner = value if isinstance(value, dict) else {}
        told = [key for key in inner if f"{each.name}.{key}" in sheet.provenance]
        for place, figure in [(f"{each.name}.{key}", inner[key]) for key in told] or [(each.name, value)]:
            kind, _, source = sheet.provenance.get(place, "").partition(":")
            badge = f'<em class="{escape(kind.strip())}">{escape(kind.strip())}</em>' if kind else "not said"
            rows.append([f"<code>{place}</code>", escape(_figure(figure)), badge, escape(source.strip())])
    note = "What each figure of the cluster sheet rests on. The price of a step is as good as these are."
    return _section("Confidence", note, _table(["figure", "value", "", "from"], rows, False), name="confidence")


def _figure(value: Any) -> str:
    """A figure of a sheet in few characters."""
    if is_dataclass(value):
        return ", ".join(f"{each.name} {_figure(getattr(value, each.name))}" for each in fields(value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figure(item)}" for key, item in value.items())
    if isinstance(value, tuple):
        return " x ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
