"""Faults that meet a running job: signals, stops, kills, spikes, wrong bits, bad data, and neighbours.

What a signal or a kill does is seen from outside, with real command lines and processes. What a step does with wrong
numbers runs in the pool of workers.
"""

import json
import math
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from launch import cli, rendezvous
from tests.faults.commands import (
    ONE_RANK,
    TORCHRUN,
    TRAIN,
    TWO_RANKS,
    course,
    finish,
    gone,
    ranks_of,
    records,
    saved,
    start,
    tensors,
    until,
    until_step,
)
from tests.launch.test_local import Launcher
from tests.train.test_trainer import fit_spoiled, skip_one
from train.compose import compose
from train.safety import preemption
from train.safety.lock import claim
from train.safety.replicas import digest
from train.trainer import Trainer


def fit(words: list[str]) -> None:
    """A whole run on this rank of the pool."""
    Trainer(compose(words), torch.device("cpu")).fit()


def refused(capsys, *words: object) -> str:
    """What `weft` answers to words that it must not act upon."""
    assert cli.main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and not dist.is_initialized()
    return told


# ---------------------------------------------------------------- 13, 14: recipes
@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trian.steps=20", "weft: trian.steps: no such key in a recipe; did you mean 'train.steps'?\n"),
        ("+trian.steps=20", "weft: trian.steps: no such key in a recipe; did you mean 'train.steps'?\n"),
        ("train.steps=many", "weft: train.steps: expected an integer or null; "),
    ],
)
def test_a_wrong_key_or_type_is_one_message(capsys, tmp_path, word, answer):
    told = refused(capsys, "train", word, f"run.dir={tmp_path}")
    assert told.startswith(answer) and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("word", "arithmetic"),
    [
        ("parallel.pipeline=3", "parallel.pipeline=3"),
        ("parallel.expert=3", "parallel.data=2 x parallel.context=1 = 2"),
        ("parallel.microbatch_size=3", "= 12"),
        ("train.batch.start=6", "= 4"),
        ("parallel.layers_per_stage=[9,9]", "18 layers"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_arithmetic(capsys, tmp_path, word, arithmetic):
    assert arithmetic in refused(capsys, "train", word, f"run.dir={tmp_path}")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- 21: gradients that are not finite
@pytest.mark.fault(21)
def test_a_nan_on_one_rank_moves_nothing_anywhere(workers):
    for rank, found in enumerate(workers(4).run(skip_one, "dense", 3, float("nan"))):
        assert all(found.values()), f"rank {rank}: {found}"


@pytest.mark.fault(21)
def test_steps_in_a_row_without_a_finite_gradient_end_in_a_dump_that_names_the_rank(workers, small, tmp_path):
    words = [*small, *TWO_RANKS, "train.steps=8", "train.max_skips=2", "checkpoint.every=0", f"run.dir={tmp_path}"]
    for message, reached in workers(2).run(fit_spoiled, [*words, "run.name=bad"], {2, 4, 5}, timeout=300):
        assert message.startswith(
            "step 5: 2 steps in a row had a gradient that is not finite, before any sum in rank 1:"
        )
        assert reached == 5
    dumps = [json.loads(path.read_text()) for path in sorted((tmp_path / "bad/dump/step-00000005").iterdir())]
    assert [dump["rank"] for dump in dumps] == [0, 1]
    assert not dumps[0]["not_finite"] and dumps[1]["not_finite"], "only the guilty rank's own gradients"


# ---------------------------------------------------------------- 22: spikes
SPIKY = ["train.spike.factor=20", "train.spike.window=6", "train.spike.patience=2", "checkpoint.every=4"]


def fit_on_noise(words: list[str], noisy: list[range], stop: int = 0) -> str:
    """A run whose loss triples at some positions of its data, in rows; asked to stop in step `stop`. What ended it."""
    trainer = Trainer(compose(words), torch.device("cpu"))
    length, honest = trainer.recipe.train.sequence_length, trainer.engine.forward_backward

    def forward_backward(*arguments, **named):
        totals = honest(*arguments, **named | {"asked": trainer.step + 1 == stop})
        first = trainer.spikes.position(trainer.tokens) // length
        if any(first in positions for positions in noisy):
            totals.losses["loss"] *= 3
        return totals

    trainer.engine.forward_backward = forward_backward
    try:
        trainer.fit()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.fault(22)
def test_a_spike_that_persists_rolls_back_and_the_window_is_never_seen_again(workers, small, tmp_path):
    words = [*small, *ONE_RANK, *SPIKY, "train.steps=16", f"run.dir={tmp_path}", "train.spike.policy=rollback"]
    noise = [range(9 * 4, 11 * 4)]  # steps 10 and 11, of 4 rows each
    pool = workers(1)
    for name in ("one", "again"):
        pool.run(fit_on_noise, [*words, f"run.name={name}"], noise)
    [rollback] = records(tmp_path / "one", "rollbacks.jsonl")
    assert rollback == {"step": 8, "tokens": 8 * 128, "spike": [10, 11], "window": [8 * 128, 11 * 128]}
    assert course(tmp_path / "one") == course(tmp_path / "again") and len(course(tmp_path / "one")) == 16
    assert records(tmp_path / "one")[-1]["rollbacks"] == 1

    for stop in (10, 13):  # the next start goes on in the middle of the spike, or after the rollback
        name = f"stopped-{stop}"
        pool.run(fit_on_noise, [*words, f"run.name={name}"], noise, stop)
        pool.run(fit_on_noise, [*words, f"run.name={name}"], noise)
        assert course(tmp_path / name) == course(tmp_path / "one")
        assert tensors(tmp_path / name, 16) == tensors(tmp_path / "one", 16)


@pytest.mark.fault(22)
def test_the_run_ends_when_rollbacks_do_not_help(workers, small, tmp_path):
    words = [*small, *ONE_RANK, *SPIKY, "train.steps=40", f"run.dir={tmp_path}", "run.name=hopeless"]
    words += ["train.spike.policy=rollback", "train.spike.max_rollbacks=1"]
    [ended] = workers(1).run(fit_on_noise, words, [range(9 * 4, 1000)])
    assert "spikes in a row" in ended and "after 1 rollbacks" in ended
    assert len(records(tmp_path / "hopeless", "rollbacks.jsonl")) == 1


@pytest.mark.fault(22)
def test_a_spike_may_be_skipped_instead(workers, small, tmp_path):
    words = [*small, *ONE_RANK, *SPIKY, "train.steps=14", f"run.dir={tmp_path}", "run.name=skips"]
    workers(1).run(fit_on_noise, [*words, "train.spike.policy=skip"], [range(9 * 4, 10 * 4)])
    assert [each["step"] for each in records(tmp_path / "skips") if each.get("spike")] == [10]
    assert records(tmp_path / "skips")[-1]["dropped_steps"] == 1


# ---------------------------------------------------------------- 23: silent corruption
def fit_flipped(words: list[str], guilty: int, flips: dict[int, tuple[str, int]]) -> tuple[str, list[str]]:
    """A run in which bits of one rank's parameters flip while a step runs: by step, the kind of bucket and the bit.

    Returns what ended it, and the names of what was hit here.
    """
    trainer = Trainer(compose(words), torch.device("cpu"))
    honest, hit = trainer.engine.pipeline.step, []

    def step(program, batches):
        honest(program, batches)
        kind, bit = flips.pop(trainer.step + 1, ("", 0))
        if kind == "bias" and dist.get_rank() == guilty:
            bias = next(iter(trainer.engine.routers().values())).e_score_correction_bias
            bias.view(torch.int32)[0] ^= 1 << bit
        elif kind and dist.get_rank() == guilty:
            bucket = next(bucket for bucket in trainer.engine.buckets if bucket.kind == kind)
            name, parameter = list(bucket.parameters.items())[-1]
            parameter.data.view(torch.int16).view(-1)[-1] ^= 1 << bit
            hit.append(name)

    trainer.engine.pipeline.step = step
    try:
        trainer.fit()
    except RuntimeError as error:
        return str(error), hit
    return "", hit


EVERYTHING = ["train.batch.start=8", "train.steps=5", "checkpoint.every=5"]


@pytest.mark.fault(23)
def test_a_flipped_bit_is_named_and_mended_and_the_run_ends_as_if_it_had_not_been(workers, small, tmp_path):
    """DualPipe with data and expert parallelism: mirrored copies and data-parallel ones."""
    words = [*small, *EVERYTHING, f"run.dir={tmp_path}"]
    workers(4).run(fit, [*words, "run.name=whole"], timeout=300)
    found = workers(4).run(
        fit_flipped, [*words, "run.name=flipped"], 2, {2: ("dense", 0), 4: ("experts", 9)}, timeout=300
    )
    assert [ended for ended, _ in found] == [""] * 4
    [dense, expert] = found[2][1]
    assert records(tmp_path / "flipped", "corruptions.jsonl") == [
        {"step": 1, "wrong": [{"rank": 2, "parameter": dense}]},
        {"step": 3, "wrong": [{"rank": 2, "parameter": expert}]},
    ]
    assert course(tmp_path / "flipped") == course(tmp_path / "whole")
    assert tensors(tmp_path / "flipped", 5) == tensors(tmp_path / "whole", 5)


@pytest.mark.fault(23)
def test_a_router_bias_that_differs_ends_the_run_for_it_has_no_master(workers, small, tmp_path):
    words = [*small, *EVERYTHING, f"run.dir={tmp_path}", "run.name=bias"]
    for ended, _ in workers(4).run(fit_flipped, words, 1, {2: ("bias", 3)}, timeout=300):
        assert "the router's bias differs between ranks 0, 2, 3 and rank 1" in ended


@pytest.mark.fault(23)
def test_the_hash_sees_every_bit_and_every_swap():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(4099, generator=generator).bfloat16()
    whole = digest(tensor)
    for place in random.Random(0).sample(range(4099 * 16), 200):
        tensor.view(torch.int16)[place // 16] ^= torch.tensor(1 << place % 16).to(torch.int16)
        assert digest(tensor) != whole
        tensor.view(torch.int16)[place // 16] ^= torch.tensor(1 << place % 16).to(torch.int16)
    assert digest(tensor) == whole == digest(tensor[:].clone())


# ---------------------------------------------------------------- 24, 25: preemption
def preempt(command: list[str], words: list[str], run: Path, tell, times: int = 1) -> tuple[int, str]:
    """A run that is told to stop after its third step, by `tell(agent, ranks)`: its exit code and what it said."""
    process = start(command, [*words, f"run.name={run.name}"])
    until_step(3, run, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    for _ in range(times):
        tell(process, ranks)
    _, err = finish(process, None)
    assert gone(ranks, 60), "orphans"
    marker = json.loads((run / preemption.MARKER).read_text())
    assert marker["step"] in saved(run) and marker["step"] >= 3
    assert saved(run) == [marker["step"]], "one checkpoint, at one step"
    assert len(records(run)) == marker["step"]
    return process.returncode, err


def to_agent(number: int):
    return lambda agent, ranks: agent.send_signal(number)


def to_rank(rank: int, number: int):
    return lambda agent, ranks: ranks[rank].send_signal(number)


@pytest.fixture
def endless(small, tmp_path) -> list[str]:
    """A run that would go on for long, without a checkpoint before."""
    return [*small, *TWO_RANKS, "train.steps=20000", "checkpoint.every=10000", f"run.dir={tmp_path}"]


@pytest.mark.slow
@pytest.mark.fault(24)
@pytest.mark.fault(25)
def test_asked_twice_to_stop_a_run_commits_one_checkpoint_and_goes_on_from_there_bitwise(workers, endless, tmp_path):
    run = tmp_path / "asked"
    code, err = preempt(TRAIN, endless, run, to_agent(signal.SIGTERM), times=2)
    assert code == preemption.EXIT_CODE and err.count("weft: preempted by SIGTERM") == 1 and "Traceback" not in err
    [step] = saved(run)
    words = [*endless, f"train.steps={step + 2}", "checkpoint.every=1"]
    finish(start(TRAIN, [*words, "run.name=asked"]))
    assert not (run / preemption.MARKER).exists()
    workers(2).run(fit, [*words, "run.name=whole"], timeout=300)
    assert course(run) == course(tmp_path / "whole")
    assert tensors(run, step + 2) == tensors(tmp_path / "whole", step + 2)


@pytest.mark.slow
@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("command", "tell", "expected"),
    [
        (TRAIN, to_agent(signal.SIGUSR1), 75),
        (TRAIN, to_rank(1, signal.SIGTERM), 75),
        (TRAIN, to_rank(0, signal.SIGUSR1), 75),
        (TRAIN, to_agent(signal.SIGKILL), -9),
        ([*TORCHRUN, "-m", "train"], to_agent(signal.SIGTERM), 1),
        ([*TORCHRUN, "-m", "train"], to_agent(signal.SIGUSR1), -10),
        ([*TORCHRUN, "-m", "train"], to_agent(signal.SIGKILL), -9),
        ([*TORCHRUN, "-m", "train"], to_rank(1, signal.SIGUSR1), 0),
    ],
)
def test_whoever_is_asked_however_the_run_saves_once_and_leaves_no_orphans(endless, tmp_path, command, tell, expected):
    assert preempt(command, endless, tmp_path / "asked", tell)[0] == expected


@pytest.mark.slow
@pytest.mark.fault(25)
def test_a_signal_during_a_save_leaves_whole_checkpoints_only(endless, tmp_path, capsys):
    """Each step saves, so that the signals fall into saves in flight."""
    run, words = tmp_path / "asked", [*endless, "checkpoint.every=1", "checkpoint.keep_last=3", "run.name=asked"]
    for start_number in range(3):
        process = start(TRAIN, words)
        until(lambda: run.joinpath("metrics.jsonl").exists(), "a run")
        before = len(records(run))
        until_step(before + 3, run, process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05 * start_number)
        process.send_signal(signal.SIGTERM)
        finish(process, preemption.EXIT_CODE)
        assert json.loads((run / preemption.MARKER).read_text())["step"] == saved(run)[-1]
        assert cli.main(["verify", str(run)]) == 0, capsys.readouterr().out


# ---------------------------------------------------------------- 26, 27: hangs and early failures
@pytest.mark.slow
@pytest.mark.fault(26)
def test_a_stopped_rank_is_named_near_the_timeout(endless, tmp_path):
    timeout = 20
    process = start(TRAIN, [*endless, f"parallel.timeout_seconds={timeout}", "run.name=stopped"])
    until_step(2, tmp_path / "stopped", process)
    ranks = ranks_of(process.pid)
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, err = finish(process, 1)
    assert time.monotonic() - began < timeout + 20
    assert f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) has not been heard of for" in err
    assert err.count("Traceback") <= 1 and gone(ranks)


@pytest.mark.fault(27)
def test_a_rank_that_raises_before_the_first_collective_ends_the_job_with_its_traceback(tmp_path):
    body = """
if rank == 1:
    raise RuntimeError("the cause")
import torch.distributed as dist
dist.init_process_group("gloo")
"""
    began = time.monotonic()
    _, err = finish(Launcher(tmp_path).weft(body, "train", *TWO_RANKS), 1)
    assert time.monotonic() - began < 30 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert err.startswith("weft: rank 1 failed") and err.count("Traceback") == 1 and "RuntimeError: the cause" in err


# ---------------------------------------------------------------- 28, 29: data
def prepared(words: list[str]) -> Path:
    cache = [word.removeprefix("data.cache=") for word in words if word.startswith("data.cache=")][-1]
    assert cli.main(["data", "prepare", *words]) == 0
    return max(Path(cache).glob("data/*/manifest.json"), key=lambda path: path.stat().st_mtime).parent


@pytest.mark.fault(28)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_of_data_is_named_before_any_rank_starts(small, tmp_path, capsys, damage):
    words = [*small, f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path}", *ONE_RANK]
    shard = prepared(words) / "train.arrow"
    contents = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        middle = len(contents) // 2
        flipped = contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :]
        shard.write_bytes(contents[:middle] if damage == "truncated" else flipped)
    told = refused(capsys, "train", *words)
    assert str(shard) in told and "data.rebuild=true" in told


@pytest.mark.fault(29)
def test_a_tokenizer_beyond_the_vocabulary_is_refused(small, tmp_path, capsys):
    own = prepared([*small, f"data.cache={tmp_path / 'cache'}"]) / "tokenizer.json"
    smaller = ["model.vocab_size=300", f"data.tokenizer={own}", f"data.cache={tmp_path / 'other'}"]
    told = refused(capsys, "train", *small, *ONE_RANK, *smaller, f"run.dir={tmp_path}")
    assert "beyond the vocabulary of 300" in told


@pytest.mark.slow
@pytest.mark.fault(29)
def test_empty_documents_are_counted_and_data_that_ends_early_begins_again(workers, small, tmp_path):
    texts = ["def function(): pass\n" * 40, "", "  \n", "import this\n" * 90, "x = 1\n" * 200]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 4))
    words = [*small, *ONE_RANK, f"data.path={tmp_path / 'few.jsonl'}", f"data.cache={tmp_path / 'cache'}"]
    counts = json.loads((prepared(words) / "manifest.json").read_text())["counts"]
    assert counts["empty_documents"] == 8
    steps = counts["train_rows"] // 4 + 3
    workers(1).run(fit, [*words, f"train.steps={steps}", "checkpoint.every=0", f"run.dir={tmp_path}", "run.name=few"])
    assert (
        all(math.isfinite(each["loss"]) for each in records(tmp_path / "few"))
        and len(records(tmp_path / "few")) == steps
    )


