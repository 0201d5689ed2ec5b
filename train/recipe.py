"""What a run is: the structured configuration that every key of a recipe must fit.

`Recipe` is a tree of dataclasses, one for each group of keys. A dataclass checks itself in `check()`; what spans
several of them (does the batch fill the pipelines, do the experts fill their ranks) is in `Recipe.validate()`, which
shows its arithmetic. Nothing here touches a process group. The words that a user types become a `Recipe` in
`train.compose`; model, data and optimizer describe themselves in `train.model.config`, `train.data.config` and
`train.optim`.
"""

import math
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any

from kernels.fp8.backends import BACKENDS, lacking
from kernels.recompute import CHOICES
from parallel.errors import UserError
from parallel.experts.build import CHOICES as DISPATCHERS
from parallel.experts.build import choose
from parallel.experts.deepep import check_model as check_deepep
from parallel.schedule import Program, generate, named
from train.data.config import DataConfig
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.safety.spikes import SpikeConfig

PRECISIONS = ("fp8", "bf16", "fp32", "fp64")


@dataclass
class ParallelConfig:
    """Where the model lives: world size = pipeline x data x context, expert groups inside data x context."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    schedule: str = "1f1b"
    chunks: int = 2  # stages a rank, where the schedule leaves them open: interleaved
    microbatch_size: int = 1
    microbatches: int | None = None  # a pipeline's share of a step; null: derived from the batch
    node_size: int | None = None  # ranks of a node; null: the launcher's local world size
    dispatch: str = "auto"  # how tokens reach their experts: parallel/experts/build.py
    dispatch_chunks: int = 1  # hierarchical: parts of the tokens whose hops overlap
    dispatch_precision: str = "auto"  # of rows on their way to experts; back they are as precise as activations
    layers_per_stage: list[int] | None = None  # null: as even as possible by cost
    comm_sms: int | None = None  # most SMs of a GPU for each communicator; null: as many as NCCL wants
    max_rows_factor: float | None = None  # rows that a rank's experts may get at once, in balanced shares; null: any
    timeout_seconds: float = 600.0

    @property
    def world_size(self) -> int:
        """Number of processes that this layout needs."""
        return self.pipeline * self.data * self.context

    def program(self, microbatches: int | None = None) -> Program:
        """The schedule's program, not verified yet, for so many micro-batches a step; None: for the fewest it serves.

        Raises `UserError` for what the schedule cannot serve.
        """
        fewest = named(self.schedule).multiple
        return generate(self.schedule, self.pipeline, microbatches or fewest, self.chunks)

    def check(self) -> None:
        at_least(1, "parallel", self, "pipeline", "data", "context", "expert", "chunks")
        at_least(1, "parallel", self, "microbatch_size", "microbatches", "node_size", "dispatch_chunks")
        at_least(1, "parallel", self, "comm_sms", "max_rows_factor")
        one_of("parallel.dispatch", self.dispatch, DISPATCHERS)
        one_of("parallel.dispatch_precision", self.dispatch_precision, ("auto", "bf16", "fp8"))
        if self.context != 1:
            raise UserError(f"parallel.context={self.context}: expected 1; context parallelism does not exist yet")
        self.program(self.microbatches)
        width = self.data * self.context
        if width % self.expert:
            raise UserError(
                f"parallel.expert={self.expert}: expected a divisor of parallel.data={self.data} x "
                f"parallel.context={self.context} = {width}"
            )
        if self.node_size and self.node_size < self.world_size and self.world_size % self.node_size:
            raise UserError(
                f"parallel.node_size={self.node_size}: expected a divisor of the world size, "
                f"pipeline {self.pipeline} x data {self.data} x context {self.context} = {self.world_size}"
            )
        choose(self.dispatch, self.expert, min(self.node_size or self.world_size, self.world_size))
        if self.timeout_seconds <= 0:
            raise UserError(f"parallel.timeout_seconds={self.timeout_seconds}: expected more than 0")

    def check_world(self, processes: int) -> None:
        """Raise `UserError` unless `processes` is the number that this layout needs."""
        if processes != self.world_size:
            raise UserError(
                f"processes started: {processes}; expected parallel.pipeline={self.pipeline} x "
                f"parallel.data={self.data} x parallel.context={self.context} = {self.world_size}"
            )


@dataclass
class FP8Config:
    """Whose kernels compute what `precision: fp8` asks for: kernels/fp8/backends/__init__.py."""

    backend: str = "auto"

    def check(self) -> None:
        one_of("fp8.backend", self.backend, BACKENDS)


@dataclass
class BatchConfig:
    """Sequences in the global batch: from `start` to `end` over `ramp_tokens` tokens, in multiples of `multiple_of`."""

    start: int = 8
    end: int = 8
    ramp_tokens: int = 0
    multiple_of: int = 8

    def check(self) -> None:
        at_least(1, "train.batch", self, "start", "end", "multiple_of")
        at_least(0, "train.batch", self, "ramp_tokens")
        for name in ("start", "end"):
            if getattr(self, name) % self.multiple_of:
                raise UserError(
                    f"train.batch.{name}={getattr(self, name)}: expected a multiple of "
                    f"train.batch.multiple_of={self.multiple_of}"
                )
        if self.end < self.start:
            raise UserError(f"train.batch.end={self.end}: expected at least train.batch.start={self.start}")


@dataclass
class TrainConfig:
    """How long and on what terms. A schedule is `[[tokens_from, value], ...]` and starts at 0 tokens.

    (Its type says list[Any] because OmegaConf refuses whole numbers inside nested lists of floats.)
    """

    steps: int | None = None
    tokens: int | None = None  # the smaller of both ends the run
    seed: int = 0
    sequence_length: int = 4096
    batch: BatchConfig = field(default_factory=BatchConfig)
    mtp_weight: list[Any] = field(default_factory=lambda: [[0, 0.3]])
    bias_speed: list[Any] = field(default_factory=lambda: [[0, 0.001]])
    balance_alpha: float = 1e-4
    force_balanced: bool = False  # tokens go round all experts instead of choosing: to measure speed, not to learn
    recompute: list[str] = field(default_factory=list)  # what backward makes again: kernels/recompute.py
    eval_every: int = 0  # steps between evaluations on held-out rows, beside the one at the end
    eval_rows: int = 0  # held-out rows of an evaluation; 0: none
    max_skips: int = 10  # steps in a row with a non-finite gradient before the run gives up
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    replica_check_every: int = 1  # steps between comparisons of copies that must be equal; 0: none
    threads: int | None = None  # of one process; null: cores / processes

    def check(self) -> None:
        if self.steps is None and self.tokens is None:
            raise UserError("train.steps=null and train.tokens=null: expected at least one of them to end the run")
        at_least(1, "train", self, "steps", "tokens", "sequence_length", "max_skips", "threads")
        at_least(0, "train", self, "seed", "balance_alpha", "eval_every", "eval_rows", "replica_check_every")
        self.batch.check()
        self.spike.check()
        for choice in self.recompute:
            one_of("train.recompute", choice, CHOICES)
        check_schedule("train.mtp_weight", self.mtp_weight)
        check_schedule("train.bias_speed", self.bias_speed)


@dataclass
class CheckpointConfig:
    """Steps between checkpoints (0: none), which are kept, and what a start resumes: auto, never or a step."""

    every: int = 0
    keep_last: int = 2
    keep_every: int = 0  # and those whose step is a multiple of this; 0: none
    background: bool = True  # written behind the training
    resume: int | str = "auto"
    allow: list[str] = field(default_factory=list)  # what may differ from the checkpoint: keys, or sections of keys

    def check(self) -> None:
        at_least(0, "checkpoint", self, "every", "keep_every")
        at_least(1, "checkpoint", self, "keep_last")
        if self.resume not in ("auto", "never") and not (isinstance(self.resume, int) and self.resume >= 0):
            raise UserError(f"checkpoint.resume={self.resume}: expected auto, never or the number of a step")
        for key in self.allow:
            one_of("checkpoint.allow", key.partition(".")[0], ("model", "precision", "optim", "train", "data"))


@dataclass
class RunConfig:
    """The run lives in `dir/name`; a null name becomes the recipe's. The rest is for `weft train`."""

    name: str | None = None
    dir: str = "runs"
    max_restarts: int = 0  # from the newest checkpoint, after a rank has failed
    rendezvous: str = "127.0.0.1:0"  # where the ranks find each other, address:port; port 0: any that is free

    def check(self) -> None:
        at_least(0, "run", self, "max_restarts")
        _, colon, port = self.rendezvous.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            raise UserError(f"run.rendezvous={self.rendezvous}: expected address:port, such as 127.0.0.1:29500")
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name):
            raise UserError(
                f"run.name={self.name}: expected the name of one folder, without a slash (run.dir holds it)"
            )


