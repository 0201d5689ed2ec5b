"""The measured step under its program: pictures of steps whose times are known, read back."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch import cli, compare
from parallel import timeline
from parallel.schedule import build
from parallel.schedule.program import passes, spell
from parallel.timeline import Span, Step, Timeline

SVG = "{http://www.w3.org/2000/svg}"
COSTS = {"F": 0.1, "B": 0.2, "I": 0.1, "W": 0.1, "FB": 0.3}


def record(run: Path, schedule: str, ranks: int, microbatches: int, late: float = 0.0, pipelines: int = 1) -> None:
    """Traces of a step that kept to its program, but for `late` seconds of waiting for experts in each instruction.

    With `pipelines`, each rank of the others has its own file too, in which nothing is right.
    """
    program = build(schedule, ranks, microbatches)
    costs = {kind: cost + late for kind, cost in COSTS.items()}
    for rank in range(ranks * pipelines):
        file = Timeline(run / "traces", rank, pipelines)
        step = Step(7, program, 0.0, 100.0)
        position = rank // pipelines
        for ins, end in zip(program.program[position], program.ends(costs)[position], strict=True):
            begin = end - costs[ins[0]]
            span = Span("instruction", spell(ins), {}, None, 50 + begin, 50 + end)
            step.spans.append(span)
            if rank % pipelines:
                span.name = "F(9, 9)"
            if late:
                step.spans.append(Span("wait", "dispatch", {"on": "experts"}, span, 50 + begin, 50 + begin + late))
        file.add(step, {"bubble": 0.25, "exposed_comm": 0.125, "exposed_comm_pairs": 0.0625})


def weft(capsys, *words: str) -> str:
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("schedule", "ranks", "microbatches"), [("1f1b", 3, 5), ("dualpipe", 4, 8), ("zbv", 2, 4)])
def test_a_step_that_kept_to_its_program_is_drawn_twice_the_same(schedule, ranks, microbatches, tmp_path):
    record(tmp_path, schedule, ranks, microbatches, pipelines=2)
    measured = timeline.read(tmp_path)
    lines = compare.text(measured, "run", width=150).splitlines()
    program, ran = (
        [line.partition(f"{heading:<8}  ")[2] for line in lines if re.match(rf"(rank \d| ) +{heading} ", line)]
        for heading in compare.HEADINGS
    )
    assert program == ran and len(ran) == ranks
    for row, instructions in zip(ran, measured.program.program, strict=True):
        assert len(re.findall(r"[FBIWfbiw]'?\d", row)) == sum(len(passes(ins)) for ins in instructions)
    ends = measured.program.ends(COSTS)
    took, busy = max(row[-1] for row in ends), [sum(COSTS[ins[0]] for ins in row) for row in measured.program.program]
    bubble = 1 - sum(busy) / ranks / took
    assert lines[1].startswith(f"program   {took:.3f} s: bubble {100 * bubble:.1f} %, exposed communication 0.0 %")
    assert lines[2] == f"measured  {took:.3f} s: bubble 25.0 %, exposed communication 12.5 % (6.2 % of the pairs)"


def test_only_waits_of_pairs_are_held_against_the_step(tmp_path):
    record(tmp_path, "dualpipe", 2, 6, late=0.05)
    step = compare.Comparison(timeline.read(tmp_path), "run")
    costs = compare.fit(timeline.read(tmp_path))
    for kind, cost in costs.items():
        hidden = kind == "FB"
        assert cost.seconds == pytest.approx(COSTS[kind] + (0 if hidden else 0.05))
        assert cost.exposed == pytest.approx(0 if hidden else 0.05)
    assert "FB" in costs and step.rows[0][1][-1].end > step.rows[0][0][-1].end
    text = compare.text(timeline.read(tmp_path), "run", width=150)
    marked = [line for line in text.splitlines() if "░" in line]
    assert len(marked) == 3, "both measured rows, and the legend"


@pytest.mark.parametrize("late", [0.0, 0.05])
def test_the_picture_has_every_pass_of_both_and_every_wait(late, tmp_path):
    record(tmp_path, "dualpipe", 4, 8, late)
    measured = timeline.read(tmp_path)
    root = ElementTree.fromstring(compare.svg(measured, 'a <b> & "c"'))
    assert root.attrib["aria-label"].startswith('a <b> & "c", step 7: 4 ranks')
    hints = [title.text or "" for title in root.iter(f"{SVG}title")]
    total = sum(len(row) for row in measured.program.program)
    halves = sum(len(passes(ins)) for row in measured.program.program for ins in row)
    assert sum("micro-batch" in hint for hint in hints) == 2 * halves
    assert sum(hint.startswith("stands still for experts") for hint in hints) == (total if late else 0)
    for box in root.iter(f"{SVG}rect"):
        assert float(box.get("x", 0)) + float(box.attrib["width"]) <= int(root.attrib["width"]) + 1e-6
        assert float(box.get("y", 0)) + float(box.attrib["height"]) <= int(root.attrib["height"])


def test_schedule_compare_prints_and_writes_the_comparison(tmp_path, capsys):
    record(tmp_path, "1f1b", 2, 4)
    printed = weft(capsys, "schedule", "--compare", str(tmp_path), "--svg", str(tmp_path / "step.svg"))
    assert printed.startswith(f"{tmp_path}, step 7: 2 ranks, 2 stages, 4 micro-batches\n")
    assert ElementTree.parse(tmp_path / "step.svg").getroot().tag.endswith("svg")
    assert weft(capsys, "schedule", "--compare", str(tmp_path), "--json", "-").startswith("{")


def test_traces_that_do_not_belong_together_are_refused(tmp_path, capsys):
    def refused() -> str:
        assert cli.main(["schedule", "--compare", str(tmp_path)]) == 2
        return capsys.readouterr().err

    record(tmp_path, "1f1b", 2, 4)
    file = tmp_path / "traces/rank-00001.json"
    good = file.read_text()
    file.unlink()
    assert "rank-00001.json is missing; expected a file of each rank" in refused()
    file.write_text("[]")
    assert "expected a trace as weft train trace=on writes it (version 1)" in refused()
    file.write_text(json.dumps(json.loads(good) | {"otherData": {"weft": 2, "rank": 1}}))
    assert "expected a trace as weft train trace=on writes it (version 1)" in refused()
    file.write_text(good.replace("F(1, 0)", "F(0, 0)"))
    assert "rank-00001.json is of another layout or step than rank 0's" in refused()
    file.write_text(good)
    assert weft(capsys, "schedule", "--compare", str(tmp_path), "--svg", "-").startswith("<svg")
