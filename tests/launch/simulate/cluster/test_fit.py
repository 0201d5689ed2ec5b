"""The sheet of the H800 is what its measured rows say, and its wave model holds them."""

from importlib.resources import files
from pathlib import Path

import pytest

from kernels.ops import Product
from launch.simulate.cluster.fit import fit
from launch.simulate.cluster.sheet import read, sheet_names

ROWS = Path(str(files("recipes") / "cluster" / "h800.csv"))


@pytest.fixture(scope="module")
def fits():
    return fit(ROWS)


def test_the_sheet_holds_the_fitted_curves(fits):
    sheet = read("h800x2048")
    for name in ("begin", "each", "launch"):
        assert getattr(sheet.products["fp8"], name) == pytest.approx(getattr(fits["fp8 product"].curve, name), rel=1e-3)
    for name, rate in sheet.attention.items():
        assert rate == pytest.approx(fits[name].curve, rel=1e-3)
    for name in ("exchange", "exchange_alone"):
        link, fitted = getattr(sheet, name), fits[name.replace("_", " ")].curve
        assert link.bytes_per_second == pytest.approx(fitted.bytes_per_second, rel=1e-3)
        assert link.latency == pytest.approx(fitted.latency, rel=1e-3, abs=1e-9)


def test_three_constants_hold_ten_published_products(fits):
    assert len(fits["fp8 product"].residuals) == 10
    assert all(abs(error) < 0.021 for _, error in fits["fp8 product"].residuals)


def test_products_that_run_beside_exchanges_are_predicted_without_having_been_fitted():
    """Those of profile-data's trace, on 112 SMs: seconds, m, n, k."""
    curve = read("h800x2048").products["fp8"]
    measured = [
        (1.863e-3, 32768, 4096, 7168),
        (1.035e-3, 32768, 7168, 2048),
        (0.896e-3, 4096, 7168, 16384),
        (0.372e-3, 4096, 24576, 1536),
        (0.245e-3, 4096, 32768, 512),
    ]
    for seconds, *shape in measured:
        assert curve.seconds(Product(*shape), 112) == pytest.approx(seconds, rel=0.12)


@pytest.mark.parametrize("name", sheet_names())
def test_every_figure_says_where_it_is_from(name):
    sheet = read(name)
    given = {"name", "gpus", "node_size", "sms", "provenance"}
    given |= {"operators", "cores", "optimizer"}  # only a sheet that `weft calibrate` has written has these
    figures = {field for field in sheet.__dataclass_fields__ if field not in given}
    assert figures <= {key.split(".")[0] for key in sheet.provenance}
    assert all(text.split(":")[0] in ("given", "measured", "fitted", "estimated") for text in sheet.provenance.values())
