"""Simulated steps against measured ones on this machine: `python -m tests.benchmarks.against_reality`.

`weft calibrate` has measured operators and messages here, and no step. This trains two small models for a few steps in
several layouts and schedules, each rank with one thread, simulates the same recipes with `cluster=local`, and compares
the median measured step with the simulated one, and the orders of both. The machine must have nothing else to do: the
spread of the measured steps is shown because it says whether that was so.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
from itertools import combinations
from pathlib import Path

from launch.cli import main as weft

MODELS = {
    "tiny": ("recipe=tiny",),
    "wider": ("recipe=tiny", "precision=bf16", "model.hidden_size=512", "model.num_attention_heads=8"),
}
LAYOUTS = {
    "1 process": (1, 1, "1f1b"),
    "dualpipe, 2": (2, 1, "dualpipe"),
    "dualpipe, 2 x experts 2": (2, 2, "dualpipe"),
    "zbv, 2": (2, 1, "zbv"),
    "1f1b, 4": (4, 1, "1f1b"),
    "experts 2": (1, 2, "1f1b"),
}
WARM_UP = 10  # steps in which oneDNN compiles kernels for the numbers of rows that experts get


def words(model: str, layout: str) -> list[str]:
    """The overrides of one line of the table."""
    pipeline, data, schedule = LAYOUTS[layout]
    ranks = f"parallel.pipeline={pipeline}", f"parallel.data={data}", f"parallel.expert={data}"
    return [*MODELS[model], *ranks, f"parallel.schedule={schedule}", "train.threads=1", "checkpoint.every=0"]


def measured(overrides: list[str], steps: int) -> list[float]:
    """Seconds of the steps of a real run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = [f"train.steps={WARM_UP + steps}", "train.eval_rows=0", f"run.dir={folder}", "run.name=real"]
        if weft(["train", *overrides, *run]):
            raise SystemExit(f"training failed: {' '.join(overrides)}")
        lines = (Path(folder) / "real" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["step_seconds"] for record in records if "step_seconds" in record][WARM_UP:]


def simulated(overrides: list[str], cluster: str) -> float:
    """Seconds of a step by the simulator."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        if weft(["simulate", *overrides, f"cluster={cluster}", "--json", "-"]):
            raise SystemExit(f"the simulation failed: {' '.join(overrides)}")
    return float(json.loads(output.getvalue())["step_seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default="local", help="sheet of this machine (local)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run (6)")
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--layouts", nargs="*", default=[*LAYOUTS], choices=[*LAYOUTS])
    flags = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'model':<8}{'layout':<26}{'simulated, s':>14}{'measured, s':>14}{'ratio':>8}   fastest and slowest step")
    for model in flags.models:
        pairs = []
        for layout in flags.layouts:
            guess = simulated(words(model, layout), flags.cluster)
            times = measured(words(model, layout), flags.steps)
            real = statistics.median(times)
            pairs.append((guess, real))
            spread = f"{min(times):.3f} to {max(times):.3f}"
            print(f"{model:<8}{layout:<26}{guess:>14.3f}{real:>14.3f}{guess / real:>8.2f}   {spread}", flush=True)
        right = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in combinations(pairs, 2))
        worst = max((abs(guess / real - 1) for guess, real in pairs), default=0.0)
        print(f"{model}: worst {worst:.0%}; {right} of {len(pairs) * (len(pairs) - 1) // 2} pairs in the right order")


if __name__ == "__main__":
    main()
