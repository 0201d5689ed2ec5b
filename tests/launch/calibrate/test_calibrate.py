"""Curves go through what was measured, what is measured is what runs, and a machine not yet measured says so."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from kernels.ops import Cost, Product
from launch import cli
from launch.calibrate import document, fitting, operators
from launch.calibrate.pace import Pace
from launch.simulate.cluster import sheet
from launch.simulate.cluster.sheet import Cores, Line, Link
from parallel.errors import UserError

TRUE = Line(2e-6, 3e-6, 1e-11, 2e-10)


def costs() -> list[Cost]:
    sizes = [(64, 128, 256, 1), (256, 512, 128, 4), (1024, 256, 640, 1), (128, 128, 128, 8), (2048, 512, 512, 2)]
    return [Cost.of("bf16", (Product(m, n, k, groups),), m * n + k * (m + n)) for m, n, k, groups in sizes]


def test_a_fit_finds_the_curve_that_its_rows_lie_on() -> None:
    found = fitting.line([(cost, TRUE.seconds(cost)) for cost in costs()])
    assert found.worst < 1e-6
    assert found.rows == 5
    new = Cost.of("bf16", (Product(512, 512, 384),), 3 << 18)
    assert isinstance(found.curve, Line)
    assert found.curve.seconds(new) == pytest.approx(TRUE.seconds(new), rel=1e-4)


def test_no_coefficient_is_below_zero_and_the_residual_is_told() -> None:
    rows = [(Cost(0, size), 1e-3 / size) for size in (10, 100, 1000)]  # takes less the more there is
    found = fitting.line(rows)
    assert isinstance(found.curve, Line)
    assert min(found.curve.call, found.curve.turn, found.curve.operation, found.curve.byte) >= 0
    assert found.worst > 0.5


def test_every_operator_of_a_model_is_measured_under_the_name_by_which_it_is_priced() -> None:
    found = operators.Measured()
    device = torch.device("cpu")
    operators.measure_model(found, "fp8", (128, 128, 8, 256), Pace(device), device, repeats=2)
    assert {"fp8_linear.fp8", "fp8_grouped_wgrad.fp8", "causal_attention_forward", "fp8_quantize"} <= found.rows.keys()
    assert all(seconds > 0 for rows in found.rows.values() for _, seconds in rows)
    ((operators_run, in_fp8, _),) = found.gaps
    assert operators_run > in_fp8 > 0


def test_python_between_operators_is_told_apart_from_that_of_fp8() -> None:
    each, more = 3e-5, 1e-4
    passes = [(300, 0), (450, 100), (900, 250)]
    found = fitting.python([(count, in_fp8, count * each + in_fp8 * more) for count, in_fp8 in passes])
    assert found == pytest.approx((each, more))
    assert fitting.python([(300, 0, 0.0)]) == (0.0, 0.0)
    cores = Cores(2, 1.0, each, Link(1e9, 0.0), between_fp8=more)
    assert cores.python("mm.bf16") == pytest.approx(each)
    assert cores.python("fp8_linear.fp8") == pytest.approx(each + more)


def test_the_yardstick_is_told_in_what_it_usually_takes() -> None:
    pace = Pace(torch.device("cpu"), usual=1e3)
    assert 0 < pace.slower() < 1e-3
    assert len(pace.readings) == 1
    assert pace.usual == 1e3


def test_a_machine_that_was_not_measured_is_told_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cluster=local: .*run weft calibrate"):
        sheet.read("local")


def test_what_is_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    way = {"bytes_per_second": 1e9, "latency": 1e-4}
    curves = {"operators.mm.bf16": fitting.line([(cost, TRUE.seconds(cost)) for cost in costs()])}
    written = document.shape(torch.device("cpu")) | {
        "peak": {"bf16": 1e12},
        "products": {},
        "attention": {},
        "memory": 1e9,
        "launch": 1e-6,
        **dict.fromkeys(("inside", "across", "exchange", "exchange_alone"), way),
        "comm_sms": 0,
        "read": 0.0,
        "operators": {"mm.bf16": {"call": 1.0, "turn": 2.0, "operation": 0.0, "byte": 0.0}},
        "cores": {"count": 2, "together": 1.1, "between": 1e-6, "message": way},
        "provenance": {"operators.mm.bf16": document.words(curves["operators.mm.bf16"])},
    }
    sheet.local_path().parent.mkdir(parents=True)
    sheet.local_path().write_text(document.text(written))
    found = sheet.read("local")
    assert found.cores is not None and found.cores.count == 2
    assert found.seconds(Cost.of("bf16", (Product(1, 1, 256),), 1), "mm") == pytest.approx(5 + 1e-6)
    assert "residual" in yaml.safe_load(sheet.local_path().read_text())["provenance"]["operators.mm.bf16"]
    for paces, message in (
        ([1.0, 1.5], None),
        ([1.0], "2 numbers above 0"),
        (1.5, "a list"),
        (["fast", 1], "2 numbers"),
    ):
        written["cores"]["paces"] = paces
        sheet.local_path().write_text(document.text(written))
        if message is None:
            cores = sheet.read("local").cores
            assert cores is not None and cores.paces == (1.0, 1.5)
        else:
            with pytest.raises(UserError, match=f"cluster=local: cores: paces: .*expected {message}"):
                sheet.read("local")


@pytest.mark.slow
def test_a_quick_calibration_makes_a_sheet_that_prices_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    assert cli.main(["calibrate", "--quick"]) == 0
    assert "fp8_gather_dequantize" in capsys.readouterr().out  # which runs only where experts are spread over ranks
    assert cli.main(["simulate", "cluster=local", "parallel.expert=2", "parallel.data=2", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.01 < found["step_seconds"] < 100
    assert found["uncovered_shapes"] == []