# ---------------------------------------------------------------- 32: experts
def fit_biased(words: list[str], experts: list[int]) -> None:
    """A run whose tokens all choose the same experts."""
    trainer = Trainer(compose(words), torch.device("cpu"))
    for router in trainer.engine.routers().values():
        router.e_score_correction_bias[experts] = 100.0
    trainer.fit()


@pytest.mark.fault(32)
def test_experts_with_all_tokens_and_with_none_are_told_and_nothing_breaks(workers, small, tmp_path):
    words = [*small, *EVERYTHING, "checkpoint.every=0", "model.n_group=1", "model.topk_group=1", f"run.dir={tmp_path}"]
    words += ["model.num_experts_per_tok=1", "log.starving_steps=3", "run.name=one"]
    workers(4).run(fit_biased, words, [5], timeout=300)
    last = records(tmp_path / "one")[-1]
    assert math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"]) and last["dropped_steps"] == 0
    assert last["max_violation"] == pytest.approx(7.0), "eight times the mean load"
    assert last["starving"] == 7 * len(last["layer_max_violation"])


# ---------------------------------------------------------------- 33: secrets
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.slow
@pytest.mark.fault(33)
def test_wandb_out_of_reach_leaves_training_alone_and_the_key_nowhere(workers, small, tmp_path):
    words = [*small, *ONE_RANK, "train.steps=3", "checkpoint.every=3", f"run.dir={tmp_path}"]
    variables = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    alone = [sys.executable, "-P", "-m", "train"]
    out, err = finish(start(alone, [*words, "run.name=online", "wandb.mode=online"], **variables))
    workers(1).run(fit, [*words, "run.name=off"])
    assert course(tmp_path / "online") == course(tmp_path / "off")
    assert SECRET not in out + err
    for file in (tmp_path / "online").rglob("*"):
        assert not (file.is_file() and SECRET.encode() in file.read_bytes()), file


