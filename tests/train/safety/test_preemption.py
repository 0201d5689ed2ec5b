"""Signals only ask while a run lasts; whoever has run one in a process of its own gets its handlers back."""

import os
import signal

import pytest

from tests.commands import ONE_RANK, small_words, train
from train.safety.preemption import SIGNALS, Preemption
from train.trainer import Trainer


@pytest.fixture
def heard():
    """The signals that this process's own handlers have taken."""
    taken: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: taken.append(number)) for number in SIGNALS}
    yield taken
    for number, handler in before.items():
        signal.signal(number, handler)


def tell() -> None:
    """Each of the signals to this process."""
    for number in SIGNALS:
        os.kill(os.getpid(), number)


def test_signals_ask_while_it_listens_and_do_what_they_did_before_afterwards(heard):
    preemption = Preemption()
    with preemption.listening():
        tell()
    assert preemption.asked == "SIGTERM" and heard == []
    tell()
    assert heard == [*SIGNALS]


def test_a_rank_of_an_agent_stays_deaf_until_it_has_ended(heard, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with Preemption().listening():
        pass
    tell()
    assert heard == []


@pytest.mark.parametrize("raises", [False, True], ids=["ends", "raises"])
def test_a_run_inside_another_process_leaves_its_handlers_as_they_were(heard, tmp_path, monkeypatch, raises):
    fit, mine = Trainer.fit, {number: signal.getsignal(number) for number in SIGNALS}

    def watched(trainer: Trainer) -> bool:
        assert all(signal.getsignal(number) != mine[number] for number in SIGNALS)
        if raises:
            raise KeyboardInterrupt
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", watched)
    words = [*small_words(tmp_path, vocab_size=512, num_hidden_layers=2), *ONE_RANK, "precision=fp32"]
    code, _ = train(*words, "train.steps=1", "train.eval_rows=0", "checkpoint.every=0", f"run.dir={tmp_path}")
    assert code == (130 if raises else 0)
    assert {number: signal.getsignal(number) for number in SIGNALS} == mine
