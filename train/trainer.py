"""The loop. `Trainer.fit` is a training run; each phase of a step is one named call.

Time is counted in tokens: learning rate, batch size, bias speed, MTP weight and the rows of a batch are functions of
the tokens consumed, so resuming needs no replay. The distributed model is `train.engine`; this file adds data, time,
evaluation, checkpoints and metrics.
"""

import math
import os
import resource
import time
from dataclasses import asdict
from datetime import timedelta
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
from train import checkpoint, data
from train.data.sampler import row_ids
from train.engine import Engine, Totals
from train.load import LoadWatch
from train.metrics import Metrics
from train.optim import batch_size, learning_rate, piecewise
from train.precision import fp8_backend
from train.recipe import Recipe


class Trainer:
    """One rank of a run. `step` and `tokens` say how far the run has come; `skipped` counts the steps left out."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.directory = Path(recipe.run.dir) / str(recipe.run.name)
        self.data = open_data(recipe)
        self.trace = self.recorder() if recipe.trace else OFF
        self.engine = Engine(recipe, device, self.trace)
        self.checkpoints = self.directory / "checkpoints"
        self.step = self.tokens = self.skipped = self.skipped_in_a_row = 0
        resumed = self.resume()
        self.metrics = Metrics(recipe, self.directory, resumed) if dist.get_rank() == 0 else None
        self.load = LoadWatch(recipe.log)

    def fit(self) -> None:
        """Train until `train.steps` or `train.tokens` is reached."""
        while not self.done():
            began = time.perf_counter()
            batch = batch_size(self.recipe.train.batch, self.tokens)
            rows = self.load_batch(batch)
            loaded = time.perf_counter()
            self.trace.begin(self.step + 1, self.engine.program(batch))
            self.engine.numerics.health.begin(self.looks_at_fp8(self.step + 1))
            totals = self.engine.forward_backward(rows, batch, self.now("mtp_weight"))
            ended = self.tokens + batch * self.recipe.train.sequence_length
            lr = learning_rate(self.recipe.optim.lr, ended)
            applied, norm = self.engine.update(lr, self.now("bias_speed"), totals)
            self.advance(ended, applied)
            self.report(totals, batch, lr, norm, began, loaded)
            if self.due(self.recipe.train.eval_every) and not self.done():
                self.evaluate()
            if self.due(self.recipe.checkpoint.every):
                self.save()
        if self.recipe.checkpoint.every and not self.due(self.recipe.checkpoint.every):
            self.save()
        self.evaluate()
        if self.metrics:
            self.metrics.close()

    def looks_at_fp8(self, step: int) -> bool:
        """Whether this step's record tells what FP8 does to each layer."""
        every = self.recipe.log.health_every
        return self.recipe.precision == "fp8" and every > 0 and step % every == 0

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
        """Count the step; give up after `train.max_skips` in a row without a finite gradient."""
        self.step, self.tokens = self.step + 1, tokens
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.recipe.train.max_skips:
            raise RuntimeError(
                f"step {self.step}: {self.skipped_in_a_row} steps in a row had a gradient that is not finite"
            )

    # -- data
    def load_batch(self, batch: int) -> dict[int, Tensor]:
        """The rows of this rank's micro-batches, by number; the batch is a function of the tokens consumed."""
        first = self.tokens // self.recipe.train.sequence_length
        ids = row_ids(first, batch, len(self.data.train), self.recipe.train.seed)
        return self.fetch(self.data.train, ids, batch)

    def fetch(self, rows: data.Rows, ids: list[int], batch: int) -> dict[int, Tensor]:
        """Of a global batch of row numbers, what this rank's pipeline feeds and scores."""
        if not self.engine.needs_tokens:
            return {}
        wanted = self.engine.sequences(batch)
        return {mb: rows[[ids[i] for i in sequences]].to(self.device) for mb, sequences in wanted.items()}

    # -- what is seen
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

    def report(self, totals: Totals, batch: int, lr: float, norm: float, began: float, loaded: float) -> None:
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
        if self.recipe.train.force_balanced:
            record["force_balanced"] = True
        figures, warnings = self.load.step(totals.loads)
        self.metrics.step(record | figures, biases)
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
    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds as tensors, by name; loading writes into these very tensors."""
        biases = {
            f"model.layers.{number}.mlp.gate.e_score_correction_bias": router.e_score_correction_bias
            for number, router in self.engine.routers().items()
        }
        return {**self.engine.optimizer.state_dict(), "router_bias": biases}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that takes it up."""
        seed = self.recipe.train.seed
        return {"model": asdict(self.recipe.model), "train": {"seed": seed}, "data": self.data.fingerprint}

    def save(self) -> None:
        """Commit a checkpoint of this step."""
        meta = {**self.identity(), "tokens": self.tokens, "skipped": self.skipped}
        meta["wandb_id"] = self.metrics.wandb_id if self.metrics else None
        checkpoint.save(self.checkpoints, self.step, self.state(), meta, self.recipe.checkpoint.keep_last)

    def resume(self) -> dict[str, Any] | None:
        """Take up the checkpoint that `checkpoint.resume` names; returns its description, or None for a fresh start."""
        step = checkpoint.resume_step(self.checkpoints, self.recipe.checkpoint.resume)
        if step is None:
            return None
        state = self.state()
        meta = checkpoint.load(self.checkpoints, step, state, self.identity())
        self.engine.optimizer.load_state_dict(state)
        self.engine.numerics.bump()
        self.step, self.tokens, self.skipped = meta["step"], meta["tokens"], meta["skipped"]
        return meta


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


def main(recipe: Recipe) -> None:
    """Train as this process's rank, to the end of the recipe."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    device = start_process_group(recipe)
    if recipe.parallel.node_size is None:
        recipe.parallel.node_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    Trainer(recipe, device).fit()
    dist.destroy_process_group()
