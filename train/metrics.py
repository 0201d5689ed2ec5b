"""What is measured, and where it goes: `metrics.jsonl`, the console, and Weights & Biases if the recipe asks for it.

Rank 0 holds one `Metrics` and hands it a record a step. A key that was not measured is absent, never faked; a number
that is not finite is `null` in JSON. A resumed run drops the records of steps after its checkpoint, which it will
repeat, and continues the W&B run whose id the checkpoint kept. docs/reference/metrics.md lists the keys.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from train.recipe import Recipe


class Metrics:
    """All sinks of a run. `resumed` is what its checkpoint says (`step`, `tokens`, `wandb_id`); None: a fresh start."""

    def __init__(self, recipe: Recipe, directory: Path, resumed: Mapping[str, Any] | None = None) -> None:
        begin = resumed or {"step": 0, "tokens": 0}
        directory.mkdir(parents=True, exist_ok=True)
        self.steps = JsonLines(directory / "metrics.jsonl", begin["step"])
        self.evaluations = JsonLines(directory / "evaluations.jsonl", begin["step"])
        self.loads = JsonLines(directory / "load.jsonl", begin["step"])
        self.rollbacks = JsonLines(directory / "rollbacks.jsonl", begin["step"])
        self.corruptions = JsonLines(directory / "corruptions.jsonl", begin["step"])
        self.console = Console(recipe, begin["step"], begin["tokens"])
        if recipe.train.force_balanced:
            self.console.say(
                "train.force_balanced=true: tokens go round all experts instead of choosing; "
                "this run measures speed, its model and its losses mean nothing"
            )
        self.wandb = None if recipe.wandb.mode == "disabled" else Wandb(recipe, directory, begin.get("wandb_id"))

    @property
    def wandb_id(self) -> str | None:
        """Id of the W&B run, for the checkpoint; None without one."""
        return self.wandb.id if self.wandb else None

    def step(self, record: Mapping[str, Any], biases: Mapping[int, Sequence[float]] | None = None) -> None:
        """Report one step. `biases` are those of the router of each layer, by its number."""
        whole = {**record, "router_bias": {str(layer): bias for layer, bias in biases.items()}} if biases else record
        self.steps.write(whole)
        self.console.step(record)
        if self.wandb:
            self.wandb.log(whole)

    def rollback(self, step: int, tokens: int, record: Mapping[str, Any]) -> None:
        """Report that the run has gone back to `step`: later records go, and what was left out is written down."""
        for lines in (self.steps, self.evaluations, self.loads):
            lines.rewind(step)
        self.rollbacks.write({"step": step, "tokens": tokens, **record})
        self.console.rewind(step, tokens)
        begin, end = record["window"]
        self.warn(
            record["spike"][1], f"back to step {step}; {end - begin:,} tokens of data from {begin:,} on are left out"
        )

    def corruption(self, step: int, wrong: Sequence[Mapping[str, Any]]) -> None:
        """Report copies of parameters that were found wrong, and mended, after `step`."""
        self.corruptions.write({"step": step, "wrong": list(wrong)})

    def warn(self, step: int, text: str) -> None:
        """Tell the user what no number in a line says."""
        self.console.say(f"step {step}: warning: {text}")

    def load(self, step: int, tokens: int, record: Mapping[str, Any]) -> None:
        """Report what each expert got in the steps up to this one (`LoadWatch.take`)."""
        self.loads.write({"step": step, "tokens": tokens, **record})

    def evaluation(self, step: int, tokens: int, loss: float, unigram: float) -> None:
        """Report the held-out loss beside that of a model which knows only how frequent each token is, both in nats."""
        record = {"step": step, "tokens": tokens, "heldout_loss": loss, "unigram_loss": unigram}
        self.evaluations.write(record)
        side = f"{abs(unigram - loss):.4f} {'below' if loss < unigram else 'above'}"
        self.console.say(f"step {step}: held-out loss {loss:.4f} nat, {side} a unigram model's {unigram:.4f}")
        if self.wandb:
            self.wandb.log(record)

    def close(self) -> None:
        """Flush and close everything."""
        for lines in (self.steps, self.evaluations, self.loads, self.rollbacks, self.corruptions):
            lines.close()
        self.console.close()
        if self.wandb:
            self.wandb.close()


class JsonLines:
    """One JSON object a line. What a former start wrote up to step `keep` stays; the rest, and a torn line, goes.

    There is no file before there is a line.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.file: TextIO | None = None
        self.rewind(keep)

    def rewind(self, keep: int) -> None:
        """Drop what was written of steps after `keep`."""
        self.close()
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if keep and is_before(line, keep)]
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_text("".join(f"{line}\n" for line in kept))
        os.replace(rewritten, self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        if self.file is None:
            self.file = self.path.open("a", buffering=1)  # a line is on its way as soon as it is whole
        try:
            self.file.write(json.dumps(finite(record)) + "\n")
        except (
            OSError
        ) as error:  # a full disk, perhaps for as long as a checkpoint is tried: the line waits in the buffer
            print(f"weft: {self.path}: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.file = None


def is_before(line: str, step: int) -> bool:
    """Whether `line` is a whole record of a step up to `step`."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: None, inside dictionaries and lists too, for a number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """A line every `log.every` steps; on a terminal, under them, a bar with the time that is left."""

    FORMATS = (
        ("loss", "loss {:.4f}"),
        ("mtp_loss", "mtp {:.4f}"),
        ("grad_norm", "grad {:<7.4g}"),
        ("lr", "lr {:.2e}"),
        ("max_violation", "violation {:.2f}"),
        ("force_balanced", "force-balanced"),
        ("step_seconds", "{:.2f} s"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    )

    def __init__(self, recipe: Recipe, step: int, tokens: int, stream: TextIO | None = None) -> None:
        self.train, self.every, self.stream = recipe.train, recipe.log.every, stream or sys.stdout
        self.clock = time.monotonic()
        self.first = self.last = self.fraction(step, tokens)
        self.step_done = step
        self.bar = tqdm(
            total=self.train.steps,
            initial=step,
            file=self.stream,
            disable=not self.stream.isatty(),
            dynamic_ncols=True,
            leave=False,
            bar_format="{bar} {desc}",
        )

    def rewind(self, step: int, tokens: int) -> None:
        """The run goes on from an earlier step."""
        self.bar.n = self.step_done = step
        self.last = self.fraction(step, tokens)

    def fraction(self, step: int, tokens: int) -> float:
        """How much of the run is done: of its steps or its tokens, whichever ends it first."""
        return max(step / (self.train.steps or math.inf), tokens / (self.train.tokens or math.inf))

    def left(self) -> str:
        """Time to the end at the pace of this start, as h:mm:ss."""
        done = self.last - self.first
        seconds = (time.monotonic() - self.clock) * (1 - self.last) / done if done > 0 else 0
        return str(timedelta(seconds=round(max(0.0, seconds))))

    def step(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        self.last = self.fraction(step, record["tokens"])
        self.bar.set_description_str(f"{100 * self.last:.0f} %, {self.left()} left", refresh=False)
        self.bar.update(step - self.step_done)
        if step % self.every == 0 or self.step_done == 0 or self.last >= 1:
            steps = self.train.steps
            words = [f"step {step:>{len(str(steps))}}/{steps}" if steps else f"step {step:>7}"]
            words += [form.format(record[key]) for key, form in self.FORMATS if record.get(key) is not None]
            words += [] if self.stream.isatty() else [f"{self.left()} left"]
            self.say("  ".join(words))
        self.step_done = step

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.bar.write(text, file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        self.bar.close()


class Wandb:
    """A Weights & Biases run. One that cannot start says so and leaves the training alone."""

    def __init__(self, recipe: Recipe, directory: Path, id: str | None) -> None:
        import wandb  # here: it takes a second, and most runs do without

        config = recipe.wandb
        self.id = id
        self.run: Any = None
        try:
            self.run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=recipe.run.name,
                id=id,
                resume="allow",
                mode="offline" if config.mode == "offline" else "online",
                dir=directory,
                settings=wandb.Settings(console="off", quiet=True),
                config=asdict(recipe),
            )
            self.run.define_metric("*", step_metric="step")  # W&B's own count cannot go back when a run resumes
            self.id = self.run.id
        except Exception as error:
            print(f"W&B stays off: {error}", file=sys.stderr, flush=True)

    def log(self, record: Mapping[str, Any]) -> None:
        if self.run:
            self.run.log(dict(record))

    def close(self) -> None:
        if self.run:
            self.run.finish()
