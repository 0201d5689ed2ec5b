"""Rows 24 and 25: a run is asked to stop, by whatever signal to whomever. One checkpoint, at one step, no orphans."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launch import cli
from tests.commands import (
    TORCHRUN,
    TRAIN,
    course,
    finish,
    fit,
    gone,
    ranks_of,
    records,
    saved,
    start,
    tensors,
    until,
    until_step,
)
from tests.train.checkpoint.states import checkpoints, resumes, save, state_at, world
from train.checkpoint import disk
from train.safety import preemption


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


def stopped_in_the_middle(directory: Path, then: str) -> None:
    """SIGTERM while a save waits for its disk: what the handler asks for is done at the next step's border."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    disk.observer = lambda operation, path: operation == "create" and time.sleep(0.3)
    ours = checkpoints(directory)
    ours.save(20, state_at(20), {"tokens": 200})
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked and ours.writing.is_alive()
    getattr(ours, then)()


@pytest.mark.fault(25)
@pytest.mark.parametrize(("then", "steps"), [("wait", [10, 20]), ("discard", [10])])
def test_a_save_in_flight_at_sigterm_commits_or_is_discarded(workers, tmp_path, then, steps):
    workers(1).run(save, tmp_path, 10)
    assert world(2, stopped_in_the_middle, tmp_path, then) == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{step}" for step in steps]
    assert workers(1).run(resumes, tmp_path) == steps[-1:]
