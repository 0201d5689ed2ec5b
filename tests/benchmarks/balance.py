"""What balances experts, and what it costs: `python -m tests.benchmarks.balance --out FILE`, then `--table FILE`.

Recipe `tiny` with 32 experts and without MTP, in one process of one thread, trains in BF16 on the same batches without
balancing, with the sequence-wise auxiliary loss at two weights, and with the bias at the report's speed. MaxVio is
(busiest expert's load - mean) / mean, of each batch or of the last 100 steps' batches together (global), mean over
layers. Source of the claim: arXiv 2408.15664, Table 2 (auxiliary-loss-free balancing), and report section 4.5.2.

A run is named `kind:seed`; FILE has one line of JSON for each that has ended. Runs in FILE are not repeated, and
several processes may share the work: `--only none:0 bias-1e-3:0`, and the others elsewhere.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from launch.charts import chart, page
from tests.benchmarks.fp8_against_bf16 import append, read, rows
from tests.benchmarks.one_process import (
    WITHOUT_MTP,
    Batches,
    OneProcess,
    recipe_of,
    start_world_of_one,
    stretched,
)
from train import data
from train.data.sampler import row_ids
from train.load import LoadWatch
from train.recipe import LogConfig, Recipe

MODEL = ("model.n_routed_experts=32", WITHOUT_MTP, "precision=bf16", "parallel.microbatch_size=8")
KINDS = {
    "none": ("train.bias_speed=[[0,0]]", "train.balance_alpha=0"),
    "aux-1e-3": ("train.bias_speed=[[0,0]]", "train.balance_alpha=1e-3"),
    "aux-1e-2": ("train.bias_speed=[[0,0]]", "train.balance_alpha=1e-2"),
    "bias-1e-3": ("train.bias_speed=[[0,1e-3]]", "train.balance_alpha=0"),
}
NAMES = {
    "none": "no balancing",
    "aux-1e-3": "auxiliary loss, 1e-3",
    "aux-1e-2": "auxiliary loss, 1e-2",
    "bias-1e-3": "bias, speed 1e-3",
}
PAINT = {"none": "#868e96", "aux-1e-3": "#ffa94d", "aux-1e-2": "#d9480f", "bias-1e-3": "#1862ab"}
LAST = 100  # steps whose loads count
FIGURES = {"max_violation_global_mean": "global", "max_violation_mean": "batch"}
Runs = dict[tuple[str, int], dict[str, Any]]


def recipe_for(kind: str, seed: int, steps: int) -> Recipe:
    """The recipe of a run."""
    return stretched(recipe_of(*MODEL, *KINDS[kind], f"train.seed={seed}"), steps)


def train(kind: str, seed: int, steps: int, batches: Batches, heldout: Tensor) -> dict[str, Any]:
    """One run: loss and violations step by step, and the held-out loss at its end."""
    run, watch = OneProcess(recipe_for(kind, seed, steps)), LoadWatch(LogConfig(load_window=LAST))
    found: dict[str, list[float]] = {"loss": [], "global": [], "batch": []}
    for step in range(steps):
        batch = batches(step, seed)
        totals = run.gradients(step, batch)
        run.update(step, batch, totals)
        figures, _ = watch.step(totals.loads)
        for key, name in FIGURES.items():
            found[name].append(figures[key])
        found["loss"].append(totals.losses["loss"])
        if (step + 1) % 10 == 0:
            state = f"loss {found['loss'][-1]:.4f}  MaxVio {found['batch'][-1]:.2f}  global {found['global'][-1]:.2f}"
            print(f"{kind}:{seed}  step {step + 1}/{steps}  {state}", flush=True)
    return {"kind": kind, "seed": seed, "steps": steps, **found, "heldout": held_out_loss(run, heldout)}


def held_out_loss(run: OneProcess, heldout: Tensor) -> float:
    """Mean cross-entropy of the rows, in nats."""
    wanted = run.engine.sequences(len(heldout))
    totals = run.engine.evaluate({mb: heldout[list(ids)] for mb, ids in wanted.items()}, len(heldout))
    return totals.losses["loss"] / heldout[:, 1:].numel()


def held_out_rows(recipe: Recipe, count: int) -> Tensor:
    """Held-out rows from many documents, the same for every run."""
    prepared = data.prepare(
        recipe.data,
        vocab_size=recipe.model.vocab_size,
        sequence_length=recipe.train.sequence_length,
        seed=recipe.train.seed,
    )
    return prepared.heldout[row_ids(0, count, len(prepared.heldout), seed=0)]


# ---------------------------------------------------------------- table and picture
def table(runs: Runs) -> str:
    """Each way of balancing, mean over its seeds."""
    body = []
    for kind in KINDS:
        found = [run for (name, _), run in runs.items() if name == kind]
        if found:
            last = [[fmean(run["batch"][-LAST:]), run["global"][-1], run["heldout"]] for run in found]
            means = [fmean(values) for values in zip(*last, strict=True)]
            losses = ", ".join(f"{run['heldout']:.4f}" for run in found)
            figures = [f"{means[0]:.3f}", f"{means[1]:.3f}", f"{means[2]:.4f}"]
            body.append([NAMES[kind], str(found[0]["steps"]), *figures, losses])
    head = ["balanced by", "steps", f"MaxVio of a batch, last {LAST} steps", f"MaxVio global, last {LAST} steps"]
    return rows([*head, "held-out loss", "of each seed"], body)


def picture(runs: Runs) -> str:
    """The course of both violations, mean over seeds."""
    body = []
    titles = {"global": f"MaxVio of {LAST} batches", "batch": "MaxVio of each batch"}
    for number, (figure, title) in enumerate(titles.items()):
        courses = []
        for kind, name in NAMES.items():
            found = [run[figure] for (each, _), run in runs.items() if each == kind]
            points = [(step + 1, fmean(values)) for step, values in enumerate(zip(*found, strict=True))]
            courses.append((name, PAINT[kind], 1.8, points))
        body += chart(title, courses, 108 + 248 * number, 180)
    note = "recipe tiny with 32 experts, 4 a token from 2 of 4 groups; (busiest expert's load - mean) / mean"
    return page("What balances experts", f"{note}, mean over layers", 580, body)


def main() -> None:
    parser = argparse.ArgumentParser(description="four ways to balance 32 experts, or not to")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="train what this file lacks, and add it there")
    action.add_argument("--table", type=Path, help="print the table of this file")
    parser.add_argument("--svg", type=Path, help="with --table: also draw the picture there")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=256, help="held-out rows")
    parser.add_argument("--only", nargs="+", metavar="KIND:SEED", help=f"some runs; kinds: {', '.join(KINDS)}")
    options = parser.parse_args()
    if options.table:
        runs = read(options.table)
        print(table(runs))
        if options.svg:
            options.svg.write_text(picture(runs))
        return
    torch.set_num_threads(1)
    start_world_of_one()
    recipe = recipe_of(*MODEL)
    batches, heldout = Batches(recipe), held_out_rows(recipe, options.rows)
    for name in options.only or [f"{kind}:{seed}" for seed in range(options.seeds) for kind in KINDS]:
        kind, seed = name.split(":")
        if (kind, int(seed)) not in read(options.out):
            append(options.out, train(kind, int(seed), options.steps, batches, heldout))


if __name__ == "__main__":
    main()
