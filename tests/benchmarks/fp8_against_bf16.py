"""Does FP8 train like BF16? `python -m tests.benchmarks.fp8_against_bf16 --out FILE`, then `--table FILE`.

Recipe `tiny` in one process of one thread trains on the same batches in FP8, in BF16, and in BF16 with another
micro-batch split: numbers that differ only in the order of sums, which is the noise floor at this scale. At a few steps
of each BF16 run, FP8 also computes the loss and the gradients from the run's own weights and batch: what quantisation
does to one step, before chaos has its say. Source of the claim: report section 3.3 and appendix B.1.

A run is named `kind:seed`; FILE has one line of JSON for each that has ended. Runs in FILE are not repeated, one that
was stopped goes on from its last hundredth step, and several processes may share the work: `--only fp8:0 bf16:0`, and
the others elsewhere.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from launch.charts import chart, page
from tests.benchmarks.one_process import Batches, OneProcess, recipe_of, start_world_of_one, stretched
from train.recipe import Recipe

KINDS = {
    "bf16": ("precision=bf16", "parallel.microbatch_size=8"),
    "fp8": ("precision=fp8", "parallel.microbatch_size=8"),
    "resplit": ("precision=bf16", "parallel.microbatch_size=4"),
}
LAST = 100  # steps whose mean loss is compared
Runs = dict[tuple[str, int], dict[str, Any]]


def recipe_for(kind: str, seed: int, steps: int) -> Recipe:
    """The recipe of a run."""
    return stretched(recipe_of(*KINDS[kind], f"train.seed={seed}"), steps)


def train(kind: str, seed: int, steps: int, batches: Batches, unfinished: Path) -> dict[str, Any]:
    """One run: its loss step by step; of BF16 also what FP8 makes of its first, an inner and its last step.

    unfinished: the file that keeps its state while it runs.
    """
    run = OneProcess(recipe_for(kind, seed, steps))
    probed = {1, min(LAST, steps), steps} if kind == "bf16" else set()
    twin = OneProcess(recipe_for("fp8", seed, steps)) if probed else None
    losses, probes = [], {}
    if unfinished.exists():
        kept = torch.load(unfinished)
        losses, probes = kept["losses"], kept["probes"]
        run.restore(kept["state"])
    for step in range(len(losses), steps):
        rows = batches(step, seed)
        totals = run.gradients(step, rows)
        if twin and step + 1 in probed:
            probes[step + 1] = probe(run, twin, step, rows, totals.losses["loss"])
        run.update(step, rows, totals)
        losses.append(totals.losses["loss"])
        if (step + 1) % 10 == 0:
            print(f"{kind}:{seed}  step {step + 1}/{steps}  loss {losses[-1]:.4f}", flush=True)
        if (step + 1) % LAST == 0:
            torch.save({"losses": losses, "probes": probes, "state": run.state()}, unfinished)
    unfinished.unlink(missing_ok=True)
    return {"kind": kind, "seed": seed, "steps": steps, "losses": losses, "probes": probes}


def probe(run: OneProcess, twin: OneProcess, step: int, rows: Tensor, loss: float) -> dict[str, Any]:
    """Loss and gradients that FP8 makes from the weights and the batch of a BF16 step, beside BF16's own."""
    twin.stage.load_state_dict(run.stage.state_dict())
    twin.engine.numerics.bump()
    theirs = twin.gradients(step, rows).losses["loss"]
    one, other = (dict(layer_gradients(process)) for process in (run, twin))
    twin.engine.optimizer.zero_grad()
    lengths = {name: float(other[name].norm() / one[name].norm()) for name in one}
    cosines = {name: float(torch.cosine_similarity(one[name], other[name], dim=0)) for name in one}
    return {"bf16": loss, "fp8": theirs, "cosines": cosines, "lengths": lengths}


def layer_gradients(process: OneProcess) -> Iterator[tuple[str, Tensor]]:
    """(layer, all its gradients in a row, FP64); embedding, last norm and head are layers of their own."""
    layers: dict[str, list[Tensor]] = defaultdict(list)
    parameter: Any  # with its `main_grad`
    for name, parameter in process.stage.named_parameters():
        words = name.removeprefix("model.").split(".")
        layers[f"layer {words[1]}" if words[0] == "layers" else words[0]].append(parameter.main_grad.flatten().double())
    return ((layer, torch.cat(parts)) for layer, parts in layers.items())


# ---------------------------------------------------------------- the file that processes share
def read(path: Path) -> Runs:
    """The runs that have ended, by kind and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(run["kind"], run["seed"]): run for run in map(json.loads, lines)}


def append(path: Path, run: dict[str, Any]) -> None:
    """Add one line, whole, however many processes write."""
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")


# ---------------------------------------------------------------- tables
def table(runs: Runs) -> str:
    """Everything that is claimed, in Markdown."""
    seeds = complete(runs)
    if not seeds:
        return f"No seed has all of {', '.join(KINDS)} yet."
    steps = runs["bf16", seeds[0]]["steps"]
    return "\n\n".join(
        [
            f"Mean loss of the last {min(LAST, steps)} of {steps} steps, and its relative difference from BF16's:",
            last_losses(runs, seeds),
            f"The same difference in every {LAST} steps, mean over seeds (drift would grow):",
            drift(runs, seeds, steps),
            "One step from the weights and on the batch of the BF16 run:",
            same_weights(runs, seeds),
        ]
    )


def complete(runs: Runs) -> list[int]:
    """The seeds of which every run has ended."""
    return sorted(seed for kind, seed in runs if kind == "bf16" and all((other, seed) in runs for other in KINDS))


def rows(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def difference(runs: Runs, kind: str, seed: int, part: slice) -> float:
    """Relative difference of the mean loss of some steps from BF16's."""
    one, other = (fmean(runs[name, seed]["losses"][part]) for name in (kind, "bf16"))
    return one / other - 1


