"""Curves of a cluster sheet from measurements: `python -m launch.simulate.cluster.fit recipes/cluster/h800.csv`.

Every row is one measured kernel or exchange with its source. A curve is fitted to its rows by least squares of the
relative error, and nothing else enters: no whole step, no factor. Prints what the sheet then holds, and how far each
row is from its curve.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launch.simulate.cluster.sheet import Link, Waves

TILE = (128, 128)
# Operations of the measured attention: 128 heads, 4,096 tokens; causal pairs x 2 x widths of the products.
PAIRS = 128 * 4096 * 4097 // 2
ATTENTION = {"causal_attention_forward": 2 * PAIRS * (192 + 128), "causal_attention_backward": 2 * PAIRS * 832}


@dataclass(frozen=True)
class Fit:
    """A curve and, for each of its rows, (source, curve / measured - 1)."""

    curve: Any
    residuals: list[tuple[str, float]]


def seconds_of(row: dict[str, str]) -> float:
    """The measured time of a row."""
    value = float(row["value"])
    if row["unit"] == "TFLOPS":
        return 2 * int(row["m"]) * int(row["n"]) * int(row["k"]) / (value * 1e12)
    return value / 1e3


def fit(path: Path) -> dict[str, Fit]:
    """All curves that the rows of a file determine, by the first word(s) of `what`."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    return {kind: _fit(kind, [row for row in rows if row["what"] == kind]) for kind in kinds}


def _fit(kind: str, rows: Sequence[dict[str, str]]) -> Fit:
    times = np.array([seconds_of(row) for row in rows])
    if kind in ATTENTION:
        rate = float(np.mean([ATTENTION[kind] / time / int(row["sms"]) for row, time in zip(rows, times, strict=True)]))
        return Fit(rate, [(row["source"], 0.0) for row in rows])
    if kind.endswith("product"):
        waves = [_waves(row) for row in rows]
        columns = np.array([[count, count * int(row["k"]), 1] for count, row in zip(waves, rows, strict=True)])
    else:
        columns = np.array([[1, int(row["bytes"])] for row in rows])
    found = np.linalg.lstsq(columns / times[:, None], np.ones(len(rows)), rcond=None)[0]
    if not kind.endswith("product") and found[0] < 0:  # a latency below nothing: the rate alone
        found = np.array([0.0, float(np.mean(times / columns[:, 1]))])
    residuals = columns @ found / times - 1
    numbers = [float(number) for number in found]
    curve: Any = Waves(numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else Link(1 / numbers[1], numbers[0])
    return Fit(curve, [(row["source"], float(error)) for row, error in zip(rows, residuals, strict=True)])


def _waves(row: dict[str, str]) -> int:
    return ceil(ceil(int(row["m"]) / TILE[0]) * ceil(int(row["n"]) / TILE[1]) / int(row["sms"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="curves of a cluster sheet from measured rows")
    parser.add_argument("rows", type=Path)
    for kind, found in fit(parser.parse_args().rows).items():
        plain = found.curve if isinstance(found.curve, float) else asdict(found.curve)
        print(yaml.safe_dump({kind: plain}, default_flow_style=None).strip())
        for source, error in found.residuals:
            print(f"  # {error:+.1%}  {source}")


if __name__ == "__main__":
    main()
