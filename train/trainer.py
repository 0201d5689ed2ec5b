"""The loop. `Trainer.fit` is a training run; each phase of a step is one named call.

Time is counted in tokens: learning rate, batch size, bias speed, MTP weight and the rows of a batch are functions of
the tokens consumed, so resuming needs no replay. The distributed model is `train.engine`; this file adds data, time,
evaluation, checkpoints and metrics. What may go wrong has files of its own in `train/safety`; `recovery` is what a step
asks there.
"""

import math
import os
import resource
import time
import uuid
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.errors import UserError
from parallel.experts.build import check_device
from parallel.mesh import communicator_options
from parallel.recorder import Recorder
from parallel.trace import OFF
from train import data
from train.behind import Behind
from train.checkpoint import Checkpoints, Saved
from train.checkpoint.resuming import changes, identity
from train.data.sampler import row_ids
from train.ema import EMA
from train.engine import Engine, Totals
from train.load import LoadWatch
from train.metrics import Metrics
from train.optim import batch_size, learning_rate, piecewise
from train.precision import fp8_backend
from train.recipe import Recipe
from train.safety import watchdog
from train.safety.lock import claim
from train.safety.preemption import Preemption, unmark
from train.safety.recovery import Recovery
from train.safety.replicas import Replicas
from train.safety.spikes import Spikes


