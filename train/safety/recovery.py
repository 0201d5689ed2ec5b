"""What follows when a step has gone wrong, or the run is asked to stop.

    no finite gradient     the step is left out; `train.max_skips` of them in a row end the run, with a dump
    copies that differ     cast again from their masters, and the same batch is trained once more
    spikes that persist    back to the checkpoint before them; the data since then is never seen again
    asked to stop          a checkpoint of this step, a marker, and no further step

`engine`, `replicas`, `spikes` and `preemption` judge what has happened; all ranks know the same and do the same.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from train.load import LoadWatch
from train.safety.preemption import mark

if TYPE_CHECKING:
    from train.trainer import Trainer


class Recovery:
    """Of a run, on each of its ranks. Every method is called by all of them, in the same order."""

    def __init__(self, run: "Trainer") -> None:
        self.run = run
        self.skipped_in_a_row = 0  # steps without a finite gradient
        self.corrupted = self.mended_in_a_row = 0  # wrong copies that this start has found; steps made again for them

    # -- gradients that are not finite
    def looks_for_culprits(self) -> bool:
        """Whether to look where a gradient is not finite: once steps have been left out for it."""
        return self.skipped_in_a_row > 0 or self.run.recipe.train.max_skips == 1

    def count(self, norm: float) -> None:
        """A step has ended; give up after `train.max_skips` in a row without a finite gradient."""
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.run.recipe.train.max_skips:
            self.give_up()

    def give_up(self) -> NoReturn:
        """Leave behind what tells why no gradient is finite, one file a rank, and end the run."""
        run, mine = self.run, self.run.engine.optimizer.not_finite
        everyone: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        folder = run.directory / "dump" / f"step-{run.step:08d}"
        dump(folder, {"step": run.step, "tokens": run.tokens, "skipped": run.skipped, "not_finite": mine})
        where = [f"rank {rank}: {name}" for rank, found in enumerate(everyone) for name in found]
        told = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        raise RuntimeError(
            f"step {run.step}: {self.skipped_in_a_row} steps in a row had a gradient that is not finite"
            f"{f', before any sum in {told}' if where else ''}; {folder} tells more"
        )

    # -- copies that differ
    def compares_replicas(self) -> bool:
        """Whether copies that must be equal are compared in the step that is being made."""
        every = self.run.recipe.train.replica_check_every
        return every > 0 and (self.run.step + 1) % every == 0

    def mended(self, norm: float) -> bool:
        """Whether the step was left out for wrong copies, which are right again now: it can be made again."""
        if math.isfinite(norm) or not self.compares_replicas():
            return False
        run, wrong = self.run, self.run.replicas.mend()
        self.mended_in_a_row = self.mended_in_a_row + 1 if wrong else 0
        if wrong:
            told = "; ".join(map(str, wrong[:5])) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            message = f"step {run.step + 1}: copies that are not what their masters say: {told}"
            if self.mended_in_a_row >= run.recipe.train.max_skips:
                raise RuntimeError(f"{message}; and so {self.mended_in_a_row} times in a row")
            self.corrupted += len(wrong)
            if run.metrics:
                run.metrics.corruption(run.step, [asdict(each) for each in wrong])
                run.metrics.warn(run.step + 1, f"silent corruption: {told}; mended, the step is made again")
        return bool(wrong)

    # -- spikes that persist
    def roll_back(self) -> None:
        """Go back to the newest checkpoint from before the spike; the data since then is left out from now on."""
        run, spikes, most = self.run, self.run.spikes, self.run.recipe.train.spike.max_rollbacks
        first, last = run.step - spikes.in_a_row + 1, run.step
        what = f"step {last}: {spikes.in_a_row} spikes in a row, the first in step {first}"
        windows, end = spikes.windows, spikes.position(run.tokens)
        if len(windows) >= most:
            raise RuntimeError(f"{what}, after {len(windows)} rollbacks (train.spike.max_rollbacks)")
        saved = run.checkpoints.before(first)
        if saved is None:
            raise RuntimeError(f"{what}, and no checkpoint from before to go back to")
        run.take_up(saved)
        spikes.windows = windows
        begin = spikes.position(run.tokens)
        spikes.leave_out(begin, end)
        run.checkpoints.forget_after(run.step)
        run.load = LoadWatch(run.recipe.log)
        if run.metrics:
            run.metrics.rollback(run.step, run.tokens, {"spike": [first, last], "window": [begin, end]})

    # -- asked to stop
    def preempt(self) -> None:
        """Commit a checkpoint of this step, unless the recipe wants none, and say that the run stopped here."""
        run, every = self.run, self.run.recipe.checkpoint.every
        if every and not run.due(every):
            run.save()
        run.checkpoints.finish()
        if run.metrics:
            run.metrics.warn(run.step, "asked to stop; the next start goes on from here" if every else "asked to stop")
            run.metrics.close()
            asked = run.preemption.asked or "a signal to another rank"
            mark(run.directory, run.step if every else 0, run.tokens if every else 0, asked)


def dump(folder: Path, found: dict[str, Any]) -> None:
    """Write what this rank has to say after a failure that all have in common."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank()
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps({"rank": rank, **found}, indent=1) + "\n")
