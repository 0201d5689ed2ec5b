"""The page of a simulated step: its figures are the result's, it needs no network, and a browser moves about in it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from launch.simulate import result
from launch.simulate.cluster import sheet
from launch.simulate.output import page, published
from parallel.schedule.program import spell
from train.compose import compose

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def found():
    return result.simulate(compose(["recipe=tiny"]), sheet.read("h800x2048"))


@pytest.fixture(scope="module")
def text(found):
    return page.html(found)


def test_nothing_is_fetched_from_elsewhere(text):
    assert not re.search(r"https?://|//cdn|@import|url\(|\bsrc=|<link|fetch\(|XMLHttpRequest", text)


def test_figures_are_readable_without_javascript(found, text):
    static = text.partition('<script type="application/json"')[0]
    assert f"{found.step_seconds:.3f} s" in static
    for kind, took in found.breakdown.items():
        assert f"<td>{page.NAMES[kind]}</td><td>{took:.3f} s</td>" in static
    for peak in found.memory:
        assert spell(peak.instruction) in static and f"{peak.total / 2**30:.1f}" in static
    for place, why in found.sheet.provenance.items():
        assert f"<code>{place}</code>" in static and why.partition(":")[0] in static
    for key in ("timeline", "headline", "exposed", "memory", "cost", "confidence", "uncovered"):
        assert f'id="{key}"' in static


def test_the_timeline_has_every_instruction_and_its_lanes(found):
    drawn = json.loads(page.data(found))
    for rank, row in zip(drawn["ranks"], found.timeline.ranks, strict=True):
        assert [slot[0] for slot in rank["slots"]] == [spell(slot.instruction) for slot in row]
        for (_, begin, end, race), slot in zip(rank["slots"], row, strict=True):
            assert (begin, end) == pytest.approx((1e6 * slot.begin, 1e6 * slot.end), abs=0.6)
            assert len(drawn["races"][race]["spans"]) == len(slot.race.spans)


def test_what_does_not_fit_and_what_no_curve_covers_is_said(found):
    small = replace(found, sheet=replace(found.sheet, memory_bytes=1000), uncovered=["grouped_linear <3, 5>"])
    text = page.html(small)
    assert "too much" in text and "grouped_linear &lt;3, 5&gt;" in text


def test_published_figures_stand_beside_their_own_run_only(text):
    run = compose(["recipe=v3", "data=stdlib"])
    assert published.of(run, "h800x2048", 62_914_560) is published.V3
    assert published.of(run, "h200x8", 62_914_560) is None
    run.parallel.schedule = "1f1b"
    assert published.of(run, "h800x2048", 62_914_560) is None and "<th>published<" not in text
    assert sum(published.V3.breakdown.values()) == pytest.approx(19.90, abs=0.005)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_zooms_pans_and_tells(text, tmp_path):
    drive = """<script>{
    const said = {}, press = key => canvas.dispatchEvent(new KeyboardEvent("keydown", { key }))
    const length = () => view.to - view.from
    press("+"); said.zoomed = length() / step.end
    const before = view.from; press("ArrowRight"); said.moved = (view.from - before) / length(); press("0")
    const box = canvas.getBoundingClientRect()
    const where = { clientX: box.left + LEFT + 2, clientY: box.top + TOP + 5, bubbles: true, pointerId: 1 }
    canvas.dispatchEvent(new WheelEvent("wheel", { ...where, deltaY: -700, cancelable: true }))
    said.wheel = length() / step.end
    press("Home"); canvas.dispatchEvent(new PointerEvent("pointermove", where))
    said.hint = hint.textContent; said.whole = length() / step.end; draw()
    const dots = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
    said.colours = new Set(new Uint32Array(dots.buffer)).size
    document.documentElement.dataset.said = JSON.stringify(said)
    }</script></body>"""
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", drive))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([str(CHROMIUM), *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r'data-said="(.*?)"', done.stdout)
    assert match and 'data-drawn="2"' in done.stdout, done.stderr[-2000:]
    said = json.loads(match[1].replace("&quot;", '"'))
    assert said["zoomed"] == pytest.approx(0.6) and said["moved"] == pytest.approx(0.2) and said["whole"] == 1
    assert said["wheel"] < 0.5 and said["colours"] > 8
    first = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["ranks"][0]["slots"][0][0]  # type: ignore[index]
    assert said["hint"].startswith(f"{first} on rank 0\nforward of stage ") and "exposed" in said["hint"]
