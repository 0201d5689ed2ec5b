"""The loop with real processes: a killed run resumes bitwise, torchrun and weft agree, bad steps leave no trace.

Runs are small (the layout tests' widths, 8 sequences of 32 tokens) and read weft's own sources. What need not start
from a command line runs in the pool of workers.
"""

import contextlib
import io
import re

import pytest
import torch
import torch.distributed as dist

from parallel.schedule import SCHEDULES
from tests.commands import TORCHRUN, TRAIN, course, finish, fit, ranks_of, records, small_words, start, until_step
from tests.train.layouts import LAYOUTS, batch_of, small_recipe
from train.compose import compose
from train.engine import Engine
from train.trainer import Trainer

EVERYTHING_ON = LAYOUTS["dualpipe 2, data 2, expert 2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Overrides that make `tiny` a run of seconds."""
    words = small_words(tmp_path_factory.mktemp("corpus"), vocab_size=512, num_hidden_layers=3)
    return [*words, "train.eval_rows=8"]


# ---------------------------------------------------------------- start, end, start again
@pytest.mark.slow
def test_a_run_resumed_after_sigkill_is_bitwise_the_uninterrupted_one(workers, corpus, tmp_path):
    words = [*corpus, "train.steps=8", "checkpoint.every=3", f"run.dir={tmp_path}"]
    words += ["log.bias_every=1", "log.load_every=3"]
    workers(4).run(fit, [*words, "run.name=whole"], timeout=300)
    words.append("run.name=killed")

    killed = start(TRAIN, words)
    until_step(4, tmp_path / "killed", killed, seconds=240)
    ranks = ranks_of(killed.pid)
    for rank in ranks.values():
        rank.kill()
    _, err = finish(killed, 1)
    assert len(ranks) == 4 and "SIGKILL" in err
    before = course(tmp_path / "killed")
    assert 4 <= len(before) < 8, "killed in the middle, after a checkpoint"

    finish(
        start(TRAIN, [*words, "checkpoint.resume=auto", "trace=on"]), timeout=300
    )  # which changes nothing of what is computed
    assert before == course(tmp_path / "whole")[: len(before)], "the same as in the pool, until it was killed"
    assert course(tmp_path / "killed") == course(tmp_path / "whole"), "and the same to the end"
    for file in ("evaluations.jsonl", "load.jsonl"):
        assert records(tmp_path / "killed", file) == records(tmp_path / "whole", file)
    for each in records(tmp_path / "whole"):
        by_exchange = each["expert_bytes_inside"]
        assert by_exchange.keys() == {"counts", "dispatch", "combine", "combine.B", "dispatch.B"}
        assert sum(by_exchange.values()) == pytest.approx(each["expert_gb_inside"] * 1e9)
        assert not any(each["expert_bytes_across"].values()), "one machine"
    assert [each["steps"] for each in records(tmp_path / "whole", "load.jsonl")] == [3, 3, 2]
    assert (tmp_path / "killed/pictures/load.svg").exists()
    biases = [[each["router_bias"] for each in records(tmp_path / run)] for run in ("killed", "whole")]
    assert biases[0] == biases[1] and biases[0][2] != biases[0][3], "also where it was resumed, after step 3 or 6"
    assert {path.name for path in (tmp_path / "killed/traces").iterdir()} == {
        f"rank-0000{rank}.json" for rank in range(4)
    }
    assert all(
        0 <= records(tmp_path / "killed")[-1][key] <= 1 for key in ("bubble", "exposed_comm", "exposed_comm_pairs")
    )
    assert not {"bubble", "exposed_comm"} & set(records(tmp_path / "whole")[-1]), "absent where nobody measured"


@pytest.mark.slow
def test_torchrun_does_the_same_as_weft_train(corpus, tmp_path):
    words = [
        *corpus,
        "parallel.data=1",
        "parallel.expert=1",
        "train.steps=2",
        "checkpoint.every=0",
        f"run.dir={tmp_path}",
    ]
    finish(start(TRAIN, [*words, "run.name=weft"]), timeout=300)
    finish(start([*TORCHRUN, "-m", "train"], [*words, "run.name=torchrun"]), timeout=300)
    assert len(course(tmp_path / "weft")) == 2
    assert course(tmp_path / "weft") == course(tmp_path / "torchrun")
    assert records(tmp_path / "weft", "evaluations.jsonl") == records(tmp_path / "torchrun", "evaluations.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["all_to_all", "hierarchical"])
def test_more_rows_than_the_memory_plan_allows_end_the_run_with_one_message(corpus, tmp_path, dispatch):
    """No router is balanced to the row: one of four ranks receives more, and the others do not wait for it."""
    words = [*corpus, f"parallel.dispatch={dispatch}", "parallel.node_size=1", "parallel.max_rows_factor=1.0"]
    _, err = finish(start(TRAIN, [*words, f"run.dir={tmp_path}", "run.name=full"]), 2)
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("weft:")]
    assert re.fullmatch(
        r"weft: parallel\.max_rows_factor=1: layer \d, micro-batch \d: rank \d is about to (receive|pass on) 1\d\d "
        r"rows for experts; expected at most 128 = 1 x 128, the rows of a balanced rank "
        r"\(parallel\.microbatch_size=1 x train\.sequence_length=32 x model\.num_experts_per_tok=4\)",
        line,
    )


def test_a_force_balanced_run_says_so_everywhere(workers, corpus, tmp_path):
    one = ["parallel.pipeline=1", "parallel.data=1", "parallel.expert=1", "parallel.schedule=1f1b"]
    words = [*corpus, *one, "train.steps=2", "train.force_balanced=true", f"run.dir={tmp_path}", "run.name=forced"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        workers(1).run(fit, words)
    first, *steps = [line for line in printed.getvalue().splitlines() if "held-out" not in line]
    assert first.startswith("train.force_balanced=true: tokens go round all experts instead of choosing")
    assert len(steps) == 2 and all("force-balanced" in line for line in steps)
    for record in records(tmp_path / "forced"):
        assert record["force_balanced"] is True
        assert {record["layer_max_violation"][layer] for layer in ("1", "2")} == {0.0}


# ---------------------------------------------------------------- steps left out
def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of all that a step may move: parameters, masters, moments, biases, and gradients, which it clears."""
    state = {f"bias {number}": router.e_score_correction_bias for number, router in engine.routers().items()}
    for bucket in engine.buckets:
        for name, parameter in bucket.parameters.items():
            state |= {name: parameter.detach(), f"gradient {name}": parameter.main_grad}
    for key, shards in engine.optimizer.state_dict().items():
        state |= {key: shards} if key == "applied_steps" else {f"{key} {n}": s.local for n, s in shards.items()}
    return {key: value.clone() for key, value in state.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def step(engine: Engine, number: int, spoil=None) -> tuple[bool, float, dict[str, float]]:
    """A step on the batch of that number: (applied, gradient norm, losses)."""
    size = engine.recipe.train.batch.start
    rows = batch_of(number, engine.recipe)
    tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
    if spoil:
        engine.pipeline.reduce = lambda stage: None  # so that it is spoilt before it is reduced
    totals = engine.forward_backward(tokens if engine.needs_tokens else {}, size, 0.3)
    if spoil:
        spoil()
    return *engine.update(1e-3, 1e-3, totals), totals.losses


def skip_one(kind: str, guilty: int, value: float) -> dict[str, bool]:
    """Two good steps, with a bad one between them; and what two good steps alone lead to."""
    engine = Engine(small_recipe(EVERYTHING_ON, "fp8"), torch.device("cpu"))

    def spoil():
        bucket = next(bucket for bucket in engine.buckets if bucket.kind == kind)
        if dist.get_rank() == guilty:
            next(reversed(bucket.parameters.values())).main_grad.view(-1)[-1] = value

    applied = [step(engine, 0)[0]]
    before, epoch = everything(engine), engine.numerics.epoch
    bad, norm, _ = step(engine, 7, spoil)
    untouched = same(before, everything(engine)) and engine.numerics.epoch == epoch
    applied.append(step(engine, 1)[0])
    after = everything(engine)

    engine = Engine(small_recipe(EVERYTHING_ON, "fp8"), torch.device("cpu"))
    for number in (0, 1):
        step(engine, number)
    return {
        "applied": all(applied),
        "skipped": not bad and not norm < float("inf"),
        "untouched": untouched,
        "moves again": not same(before, after),
        "as if the bad step had never been": same(after, everything(engine)),
    }


@pytest.mark.parametrize(("kind", "guilty", "value"), [("dense", 3, float("nan")), ("experts", 0, float("inf"))])
@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_everywhere(workers, kind, guilty, value):
    for rank, found in enumerate(workers(4).run(skip_one, kind, guilty, value)):
        assert all(found.values()), f"rank {rank}: {found}"


def fit_spoiled(words: list[str], bad: set[int]) -> tuple[str, int]:
    """A run in which rank 1's gradients are spoiled at some steps; what ends it, and at which step."""
    trainer = Trainer(compose(words), torch.device("cpu"))
    honest = trainer.engine.pipeline.reduce

    def spoiled(stage):
        if dist.get_rank() == 1 and trainer.step + 1 in bad:
            bucket = next(bucket for bucket in trainer.engine.buckets if bucket.stages == {stage})
            next(iter(bucket.parameters.values())).main_grad.fill_(float("nan"))
        honest(stage)

    trainer.engine.pipeline.reduce = spoiled
    try:
        trainer.fit()
    except RuntimeError as error:
        return str(error), trainer.step
    return "", trainer.step


def test_too_many_skipped_steps_in_a_row_end_the_run(workers, corpus, tmp_path):
    words = [*corpus, "train.steps=8", "train.max_skips=2", "checkpoint.every=0", f"run.dir={tmp_path}", "run.name=bad"]
    for message, reached in workers(4).run(fit_spoiled, words, {2, 4, 5}, timeout=300):
        assert message.startswith("step 5: 2 steps in a row had a gradient that is not finite") and reached == 5
    reported = records(tmp_path / "bad")
    assert [each["dropped_steps"] for each in reported] == [0, 1, 1, 2]
    assert [each["grad_norm"] is None for each in reported] == [False, True, False, True]


# ---------------------------------------------------------------- evaluation
def train_and_evaluate(layout: dict, precision: str, evaluates: bool) -> dict:
    """Two steps, and between them (or not) evaluations: of the next step's batch, and of 16, 5 and 1 other rows."""
    engine = Engine(small_recipe(layout, precision), torch.device("cpu"))
    step(engine, 0)
    evaluations, untouched = [], True
    if evaluates:
        before = everything(engine)
        other = torch.cat([batch_of(8, engine.recipe), batch_of(9, engine.recipe)])
        for rows in (batch_of(1, engine.recipe), other, other[:5], other[:1]):
            wanted = engine.sequences(len(rows)) if engine.needs_tokens else {}
            evaluations.append(engine.evaluate({mb: rows[list(ids)] for mb, ids in wanted.items()}, len(rows)))
        untouched = same(before, everything(engine))
    idle = not any(router.load.any() for router in engine.routers().values())
    counted = any(load.any() for totals in evaluations for load in totals.loads.values())
    return {
        "evaluations": [totals.losses for totals in evaluations],
        "untouched": untouched and idle and not counted,
        "next step": step(engine, 1),
        "afterwards": everything(engine),
    }


@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_evaluation_leaves_no_trace_in_training(workers, precision):
    with_it = workers(4).run(train_and_evaluate, EVERYTHING_ON, precision, True)
    without = workers(4).run(train_and_evaluate, EVERYTHING_ON, precision, False)
    for one, other in zip(with_it, without, strict=True):
        assert one["untouched"] and one["next step"] == other["next step"]
        assert same(one["afterwards"], other["afterwards"])
        assert one["evaluations"][0]["loss"] == pytest.approx(one["next step"][2]["loss"], rel=1e-12), "the same rows"


EVALUATING = {name: LAYOUTS[name] for name in ("dualpipe 2, data 2, expert 2", "1f1b 4", "data 4, expert 4")}
EVALUATING |= {f"{name} 2": {"schedule": name, "pipeline": 2} for name in SCHEDULES}


QUICK = ("dualpipe 2, data 2, expert 2", "1f1b 4", "dualpipe 2", "zbv 2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in EVALUATING])
def test_evaluation_is_the_same_in_every_layout(workers, name):
    """Any number of rows: pipelines with fewer rows than others, and micro-batches with none, keep in step."""
    (alone,) = workers(1).run(train_and_evaluate, LAYOUTS["one process"], "fp64", True)
    size = small_recipe(EVALUATING[name], "fp64").parallel.world_size
    for part in workers(size).run(train_and_evaluate, EVALUATING[name], "fp64", True):
        assert part["untouched"]
        for one, other in zip(alone["evaluations"], part["evaluations"], strict=True):
            for loss in ("loss", "mtp_loss"):
                assert other[loss] == pytest.approx(one[loss], rel=1e-12)
