"""Uneven experts and jittering ranks: what is drawn is what was asked for, and whoever is slowest is waited for."""

from itertools import pairwise

import numpy as np
import pytest

from launch import cli
from launch.simulate.cluster.sheet import read
from launch.simulate.result import simulate
from launch.simulate.stages.work import Exchange, PassWork, Piece
from launch.simulate.step.race import race
from launch.simulate.step.skew import HEAVY, Noise, Peers, Skew, width
from parallel.errors import UserError
from tests.launch.simulate.step.test_engine import UNIT, exchange, piece, stage
from train.compose import compose

WORDS = ["recipe=tiny", "train.sequence_length=64", "parallel.node_size=4", "model.num_hidden_layers=3"]


@pytest.fixture(scope="module")
def step():
    sheet, found = read("h800x2048"), {}

    def seconds(**noise):
        key = tuple(sorted(noise.items()))
        if key not in found:
            found[key] = simulate(compose(WORDS), sheet, noise=Noise(**noise))
        return found[key].step_seconds

    return seconds


@pytest.mark.parametrize("group", [2, 8, 64])
def test_the_fullest_rank_has_as_much_more_than_the_mean_as_was_asked_for(group):
    noise = Noise(skew=0.3, seed=5)
    drawn = Skew(noise, UNIT, group, 1, False, {0: stage()}, {})
    loads = [loads for microbatch in range(3000) for loads in drawn.loads(0, microbatch).values()]
    assert np.mean([load.max() / load.mean() for load in loads]) == pytest.approx(1.3, rel=0.02)
    assert np.mean(loads, axis=0) == pytest.approx(np.ones(group), rel=0.05), "no rank is always the fullest"
    assert width(0.0, group) == pytest.approx(0, abs=1e-3)


def test_a_backward_meets_the_loads_of_its_forward_and_a_seed_draws_them_again():
    one, same, other = (Skew(Noise(0.5, 0.1, seed), UNIT, 4, 1, False, {0: stage()}, {}) for seed in (1, 1, 2))
    forward, backward = (one.peers(0, (kind, 0, 7)) for kind in "FB")
    assert (forward.loads[0][0] == backward.loads[0][0]).all() and (forward.factors != backward.factors).all()
    assert (same.loads(0, 7)[0] == one.loads(0, 7)[0]).all() and (other.loads(0, 7)[0] != one.loads(0, 7)[0]).all()


def of(loads: list[float], factors: list[float], slow: dict[str, float], one: PassWork, relayed: bool = False) -> Peers:
    """Peers of these loads on layer 0; pieces named in `slow` take so many seconds more with twice the rows."""
    drawn = Skew(Noise(), UNIT, len(loads), 2, relayed, {}, {})
    for each in one.pieces:
        seconds = sum(UNIT.seconds(o.cost, o.name) for o in each.operators)
        drawn._heavier[id(each)] = piece(seconds + (HEAVY - 1) * slow.get(each.name, 0.0))
    return Peers(drawn, np.array(factors), [{0: np.array(loads)}])


def test_all_wait_for_the_fullest_rank_and_its_rows():
    """Ranks with 0.5, 0.5, 1 and 2 times their share: a dispatch of 3 s takes 6 s, experts of 2 s take 1, 1, 2, 4."""
    one = PassWork([piece(1, "attention"), exchange(3), piece(2, "mlp"), exchange(1), piece(1, "attention")])
    run = race([one], UNIT, unlike=of([0.5, 0.5, 1, 2], [1, 1, 1, 1], {"mlp": 2.0}, one))
    assert run.seconds == 1 + 3 * 2 + 4 + 1 * 2 + 1
    # Until the fullest has computed, the others wait 3, 3 and 2 s for it.
    assert run.exposed == pytest.approx(6 + 2 + (3 + 3 + 2) / 4) and run.compute == pytest.approx(
        2 + (1 + 1 + 2 + 4) / 4
    )
    assert run.spans[-1].end == run.seconds


def test_a_node_receives_once_what_is_relayed_inside_it():
    one = PassWork([Piece("join", 0), Exchange("dispatch", 0, 4)])
    direct, relayed = (race([one], UNIT, unlike=of([2, 1, 0.5, 0.5], [1] * 4, {}, one, way)) for way in (False, True))
    assert (direct.seconds, relayed.seconds) == (8, 6), "the fuller node has 1.5 times the mean"


def test_the_slowest_machine_is_waited_for_at_each_exchange():
    one = PassWork([piece(1), exchange(1), piece(2), exchange(1), piece(1)])
    assert race([one], UNIT, unlike=of([1, 1], [1.0, 1.5], {}, one)).seconds == 1.5 * 4 + 2


def test_alike_peers_take_exactly_as_long_as_one_rank():
    forward = PassWork([piece(0.1), exchange(3), piece(0.7), exchange(1), piece(0.3)])
    alike = of([1, 1, 1], [1, 1, 1], {"mlp": 1.0}, forward)
    assert race([forward], UNIT, unlike=alike) == race([forward], UNIT)


@pytest.mark.slow
def test_a_step_without_noise_is_the_same_bit_for_bit_and_grows_with_it(step):
    assert step() == step(skew=0.0, jitter=0.0, seed=3)
    for name, values in {"skew": (0.0, 0.2, 0.6), "jitter": (0.0, 0.05)}.items():
        grown = [step(**{name: value}) for value in values]
        assert all(after > before for before, after in pairwise(grown)), (name, grown)
    assert step(skew=0.3, jitter=0.02) == step(skew=0.3, jitter=0.02, seed=0) != step(skew=0.3, jitter=0.02, seed=1)


@pytest.mark.parametrize("word", ["skew=much", "skew=-0.1", "jitter=nan", "jitter=2%", "seed=x", "seed=-1"])
def test_what_is_no_noise_is_refused_by_its_name(word, capsys):
    assert cli.main(["simulate", word]) == 2
    assert f"weft: {word}: expected a " in capsys.readouterr().err


def test_a_rank_cannot_receive_more_than_there_is():
    with pytest.raises(UserError, match=r"skew=1: the fullest of parallel.expert=2 ranks cannot receive 2 times"):
        simulate(compose(WORDS), read("h800x2048"), noise=Noise(skew=1.0))
