"""The checkpoints of a run, written behind the training and read back into any layout.

    save    copy the state into buffers that are allocated once (`settle` waits for that, before the optimizer steps);
            a thread of each rank writes its files, rank 0 their manifest, one rename commits
    find    the step to resume, every file of it verified by the ranks together
    load    fill this layout's tensors from it

The threads agree over a gloo group of their own, so no collective of the training waits for a disk. What one rank
cannot write, none keeps: the draft goes, the save is tried again a few times and then given up, loudly, and training
goes on.
"""

import math
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist

from parallel.errors import UserError
from train.behind import Behind, on_host
from train.checkpoint import directory as names
from train.checkpoint import disk, shards
from train.checkpoint.manifest import Damaged, Manifest
from train.checkpoint.shards import Part, parts_of

TRIES = 3
PAUSE_SECONDS = 1.0  # before trying again: another process may be about to free the disk
PATIENCE = timedelta(hours=2)  # of ranks whose disk is faster than another's
GIVEN_UP = "it was given up"


class Discarded(Exception):
    """Nobody wants the save in flight any more."""


class Saved:
    """A committed checkpoint, verified: `step`, and `meta` as it was saved."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.step, self.meta = manifest.step, manifest.meta

    def has(self, key: str) -> bool:
        """Whether it holds any tensor of a part of the state."""
        return any(name.startswith(f"{key}.") for name in self.manifest.tensors)


class Checkpoints:
    """The directory of one run, as all its ranks see it. Every method is called by all of them, in the same order.

    At most one save is in flight. `take` tells what it has cost and what went wrong.
    """

    def __init__(
        self, directory: Path, behind: Behind, *, keep_last: int, keep_every: int = 0, background: bool = True
    ) -> None:
        self.directory, self.behind, self.background = directory, behind, background
        self.keep_last, self.keep_every = keep_last, keep_every
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.rank, self.threads = dist.get_rank(), max(1, torch.get_num_threads())
        self.buffers: list[Part] | None = None  # what this rank writes, on the host
        self.copying: Future[None] | None = None
        self.writing: Thread | None = None
        self.unwanted = Event()
        self.damaged: set[int] = set()  # steps whose checkpoints this start has found not to be whole
        self.failed = ""  # why the last save came to nothing
        self.failures, self.seconds, self.stall = 0, 0.0, 0.0
        self.warnings: list[str] = []

    # -- before training
    def prepare(self) -> None:
        """Clear away what killed runs left, and raise UserError unless every rank can write here."""
        problem = ""
        token = self.directory / ".writable"
        try:
            if self.rank == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                names.tidy(self.directory)
                token.touch()
        except OSError as error:
            problem = f"run.dir: expected a folder to write checkpoints into; {error}"
        self._agree(problem)
        shared = token.exists()
        self._agree(
            "" if shared else f"run.dir: {self.directory} is not one folder on all nodes; expected a shared one"
        )
        if self.rank == 0:
            token.unlink()

    def find(self, resume: str | int) -> Saved | None:
        """The checkpoint that `checkpoint.resume` (`auto`, `never` or a step) asks for; None to start anew.

        `auto` takes the newest one that is whole, and says which it had to leave out. Raises UserError, on all ranks,
        if there are some and none is whole, or for a step that is not there (naming those that are) or not whole.
        """
        self.wait()
        steps = names.committed(self.directory) if resume != "never" else []
        [steps] = self._first([steps])
        if resume == "never" or (resume == "auto" and not steps):
            return None
        if resume != "auto":
            if not str(resume).isdecimal() or int(resume) not in steps:
                there_are = f"{self.directory} has " + (", ".join(map(str, steps)) or "no checkpoint")
                raise UserError(
                    f"checkpoint.resume={resume}: expected auto, never or the step of a checkpoint; {there_are}"
                )
            steps = [int(resume)]
        problems: list[str] = []
        for step in reversed(steps):
            saved, found = self._verified(step)
            if saved:
                if problems:
                    self.say(f"checkpoint.resume=auto: going on from step {step}, for the newer ones are damaged")
                return saved
            problems += found
            self.say(f"the checkpoint of step {step} cannot be used: {'; '.join(found)}")
        raise UserError(
            f"checkpoint.resume={resume}: {'; '.join(problems)}; expected a checkpoint that is whole "
            f"({'checkpoint.resume=never starts anew' if resume == 'auto' else 'checkpoint.resume=auto takes one'})"
        )

    def _verified(self, step: int) -> tuple[Saved | None, list[str]]:
        """A checkpoint if it is as it was written, or what is wrong; each rank looks at a share of its files."""
        folder = names.path_of(self.directory, step)
        found: list[str] = []
        saved = None
        try:
            manifest = Manifest.of(folder, step)
            mine = list(manifest.files)[self.rank :: dist.get_world_size()]
            saved, found = Saved(folder, manifest), shards.verify(folder, manifest, mine, self.threads)
        except Damaged as damaged:
            found = [str(damaged)]
        if problems := self._all(found):
            self.damaged.add(step)
            return None, problems
        return saved, []

    def before(self, step: int) -> Saved | None:
        """The newest whole checkpoint of an earlier step than this, or None."""
        self.wait()
        [steps] = self._first([names.committed(self.directory)])
        for earlier in reversed([each for each in steps if each < step]):
            if saved := self._verified(earlier)[0]:
                return saved
        return None

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: they belong to a history that is not going to be."""
        self.wait()
        if self.rank == 0:
            for later in [each for each in names.committed(self.directory) if each > step]:
                disk.remove(names.path_of(self.directory, later))
        dist.barrier(group=self.group)

    def load(self, saved: Saved, state: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
        """Fill `state`'s tensors, whatever layout they belong to.

        ignored: parts of the state that the checkpoint may have and this run does without. Raises UserError, on all
        ranks, if a name is missing on either side, or has another shape or dtype in the checkpoint.
        """
        self.wait()
        parts = list(parts_of(state))
        problems = self._all(shards.misfits(saved.manifest, parts))
        taken = set(self._all([part.name for part in parts]))
        taken |= {name for name in saved.manifest.tensors if name.partition(".")[0] in ignored}
        problems += [f"{name}: this run has no such tensor" for name in saved.manifest.tensors if name not in taken]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise UserError(f"{saved.folder} cannot be loaded into this run: {'; '.join(problems[:5])}{more}")
        damaged: list[str] = []
        try:
            shards.read(saved.folder, saved.manifest, parts, self.threads)
        except Damaged as error:
            damaged = [str(error)]
        if damaged := self._all(damaged):
            raise UserError("; ".join(damaged))

    # -- saving
    def reserve(self, state: dict[str, Any]) -> None:
        """Take the memory that saves behind the training need, unless that has been done: better now than in one."""
        if self.background and self.buffers is None:
            mine = self._mine(list(parts_of(state)))
            self.buffers = [replace(part, local=on_host(part.local)) for part in mine]

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Begin to save a step: nested dictionaries of tensors and flat shards, and anything JSON (from rank 0).

        What several ranks hold under one name is equal, and the first of them writes it. The state must not change
        before `settle`; names and sizes are those of the first save.
        """
        began, before = time.perf_counter(), self.stall
        self.wait()
        self.reserve(state)
        mine = self._mine(list(parts_of(state)))
        self.unwanted.clear()
        if self.background:
            self.copying = self.behind.start(lambda: self._copy(mine))
            self.writing = Thread(target=self._write, args=(step, meta, self.buffers or [], self.copying), daemon=True)
            self.writing.start()
        else:
            self._write(step, meta, [replace(part, local=part.local.cpu()) for part in mine])
        self.stall = before + time.perf_counter() - began

    def settle(self) -> None:
        """Wait until the state may change."""
        if self.copying:
            began = time.perf_counter()
            self.copying.result()
            self.copying = None
            self.stall += time.perf_counter() - began

    def wait(self) -> None:
        """Wait until no save is in flight."""
        self.settle()
        if self.writing:
            self.writing.join()
            self.writing = None

    def discard(self) -> None:
        """Give up the save in flight, unless it is committed by then. One rank that does so speaks for all."""
        self.unwanted.set()
        self.wait()

    def finish(self) -> None:
        """Wait for the last save of a run. Raises UserError if it came to nothing."""
        self.wait()
        if self.failed:
            raise UserError(f"{self.directory}: the last checkpoint could not be written: {self.failed}")

    def take(self) -> tuple[dict[str, float], list[str]]:
        """(figures, warnings) since the last call, for the metrics; what did not happen is absent."""
        figures: dict[str, float] = {}
        if self.stall:
            figures["checkpoint_stall_seconds"] = self.stall
        if self.seconds:
            figures["checkpoint_seconds"] = self.seconds
        if self.failures:
            figures["checkpoint_failures"] = self.failures
        warnings, self.warnings, self.seconds, self.stall = self.warnings, [], 0.0, 0.0
        return figures, warnings

    # -- inside: in the calling thread
    def _mine(self, parts: list[Part]) -> list[Part]:
        """Of these parts, what this rank writes: a whole tensor is written by the first rank that holds it."""
        if self.buffers is not None:
            chosen = {part.name for part in self.buffers}
        else:
            whole = {part.name for part in parts if part.local.numel() == math.prod(part.shape)}
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, whole, group=self.group)
            earlier = set().union(*everyone[: self.rank])
            chosen = {part.name for part in parts if part.name not in earlier}
        return [part for part in parts if part.name in chosen]

    def _copy(self, parts: list[Part]) -> None:
        """Copy the state into the buffers."""
        assert self.buffers is not None
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer.local.copy_(part.local, non_blocking=True)

    # -- inside: in the writing thread
    def _write(self, step: int, meta: dict[str, Any], parts: list[Part], copying: Future[None] | None = None) -> None:
        """Write and commit; all ranks come to the same verdict."""
        began = time.perf_counter()
        if copying:
            copying.result()
        for attempt in range(1, TRIES + 1):
            try:
                self.failed = self._attempt(step, meta, parts)
            except RuntimeError as error:  # a rank is gone, as the training is about to find out
                self.failed = str(error)
                return
            if not self.failed:
                self.seconds = time.perf_counter() - began
                return
            if self.failed == GIVEN_UP:
                self.warnings.append(f"checkpoint of step {step}: {GIVEN_UP}")
                return
            self.failures += 1
            self.warnings.append(f"checkpoint of step {step}, try {attempt} of {TRIES}: {self.failed}")
            if attempt < TRIES:
                time.sleep(PAUSE_SECONDS)

    def _attempt(self, step: int, meta: dict[str, Any], parts: list[Part]) -> str:
        """Why this attempt came to nothing, or an empty string; the same on all ranks."""
        draft = names.draft_of(self.directory, step)
        problem, written = "", None
        if self.rank == 0:
            try:
                names.tidy(self.directory)
                draft.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        [problem] = self._first([problem])
        if not problem:
            try:
                written = shards.write(draft, self.rank, parts, self.threads, self._wanted)
            except (OSError, Discarded) as error:
                problem = GIVEN_UP if isinstance(error, Discarded) else f"rank {self.rank}: {error}"
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.gather_object((problem, written), everyone if self.rank == 0 else None, dst=0, group=self.group)
            if self.rank == 0:
                problems = [problem for problem, _ in everyone if problem]
                problem = GIVEN_UP if GIVEN_UP in problems else "; ".join(problems)
                if not problem:
                    problem = self._commit(step, meta, [each for _, each in everyone])
            [problem] = self._first([problem])
        if self.rank == 0 and problem:
            self._clear(draft)
        return problem

    def _wanted(self) -> None:
        if self.unwanted.is_set():
            raise Discarded

    def _commit(self, step: int, meta: dict[str, Any], written: list[Any]) -> str:
        """Rank 0: turn the draft into the checkpoint; why not, if so."""
        try:
            shards.manifest_of(step, meta, written).write(names.draft_of(self.directory, step))
            names.commit(self.directory, step)
            self.damaged.discard(step)  # this one is whole
        except (OSError, ValueError) as error:
            return str(error)
        try:
            names.prune(self.directory, step, self.keep_last, self.keep_every, self.damaged)
        except OSError as error:
            self.warnings.append(f"step {step} is saved, but an old checkpoint could not be removed: {error}")
        return ""

    def _clear(self, draft: Path) -> None:
        try:
            if draft.exists():
                disk.remove(draft)
        except OSError as error:
            self.warnings.append(f"{draft} could not be removed: {error}")

    # -- inside: what ranks tell each other
    def _first(self, values: list[Any]) -> list[Any]:
        """Rank 0's values."""
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values

    def _all(self, mine: list[str]) -> list[str]:
        """Everybody's texts, each once, in the order of ranks."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=self.group)
        return list(dict.fromkeys(each for texts in everyone for each in texts))

    def _agree(self, problem: str) -> None:
        """Raise UserError on all ranks if any has a problem."""
        if problems := self._all([problem] if problem else []):
            raise UserError(problems[0])

    def say(self, message: str) -> None:
        """Tell the user, once."""
        if self.rank == 0:
            print(f"weft: {message}", file=sys.stderr, flush=True)