def last_losses(runs: Runs, seeds: list[int]) -> str:
    """FP8 beside the noise floor, seed by seed."""
    last = slice(-LAST, None)
    means = [fmean(runs["bf16", seed]["losses"][last]) for seed in seeds]
    found = {kind: [difference(runs, kind, seed, last) for seed in seeds] for kind in ("fp8", "resplit")}
    body = [
        [str(seed), f"{means[i]:.4f}", f"{found['fp8'][i]:+.2%}", f"{found['resplit'][i]:+.2%}"]
        for i, seed in enumerate(seeds)
    ]
    average = [fmean(values) for values in (means, found["fp8"], found["resplit"])]
    body.append(["mean", f"{average[0]:.4f}", f"{average[1]:+.2%}", f"{average[2]:+.2%}"])
    sizes = [fmean(map(abs, found[kind])) for kind in ("fp8", "resplit")]
    body.append(["mean size", "", *(f"{size:.2%}" for size in sizes)])
    return rows(["seed", "BF16", "FP8", "BF16, other micro-batch split (noise floor)"], body)


def drift(runs: Runs, seeds: list[int], steps: int) -> str:
    """Relative differences over the length of the runs."""
    body = []
    for start in range(0, steps, LAST):
        part = slice(start, start + LAST)
        means = [fmean(difference(runs, kind, seed, part) for seed in seeds) for kind in ("fp8", "resplit")]
        body.append([f"{start + 1} to {min(start + LAST, steps)}", *(f"{mean:+.2%}" for mean in means)])
    return rows(["steps", "FP8", "BF16, other micro-batch split"], body)


def same_weights(runs: Runs, seeds: list[int]) -> str:
    """What FP8 does to one step: to the loss, and to the gradients that turn most and shrink most."""
    body = []
    for seed in seeds:
        for step, found in runs["bf16", seed]["probes"].items():
            cells = [f"{found['bf16']:.5f}", f"{found['fp8']:.5f}", f"{found['fp8'] / found['bf16'] - 1:+.3%}"]
            for measure in ("cosines", "lengths"):
                value, layer = min((value, layer) for layer, value in found[measure].items())
                cells.append(f"{value:.4f} ({layer})")
            body.append([str(seed), str(step), *cells])
    head = ["seed", "step", "loss in BF16", "in FP8", "difference"]
    return rows([*head, "lowest cosine of a layer's gradients", "lowest ratio of their lengths"], body)


# ---------------------------------------------------------------- picture
PAINT = {"bf16": "#868e96", "resplit": "#ffa94d", "fp8": "#1862ab"}
NAMES = {"bf16": "BF16", "resplit": "BF16, other micro-batch split", "fp8": "FP8"}
SMOOTH = 50  # steps that a point of a curve is the mean of


def picture(runs: Runs) -> str:
    """Losses, and how far they are from BF16's, mean over the seeds."""
    seeds = complete(runs)
    smooth = {kind: smoothed([runs[kind, seed]["losses"] for seed in seeds]) for kind in KINDS}
    apart = {
        kind: [100 * (one / other - 1) for one, other in zip(smooth[kind], smooth["bf16"], strict=True)]
        for kind in ("resplit", "fp8")
    }
    body = []
    for number, (title, found) in enumerate({"Loss, nats": smooth, "Difference from BF16, %": apart}.items()):
        curves = [
            (NAMES[kind], paint, 1.8, list(enumerate(found[kind], SMOOTH)))
            for kind, paint in PAINT.items()
            if kind in found
        ]
        body += chart(title, curves, 108 + 248 * number, 180)
    note = f"recipe tiny in one process, mean of {len(seeds)} seeds; a point is the mean of the {SMOOTH} steps up to it"
    return page("FP8 beside BF16", note, 580, body)


def smoothed(courses: list[list[float]]) -> list[float]:
    """The mean over seeds, and over the `SMOOTH` steps up to each."""
    means = [fmean(losses) for losses in zip(*courses, strict=True)]
    return [fmean(means[end - SMOOTH : end]) for end in range(SMOOTH, len(means) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="FP8 and BF16 training of recipe tiny, beside the noise floor")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="train what this file lacks, and add it there")
    action.add_argument("--table", type=Path, help="print the tables of this file")
    parser.add_argument("--svg", type=Path, help="with --table: also draw the curves there")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
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
    batches = Batches(recipe_of())
    for name in options.only or [f"{kind}:{seed}" for seed in range(options.seeds) for kind in KINDS]:
        kind, seed = name.split(":")
        if (kind, int(seed)) not in read(options.out):
            unfinished = options.out.with_suffix(f".{kind}-{seed}.pt")
            append(options.out, train(kind, int(seed), options.steps, batches, unfinished))


if __name__ == "__main__":
    main()