@dataclass
class WandbConfig:
    """Weights & Biases: `disabled`, `offline` (kept in the run directory) or `online`."""

    mode: str = "disabled"
    project: str = "weft"
    entity: str | None = None

    def check(self) -> None:
        one_of("wandb.mode", self.mode, ("disabled", "offline", "online"))


@dataclass
class LogConfig:
    """Steps between lines on the console, and between records of every router's loads and biases (0: none).

    `*_global` figures look at `load_window` steps together. An expert starves that had less than `starving_share` of
    the mean load in each of `starving_steps` steps (0: nobody is told).

    Of a start with `trace`, the first `trace_skip` steps are not written to files, and then `trace_steps` are.
    """

    every: int = 1
    bias_every: int = 0
    health_every: int = 10
    load_every: int = 10
    load_window: int = 100
    starving_share: float = 0.05
    starving_steps: int = 100
    trace_skip: int = 1
    trace_steps: int = 3

    def check(self) -> None:
        at_least(1, "log", self, "every", "load_window", "trace_steps")
        at_least(
            0, "log", self, "bias_every", "health_every", "load_every", "starving_share", "starving_steps", "trace_skip"
        )


@dataclass
class Recipe:
    """Everything that a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: str = "bf16"
    fp8: FP8Config = field(default_factory=FP8Config)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    log: LogConfig = field(default_factory=LogConfig)
    trace: bool = False  # measure every step, and write timelines of some

    def microbatches(self, sequences: int, key: str = "train.batch.start") -> int:
        """Micro-batches of one pipeline for a global batch of `sequences`. Raises `UserError` naming `key`."""
        p = self.parallel
        multiple = named(p.schedule).multiple
        quantum = p.data * p.microbatch_size * multiple
        if sequences < 1 or quantum < 1 or sequences % quantum:
            factors = f"parallel.data={p.data} x parallel.microbatch_size={p.microbatch_size}"
            if multiple > 1:
                groups = "pairs" if multiple == 2 else f"groups of {multiple}"
                factors += f" x {multiple} (parallel.schedule={p.schedule} takes micro-batches in {groups})"
            raise UserError(f"{key}={sequences}: expected a multiple of {factors} = {quantum}")
        return sequences // (p.data * p.microbatch_size)

    def validate(self, data: bool = True) -> "Recipe":
        """Check every part, then what spans several. Raises `UserError`; returns itself.

        data: False where no text is going to be read, so that a recipe need not say where it is.
        """
        check_finite("", asdict(self))
        one_of("precision", self.precision, PRECISIONS)
        if data:
            self.data.check()
        for part in (
            self.model,
            self.fp8,
            self.parallel,
            self.train,
            self.optim,
            self.checkpoint,
            self.run,
            self.wandb,
            self.log,
        ):
            part.check()
        self._check_batch()
        self._check_model()
        self._check_precision()
        self._check_fp8()
        self._check_spike()
        if self.parallel.dispatch == "deepep":
            model = self.model
            check_deepep(model.hidden_size, model.num_experts_per_tok, self.precision, self.parallel.comm_sms)
        return self

    @property
    def fp8_dispatch(self) -> bool:
        """Whether rows go to their experts in FP8."""
        return self.precision == "fp8" and self.parallel.dispatch_precision != "bf16"

    def _check_precision(self) -> None:
        wanted, precision = self.parallel.dispatch_precision, self.precision
        possible = {"fp8": ("auto", "fp8", "bf16"), "bf16": ("auto", "bf16")}.get(precision, ("auto",))
        if wanted not in possible:
            raise UserError(
                f"parallel.dispatch_precision={wanted}: expected {' or '.join(possible)} with precision={precision}"
            )

    def _check_spike(self) -> None:
        spike, checkpoint = self.train.spike, self.checkpoint
        if spike.policy != "rollback":
            return
        if not checkpoint.every:
            raise UserError(
                "train.spike.policy=rollback: expected checkpoint.every above 0, to have where to go back to"
            )
        during = -(-(spike.patience - 1) // checkpoint.every)
        if checkpoint.keep_last <= during:
            raise UserError(
                f"checkpoint.keep_last={checkpoint.keep_last}: expected at least {during + 1} with "
                f"train.spike.policy=rollback: of {spike.patience} spikes in a row (train.spike.patience) "
                f"{during} may be saved with checkpoint.every={checkpoint.every}, and one from before must be there"
            )

    def _check_fp8(self) -> None:
        name, model = self.fp8.backend, self.model
        if self.precision != "fp8":
            if name != "auto":
                raise UserError(f"fp8.backend={name}: expected auto with precision={self.precision}")
            return
        if missing := lacking(name):
            others = [other for other in BACKENDS if not lacking(other)]
            raise UserError(
                f"fp8.backend={name}: it has no {', '.join(missing)}; expected one of {', '.join(others)} "
                f"(auto uses {name} where it is fastest)"
            )
        heads = model.num_attention_heads
        widths = {
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "moe_intermediate_size": model.moe_intermediate_size,
            "q_lora_rank": model.q_lora_rank or 0,
            "kv_lora_rank": model.kv_lora_rank,
            "kv_lora_rank + model.qk_rope_head_dim": model.kv_lora_rank + model.qk_rope_head_dim,
            "num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)": heads * model.qk_head_dim,
            "num_attention_heads x (qk_nope_head_dim + v_head_dim)": heads
            * (model.qk_nope_head_dim + model.v_head_dim),
            "num_attention_heads x v_head_dim": heads * model.v_head_dim,
        }
        multiple = BACKENDS[name].multiple
        for key, width in widths.items():
            if width % multiple:
                raise UserError(f"model.{key}={width}: expected a multiple of {multiple} with fp8.backend={name}")

    def _check_batch(self) -> None:
        batch, p = self.train.batch, self.parallel
        for name in ("start", "end", "multiple_of"):
            self.microbatches(getattr(batch, name), f"train.batch.{name}")
        if p.microbatches is None:
            return
        for name in ("start", "end"):
            derived = self.microbatches(getattr(batch, name))
            if p.microbatches != derived:
                raise UserError(
                    f"parallel.microbatches={p.microbatches}: expected null or "
                    f"train.batch.{name}={getattr(batch, name)} / (parallel.data={p.data} x "
                    f"parallel.microbatch_size={p.microbatch_size}) = {derived}"
                )

    def _check_model(self) -> None:
        model, p = self.model, self.parallel
        if model.n_routed_experts % p.expert:
            raise UserError(
                f"parallel.expert={p.expert}: expected a divisor of model.n_routed_experts={model.n_routed_experts} "
                f"({model.n_routed_experts} / {p.expert} = {model.n_routed_experts / p.expert:.2f} experts a rank)"
            )
        stages = p.program().stages
        many = f" x {stages // p.pipeline} stages a rank" if stages > p.pipeline else ""
        if model.num_hidden_layers < stages:
            raise UserError(
                f"parallel.pipeline={p.pipeline}{many}: expected at most "
                f"model.num_hidden_layers={model.num_hidden_layers}, a layer for each of its stages"
            )
        per_stage = p.layers_per_stage
        if per_stage is not None and (
            len(per_stage) != stages or min(per_stage) < 1 or sum(per_stage) != model.num_hidden_layers
        ):
            raise UserError(
                f"parallel.layers_per_stage={per_stage}: {len(per_stage)} stages, {sum(per_stage)} layers; expected "
                f"parallel.pipeline={p.pipeline}{many or ' stages'} of at least 1 layer, "
                f"model.num_hidden_layers={model.num_hidden_layers} in all (MTP modules come on top of the last)"
            )
        length = self.train.sequence_length
        if not model.num_nextn_predict_layers < length <= model.max_position_embeddings:
            raise UserError(
                f"train.sequence_length={length}: expected more than model.num_nextn_predict_layers="
                f"{model.num_nextn_predict_layers} and at most "
                f"model.max_position_embeddings={model.max_position_embeddings}"
            )
        if self.data.vocab_size is not None and self.data.vocab_size > model.vocab_size:
            raise UserError(
                f"data.vocab_size={self.data.vocab_size}: expected at most model.vocab_size={model.vocab_size}, or null"
            )

    def summary(self) -> str:
        """The layout and the batch in one line, with the arithmetic."""
        p, batch = self.parallel, self.train.batch
        return (
            f"{p.world_size} processes = pipeline {p.pipeline} x data {p.data} x context {p.context}, "
            f"experts over {p.expert}; {p.schedule}, {self.precision}; {batch.start} sequences of "
            f"{self.train.sequence_length} tokens a step = data {p.data} x "
            f"{self.microbatches(batch.start)} micro-batches of {p.microbatch_size}"
        )


def at_least(minimum: float, section: str, config: Any, *names: str) -> None:
    """Raise `UserError` naming the first of `section`'s keys that is set and below `minimum`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise UserError(f"{section}.{name}={value}: expected at least {minimum}")


