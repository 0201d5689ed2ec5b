"""`weft load`: the table says what the records say, and the picture has a cell for each of them."""

import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch import charts, cli, load

SVG = "{http://www.w3.org/2000/svg}"


def write_run(folder: Path, layers: int = 2, experts: int = 4, records: int = 30) -> Path:
    """A run of 10 steps a record: expert 0 has less and less to do, in the second layer nothing from the middle on."""
    run = folder / "run"
    run.mkdir()
    with (run / "load.jsonl").open("w") as file:
        for number in range(1, records + 1):
            even = [100] * (experts - 1)
            of = {str(layer): [max(1, 100 - number), *even] for layer in range(1, layers + 1)}
            of["2"] = [100 if number < records / 2 else 0, *even]
            file.write(json.dumps({"step": 10 * number, "tokens": 0, "steps": 10, "load": of}) + "\n")
        file.write('{"step": 9')  # a run that goes on
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 10 * records + 1):
            figures = {"max_violation": 1 / step, "max_violation_global_mean": 0.5 / step}
            if step % 10 == 0:
                figures["router_bias"] = {
                    str(layer): [expert * step / 1e4 - 0.01 for expert in range(experts)]
                    for layer in range(1, layers + 1)
                }
            file.write(json.dumps({"step": step, **figures}) + "\n")
    return run


def test_the_table_names_the_busiest_and_the_idlest_of_the_last_100_steps(tmp_path, capsys):
    run = write_run(tmp_path)
    assert cli.main(["load", str(run)]) == 0
    heading, _, _, first, second, _, picture = capsys.readouterr().out.splitlines()
    assert heading.endswith("steps 201 to 300")
    mean = (74.5 + 300) / 4  # 100 - 25.5 in the mean of records 21 to 30
    assert first.split() == ["1", f"{100 / mean:.2f}", "1", f"{74.5 / mean:.2f}", "0"]
    assert second.split() == ["2", f"{4 / 3:.2f}", "1", "0.00", "0"]
    assert picture == f"{run}/pictures/load.svg" and (run / "pictures/load.svg").exists()


def cells(picture: ElementTree.Element) -> Counter[str]:
    """How many cells of each colour the heat maps have."""
    found: Counter[str] = Counter()
    for path in picture.iter(f"{SVG}path"):
        if path.get("class") == "cells":
            found[path.get("fill", "")] += path.get("d", "").count("M")
    return found


@pytest.mark.parametrize(("layers", "experts", "records"), [(2, 4, 30), (59, 64, 7), (2, 3, 1000)])
def test_the_picture_has_a_cell_for_each_layer_expert_and_moment(tmp_path, layers, experts, records):
    picture = ElementTree.fromstring(
        load.svg(load.read(write_run(tmp_path, layers, experts, records)), "a <run> & more")
    )
    assert cells(picture).total() == layers * experts + experts * min(records, 160)
    lines = [line.get("points", "").split() for line in picture.iter(f"{SVG}polyline")]
    assert len(lines) == experts + 2 and all(5 < len(line) <= load.INNER // 2 for line in lines)
    for line, expert in zip(lines, range(experts), strict=False):
        heights = [float(point.split(",")[1]) for point in line]
        assert heights == sorted(heights, reverse=True), f"the bias of expert {expert} goes up"
    words = ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]
    assert "Layer 2, the most unbalanced, from the first step to the last" in words
    assert f"a <run> & more: load of {experts} experts in {layers} layers" in words


def test_an_expert_without_a_token_is_black(tmp_path):
    picture = ElementTree.fromstring(load.svg(load.read(write_run(tmp_path)), ""))
    assert cells(picture)[load.NOTHING] == 1 + 16  # its cell at the end, and those of records 15 to 30


def test_colours_run_from_blue_over_white_to_orange():
    values = (0, 1e-9, 0.25, 0.5, 1, 2, 4, 1e9)
    paints = [load.colour(value) for value in values]
    assert paints[0] == load.NOTHING and paints[1] == paints[2] == "#1862ab" and paints[-1] == paints[-2] == "#d9480f"
    assert len(set(paints)) == 6 and all(re.fullmatch("#[0-9a-f]{6}", paint) for paint in paints)


def test_a_figure_that_was_not_recorded_is_left_out(tmp_path):
    run = write_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    assert load.svg(load.read(run), "").count("not recorded") == 2


def test_routing_that_nobody_chose_is_marked(tmp_path, capsys):
    run = write_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 301, "force_balanced": True}) + "\n")
    assert load.FORCED in load.svg(load.read(run), "")
    cli.main(["load", str(run)])
    assert load.FORCED in capsys.readouterr().out


def test_the_picture_can_go_elsewhere(tmp_path):
    run = write_run(tmp_path)
    assert cli.main(["load", str(run), "--svg", str(tmp_path / "there.svg")]) == 0
    assert (tmp_path / "there.svg").read_text().startswith("<svg") and not (run / "pictures").exists()


def test_ticks_are_1_2_and_5_times_powers_of_ten():
    assert [charts.tick(least) for least in (0.03, 0.1, 0.11, 0.3, 1, 1.2, 30, 0)] == [0.05, 0.1, 0.2, 0.5, 1, 2, 50, 1]