@pytest.mark.fault(33)
def test_a_recipe_cannot_take_a_secret_out_of_the_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    told = refused(capsys, "train", "run.dir=${oc.env:SCRATCH}", "wandb.project=x-${oc.env:HF_TOKEN}")
    assert told.startswith("weft: wandb.project: holds the value of the variable HF_TOKEN") and SECRET not in told
    assert compose(["run.dir=${oc.env:SCRATCH}"]).run.dir == str(tmp_path)


# ---------------------------------------------------------------- 34: neighbours
@pytest.mark.fault(34)
def test_a_port_in_use_is_told_before_any_rank_starts(small, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refused(capsys, "train", *small, *ONE_RANK, f"run.rendezvous=127.0.0.1:{port}", f"run.dir={tmp_path}")
    assert told.startswith(f"weft: run.rendezvous=127.0.0.1:{port}: expected") and "Address already in use" in told


@pytest.mark.fault(34)
def test_the_rendezvous_listens_at_its_address_only():
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    handler = rendezvous.OneMachine(RendezvousParameters(rendezvous.NAME, "127.0.0.1:0", "run", 1, 1))
    place = handler.next_rendezvous().bootstrap_store_info
    listening = [each.laddr for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    assert [each.ip for each in listening if each.port == place.master_port] == [place.master_addr] == ["127.0.0.1"]
    rank = dist.TCPStore(place.master_addr, place.master_port, is_master=False, wait_for_workers=False)
    rank.set("key", "value")

    handler.endpoint = f"127.0.0.1:{place.master_port}"
    again = handler.next_rendezvous().bootstrap_store_info
    assert again.master_port == place.master_port
    rank = dist.TCPStore(again.master_addr, again.master_port, is_master=False, wait_for_workers=False)
    assert not rank.check(["key"]), "a restart finds nothing of the start before"


@pytest.mark.fault(34)
@pytest.mark.parametrize("who", [".lock", ".launcher.lock"])
def test_a_second_job_in_a_run_directory_is_refused(small, tmp_path, capsys, who):
    words = [*small, *ONE_RANK, f"run.dir={tmp_path}", "run.name=taken"]
    with claim(tmp_path / "taken", who):
        told = refused(capsys, "train", *words)
        assert told.startswith("weft: run.name=taken: another job is at work in")
        assert not (tmp_path / "taken/config.yaml").exists(), "what the other job reads stays as it is"


# ---------------------------------------------------------------- elastic
@pytest.mark.slow
def test_a_killed_rank_is_started_again_with_the_others_and_nothing_is_lost(workers, small, tmp_path):
    words = [*small, *TWO_RANKS, "train.steps=8", "checkpoint.every=2", f"run.dir={tmp_path}"]
    process = start(TRAIN, [*words, "run.name=killed", "run.max_restarts=1"])
    until_step(5, tmp_path / "killed", process)
    ranks_of(process.pid)[1].kill()
    _, err = finish(process)
    assert err.count("weft: restart 1 of 1, from the newest checkpoint") == 1 and err.count("Traceback") <= 1
    workers(2).run(fit, [*words, "run.name=whole"], timeout=300)
    assert course(tmp_path / "killed") == course(tmp_path / "whole")
    assert tensors(tmp_path / "killed", 8) == tensors(tmp_path / "whole", 8)


@pytest.mark.slow
def test_restarts_are_bounded_and_a_mistake_is_not_tried_again(tmp_path):
    count = "Path(f'start-{os.environ[\"TORCHELASTIC_RESTART_COUNT\"]}-{rank}').touch()\n"
    words = ["train", *TWO_RANKS, "run.max_restarts=2"]
    _, err = finish(Launcher(tmp_path).weft(f"{count}raise RuntimeError('always')", *words), 1)
    assert {path.name.split("-")[1] for path in tmp_path.glob("start-*")} == {"0", "1", "2"}
    assert err.count("weft: restart") == 2 and err.count("Traceback") == 3
    mistake = "from parallel.errors import UserError\nraise UserError('checkpoint.resume=7: expected one of 5')"
    _, err = finish(Launcher(tmp_path).weft(mistake, *words), 2)
    assert err == "weft: checkpoint.resume=7: expected one of 5\n"


# ---------------------------------------------------------------- the soak
@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.fault(17)
def test_fifty_kills_at_random_times_change_nothing(workers, small, tmp_path, capsys):
    """One long run; random ranks are killed at random times, in starts and saves too (WEFT_SOAK_KILLS: how often)."""
    kills, chance = int(os.environ.get("WEFT_SOAK_KILLS", "50")), random.Random(0)
    steps = 40 * kills
    words = [*small, *TWO_RANKS, f"train.steps={steps}", "checkpoint.every=5", "log.every=1000", f"run.dir={tmp_path}"]
    run = tmp_path / "soak"
    process = start(TRAIN, [*words, "run.name=soak", f"run.max_restarts={2 * kills}"])
    for _ in range(kills):
        until(lambda: len(ranks_of(process.pid)) == 2, "both ranks", 200)
        time.sleep(chance.uniform(0, 8))
        victim = chance.choice(sorted(ranks_of(process.pid).items()))[1]
        victim.kill()
        victim.wait(60)
        if (run / "checkpoints").exists():
            assert cli.main(["verify", str(run)]) == 0, capsys.readouterr().out
    finish(process, timeout=1200)
    workers(2).run(fit, [*words, "run.name=whole"], timeout=1200)
    assert course(run) == course(tmp_path / "whole")
    assert tensors(run, steps) == tensors(tmp_path / "whole", steps)