class Trainer:
    """One rank of a run. `step` and `tokens` say how far the run has come; `skipped` counts the steps left out."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.directory = Path(recipe.run.dir) / str(recipe.run.name)
        self.data = open_data(recipe)
        self.trace = self.recorder() if recipe.trace else OFF
        self.engine = Engine(recipe, device, self.trace)
        behind = Behind(device)
        self.ema = EMA(self.engine.optimizer, recipe.optim.ema_decay, behind) if recipe.optim.ema_decay else None
        keep = {"keep_last": recipe.checkpoint.keep_last, "keep_every": recipe.checkpoint.keep_every}
        background = recipe.checkpoint.background
        self.checkpoints = Checkpoints(self.directory / "checkpoints", behind, background=background, **keep)
        if recipe.checkpoint.every:
            self.checkpoints.prepare()
        self.run_id = uuid.uuid4().hex  # of the first start; a resumed run keeps it
        self.step = self.tokens = self.skipped = 0
        self.preemption, self.spikes = Preemption(), Spikes(recipe.train.spike)
        self.replicas, self.recovery = Replicas(self.engine), Recovery(self)
        resumed = self.resume()
        if recipe.checkpoint.every:
            self.checkpoints.reserve(self.state(ema=True))
        self.metrics = Metrics(recipe, self.directory, resumed) if dist.get_rank() == 0 else None
        self.load = LoadWatch(recipe.log)

    def fit(self) -> bool:
        """Train until `train.steps` or `train.tokens` is reached; False if the run was preempted before."""
        while not self.done():
            began = time.perf_counter()
            batch = batch_size(self.recipe.train.batch, self.tokens)
            rows = self.load_batch(batch)
            loaded = time.perf_counter()
            self.trace.begin(self.step + 1, self.engine.program(batch))
            self.engine.numerics.health.begin(self.looks_at_fp8(self.step + 1))
            self.engine.optimizer.watch(self.recovery.looks_for_culprits())
            totals = self.engine.forward_backward(
                rows, batch, self.now("mtp_weight"), asked=bool(self.preemption.asked)
            )
            ended = self.tokens + batch * self.recipe.train.sequence_length
            lr = learning_rate(self.recipe.optim.lr, ended)
            loss = self.means(totals, batch)["loss"]
            differ = self.recovery.compares_replicas() and self.replicas.differ()
            self.settle()
            applied, norm = self.engine.update(
                lr, self.now("bias_speed"), totals, partial(self.spikes.applies, loss), spoilt=differ
            )
            if self.recovery.mended(norm):
                continue  # the same batch again, with copies that are right
            if self.ema and applied:
                self.ema.update()
            self.advance(ended, applied)
            self.recovery.count(norm)
            spike = self.spikes.take(loss, norm)
            self.report(totals, batch, lr, norm, began, loaded, spike)
            if self.spikes.persists:
                self.recovery.roll_back()
                continue
            if self.due(self.recipe.train.eval_every) and not self.done():
                self.evaluate()
            if self.due(self.recipe.checkpoint.every):
                self.save()
            if totals.asked and not self.done():
                self.recovery.preempt()
                return False
        if self.recipe.checkpoint.every and not self.due(self.recipe.checkpoint.every):
            self.save()
        self.evaluate()
        self.checkpoints.finish()
        if self.metrics:
            self.metrics.close()
        return True

    # -- time
    def done(self) -> bool:
        """Whether the run has reached its end, in steps or tokens."""
        train = self.recipe.train
        return self.step >= (train.steps or math.inf) or self.tokens >= (train.tokens or math.inf)

    def due(self, every: int) -> bool:
        """Whether something done `every` so many steps (0: never) is due after this one."""
        return every > 0 and self.step % every == 0

    def now(self, key: str) -> float:
        """The value of a schedule of `train` at the tokens consumed."""
        return piecewise(getattr(self.recipe.train, key), self.tokens)

    def advance(self, tokens: int, applied: bool) -> None:
        """Count the step."""
        self.step, self.tokens = self.step + 1, tokens
        self.skipped += not applied

    # -- data
    def load_batch(self, batch: int) -> dict[int, Tensor]:
        """The rows of this rank's micro-batches, by number; the batch is a function of the tokens consumed."""
        first = self.spikes.position(self.tokens) // self.recipe.train.sequence_length
        ids = row_ids(first, batch, len(self.data.train), self.recipe.train.seed)
        return self.fetch(self.data.train, ids, batch)

    def fetch(self, rows: data.Rows, ids: list[int], batch: int) -> dict[int, Tensor]:
        """Of a global batch of row numbers, what this rank's pipeline feeds and scores."""
        if not self.engine.needs_tokens:
            return {}
        wanted = self.engine.sequences(batch)
        return {mb: rows[[ids[i] for i in sequences]].to(self.device) for mb, sequences in wanted.items()}

    # -- what is seen
    def looks_at_fp8(self, step: int) -> bool:
        """Whether this step's record tells what FP8 does to each layer."""
        every = self.recipe.log.health_every
        return self.recipe.precision == "fp8" and every > 0 and step % every == 0

    def evaluate(self) -> None:
        """Mean cross-entropy on `train.eval_rows` held-out rows, forward only, beside a unigram model's on them."""
        asked = self.recipe.train.eval_rows
        if not asked:
            return
        if asked > len(self.data.heldout):
            raise UserError(
                f"train.eval_rows={asked}: expected at most {len(self.data.heldout)}, the held-out rows there are"
            )
        ids = row_ids(0, asked, len(self.data.heldout), seed=0)  # always the same ones, from many documents
        totals = self.engine.evaluate(self.fetch(self.data.heldout, ids, asked), asked)
        if self.metrics:
            unigram = self.data.unigram(self.data.heldout[ids])
            self.metrics.evaluation(self.step, self.tokens, self.means(totals, asked)["loss"], unigram)

    def means(self, totals: Totals, batch: int) -> dict[str, float]:
        """Losses as reported: cross-entropies per predicted token, balance loss per sequence (before alpha)."""
        tokens = batch * self.recipe.train.sequence_length
        depths = self.recipe.model.num_nextn_predict_layers
        losses = {"loss": totals.losses["loss"] / tokens}
        if depths:
            losses["mtp_loss"] = totals.losses["mtp_loss"] / (depths * tokens)
        if totals.loads:
            losses["balance_loss"] = totals.losses["balance_loss"] / batch
        return losses

    def report(
        self, totals: Totals, batch: int, lr: float, norm: float, began: float, loaded: float, spike: bool
    ) -> None:
        """One record of the step that has just ended."""
        seconds = time.perf_counter() - began
        measured = self.trace.end()
        biases = self.biases() if self.due(self.recipe.log.bias_every) else None
        health = self.engine.fp8_health() if self.looks_at_fp8(self.step) else {}
        if not self.metrics:
            return
        batch_tokens = batch * self.recipe.train.sequence_length
        record: dict[str, Any] = {"step": self.step, "tokens": self.tokens, **self.means(totals, batch)}
        record |= {"grad_norm": norm, "lr": lr, "batch_tokens": batch_tokens, "step_seconds": seconds}
        record |= {"tokens_per_second": batch_tokens / seconds, "memory_gb": peak_memory(self.device)}
        record |= {"dropped_steps": self.skipped, "data_seconds": loaded - began, **measured}
        if self.recipe.parallel.expert > 1:
            sent = {"inside": totals.inside, "across": totals.across}
            record |= {f"expert_gb_{where}": sum(kind.values()) / 1e9 for where, kind in sent.items()}
            record |= {f"expert_bytes_{where}": kind for where, kind in sent.items()}
        if health:
            record["fp8_health"] = health
        if spike:
            record["spike"] = True
        if self.spikes.windows:
            record["rollbacks"] = len(self.spikes.windows)
        if self.recovery.corrupted:
            record["corrupted"] = self.recovery.corrupted
        if self.recipe.train.force_balanced:
            record["force_balanced"] = True
        figures, warnings = self.load.step(totals.loads)
        saving, troubles = self.checkpoints.take()
        warnings += troubles
        self.metrics.step(record | figures | saving, biases)
        for warning in warnings:
            self.metrics.warn(self.step, warning)
        every = self.recipe.log.load_every
        if totals.loads and every and (self.due(every) or self.done()):
            self.metrics.load(self.step, self.tokens, self.load.take(totals.loads))

    def recorder(self) -> Recorder:
        """The trace of a run with `trace=on`."""
        layout, log = self.recipe.parallel, self.recipe.log
        directory = self.directory / "traces"
        return Recorder(self.device, layout.data * layout.context, directory, log.trace_skip, log.trace_steps)

    def biases(self) -> dict[int, list[float]]:
        """The biases of all routers by layer, wherever they live; called by every rank."""
        held = {number: router.e_score_correction_bias.tolist() for number, router in self.engine.routers().items()}
        everyone: list[dict[int, list[float]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, held)
        return {number: bias for each in everyone for number, bias in sorted(each.items())}

    # -- checkpoints
    def settle(self) -> None:
        """Wait until nobody reads the state any more behind the training: the optimizer is about to move it."""
        self.checkpoints.settle()
        if self.ema:
            self.ema.settle()

    def state(self, ema: bool) -> dict[str, Any]:
        """Everything that a checkpoint holds as tensors, by name; loading writes into these very tensors."""
        biases = {
            f"model.layers.{number}.mlp.gate.e_score_correction_bias": router.e_score_correction_bias
            for number, router in self.engine.routers().items()
        }
        average = {"ema": self.ema.by_name()} if self.ema and ema else {}
        return {**self.engine.optimizer.state_dict(), "router_bias": biases, **average}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that takes it up."""
        return identity(self.recipe, self.data.fingerprint)

    def save(self) -> None:
        """Begin to save this step."""
        meta = {**self.identity(), "tokens": self.tokens, "skipped": self.skipped, "run_id": self.run_id}
        meta["spikes"] = self.spikes.state()
        meta["wandb_id"] = self.metrics.wandb_id if self.metrics else None
        self.checkpoints.save(self.step, self.state(ema=True), meta)

    def resume(self) -> dict[str, Any] | None:
        """Take up the checkpoint that `checkpoint.resume` names; returns its description, or None for a fresh start."""
        config = self.recipe.checkpoint
        saved = self.checkpoints.find(config.resume)
        if saved is None:
            return None
        for change in changes(saved, self.identity(), config.allow):
            self.checkpoints.say(change)
        self.take_up(saved)
        return {**saved.meta, "step": saved.step}

    def take_up(self, saved: Saved) -> None:
        """Be where a checkpoint was saved, whatever has happened since."""
        self.settle()
        state = self.state(ema=saved.has("ema"))
        self.checkpoints.load(saved, state, ignored=() if self.ema else ("ema",))
        self.engine.optimizer.load_state_dict(state)
        self.engine.numerics.bump()
        if self.ema and not saved.has("ema"):
            self.ema.restart()
        self.step, self.tokens, self.skipped = saved.step, saved.meta["tokens"], saved.meta["skipped"]
        self.run_id = saved.meta["run_id"]
        self.spikes.load(saved.meta["spikes"])


def peak_memory(device: torch.device) -> float:
    """Most memory that this rank has held, in GB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def open_data(recipe: Recipe) -> data.Prepared:
    """The prepared rows; the first rank of each node prepares them if they are not there yet."""
    vocabulary, length, seed = recipe.model.vocab_size, recipe.train.sequence_length, recipe.train.seed
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        data.prepare(recipe.data, vocab_size=vocabulary, sequence_length=length, seed=seed)
    dist.barrier()
    return data.load(recipe.data, vocab_size=vocabulary, sequence_length=length, seed=seed)


def start_process_group(recipe: Recipe) -> torch.device:
    """Join the world that the launcher describes in the environment (alone: a world of one); returns the device."""
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    fp8_backend(recipe, device)  # a wrong choice is told before any rank waits for another
    check_device(recipe.parallel.dispatch, device)
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=recipe.parallel.timeout_seconds)
    options = communicator_options(backend, recipe.parallel.comm_sms, timeout)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, pg_options=options)
    else:
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=timeout, pg_options=options, **alone)
    return device


def main(recipe: Recipe) -> bool:
    """Train as this process's rank, to the end of the recipe; False if the run was preempted before."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    directory = Path(recipe.run.dir) / str(recipe.run.name)
    lock = claim(directory) if os.environ.get("RANK", "0") == "0" else None
    if lock:
        unmark(directory)
    device = start_process_group(recipe)
    dog = watchdog.start(recipe.parallel.timeout_seconds)
    if recipe.parallel.node_size is None:
        recipe.parallel.node_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    trainer = Trainer(recipe, device)
    with trainer.preemption.listening():
        finished = trainer.fit()
        if dog:
            dog.close()
        dist.destroy_process_group()
        if lock:
            lock.release()
    return finished
