"""`weft simulate` as a user types it: what it writes, and one clear line for what cannot be priced."""

import json

import pytest

from launch import cli
from launch.simulate.cluster import sheet

SHEET = (sheet.files("recipes") / "cluster" / "h800x2048.yaml").read_text()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *words: str) -> str:
    """The one line that a command ends with."""
    code = cli.main(["simulate", *words])
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "") and printed.err.count("\n") == 1
    return printed.err


def test_it_writes_the_figures_the_page_and_the_traces(capsys, tmp_path):
    words = ["--json", "step.json", "--html", "step.html", "--trace", "step"]
    assert cli.main(["simulate", "recipe=tiny", "cluster=h800x2048", *words]) == 0
    assert "GPU-hours" in capsys.readouterr().out
    seconds = json.loads((tmp_path / "step.json").read_text())["step_seconds"]
    assert f"{seconds:.3f} s" in (tmp_path / "step.html").read_text()
    assert {"rank-00000.json", "rank-00002.json", "all.json"} == {p.name for p in (tmp_path / "step/traces").iterdir()}


def test_an_unknown_cluster_is_refused_with_the_names_there_are(capsys):
    line = refused(capsys, "cluster=h800x248")
    assert line.startswith("weft: cluster=h800x248: expected one of ") and "did you mean 'h800x2048'?" in line


def test_a_layout_larger_than_the_cluster_is_refused_with_its_arithmetic(capsys):
    line = refused(capsys, "recipe=v3", "cluster=h800x2048", "parallel.data=256", "train.batch.multiple_of=512")
    assert "cluster=h800x2048: it has 2048 GPUs" in line and "= 4096" in line


@pytest.mark.parametrize("figure", ["products", "attention", "memory", "exchange"])
def test_a_sheet_without_a_curve_is_refused_by_its_name(figure, capsys, tmp_path):
    found = sheet.yaml.safe_load(SHEET)
    del found[figure]
    found["provenance"] = {}
    (tmp_path / "mine.yaml").write_text(json.dumps(found))
    assert f"cluster=mine.yaml: {figure} is missing; expected a" in refused(capsys, "cluster=mine.yaml")