def one_of(key: str, value: str, choices: Any) -> None:
    """Raise `UserError` with a suggestion unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{key}={value}: expected one of {', '.join(choices)}{did_you_mean(value, choices)}")


def did_you_mean(word: str, choices: Any) -> str:
    """`; did you mean 'x'?` for the choice nearest to `word`, or nothing."""
    near = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def check_finite(key: str, value: Any) -> None:
    """Raise `UserError` if a number anywhere in `value`, which `key` holds, is NaN or infinite."""
    if isinstance(value, dict):
        for name, item in value.items():
            check_finite(f"{key}.{name}".lstrip("."), item)
    for number in [value, *(value if isinstance(value, list) else [])]:
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{key}={value}: expected a finite number")


def check_schedule(key: str, rows: list[Any]) -> None:
    """Raise `UserError` unless `rows` is `[[0, value], [tokens_from, value], ...]` in rising order of tokens."""
    starts = [row[0] for row in rows if is_pair(row)]
    if not rows or len(starts) != len(rows) or starts[0] != 0 or starts != sorted(set(starts)):
        raise UserError(f"{key}={rows}: expected [[0, value], [tokens_from, value], ...] in rising order of tokens")


def is_pair(row: Any) -> bool:
    """Whether `row` is a list of two numbers."""
    return (
        isinstance(row, list)
        and len(row) == 2
        and all(type(item) in (int, float) and math.isfinite(item) for item in row)
    )
