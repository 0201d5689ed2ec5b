"""What is told of the load of the experts: violations of a batch and of many, starving, and rows beyond the plan."""

import contextlib

import pytest
import torch

from parallel.errors import UserError
from parallel.experts import Tag, build
from tests.parallel.test_hierarchical import EXPERTS, connected, tokens_of
from train.compose import compose
from train.load import LoadWatch, RowLimit
from train.recipe import LogConfig


def loads(*layers: list[float]) -> dict[int, torch.Tensor]:
    """Of layers 1, 2, ..."""
    return {number: torch.tensor(load, dtype=torch.float64) for number, load in enumerate(layers, 1)}


def test_violation_of_a_batch_and_of_many_worst_layer_and_mean():
    watch = LoadWatch(LogConfig(load_window=2))
    first, _ = watch.step(loads([4, 0, 2, 2], [2, 2, 2, 2]))
    assert first["max_violation"] == first["max_violation_global"] == 1.0
    assert first["max_violation_mean"] == first["max_violation_global_mean"] == 0.5
    second, _ = watch.step(loads([0, 4, 2, 2], [6, 2, 0, 0]))
    assert (second["max_violation"], second["max_violation_mean"]) == (2.0, 1.5)
    assert (second["max_violation_global"], second["max_violation_global_mean"]) == (1.0, 0.5), "the first evens out"
    third, _ = watch.step(loads([0, 4, 2, 2], [2, 2, 2, 2]))
    assert third["max_violation_global"] == 1.0, "the first step has left the window"
    assert third["max_violation_global_mean"] == 1.0


def test_loads_on_record_add_up_and_are_counted_anew():
    watch = LoadWatch(LogConfig())
    for _ in range(3):
        watch.step(loads([1, 2], [0, 3]))
    assert watch.take(loads([1, 2], [0, 3])) == {"steps": 3, "load": {"1": [3, 6], "2": [0, 9]}}
    watch.step(loads([5, 5], [1, 9]))
    assert watch.take(loads([5, 5], [1, 9])) == {"steps": 1, "load": {"1": [5, 5], "2": [1, 9]}}


def test_a_model_without_experts_has_no_figures():
    assert LoadWatch(LogConfig()).step({}) == ({}, [])


def test_starving_is_told_once_each_time_it_happens():
    watch = LoadWatch(LogConfig(starving_share=0.5, starving_steps=3))
    fine, one, two = [4, 4, 4, 4], [1, 6, 6, 3], [1, 7, 7, 1]
    course = [two, two, two, two, one, fine, one, one, one, two]
    told = {}
    for step, load in enumerate(course, 1):
        figures, warnings = watch.step(loads([4, 4, 4, 4], load))
        told[step] = warnings, figures["starving"]
    line = "layer 2: {} starved, below 0.5 of the mean load for 3 steps"
    assert {step: warnings for step, (warnings, _) in told.items() if warnings} == {
        3: [line.format("experts 0, 3")],
        9: [line.format("expert 0")],
    }
    assert [count for _, count in told.values()] == [0, 0, 2, 2, 1, 0, 0, 0, 1, 1]


def test_nobody_is_told_of_starving_who_does_not_ask():
    watch = LoadWatch(LogConfig(starving_steps=0))
    figures, warnings = watch.step(loads([0, 8]))
    assert not warnings and "starving" not in figures


def test_rows_beyond_the_plan_are_refused_with_the_arithmetic():
    limit = RowLimit.of(compose(["recipe=tiny", "parallel.max_rows_factor=1.5"]), rank=3)
    tag = Tag("dispatch", stage=1, microbatch=2, layer=4)
    limit(1536, "receive", tag)
    with pytest.raises(UserError) as refused:
        limit(1537, "receive", tag)
    assert str(refused.value) == (
        "parallel.max_rows_factor=1.5: layer 4, micro-batch 2: rank 3 is about to receive 1,537 rows for experts; "
        "expected at most 1,536 = 1.5 x 1,024, the rows of a balanced rank (parallel.microbatch_size=1 x "
        "train.sequence_length=256 x model.num_experts_per_tok=4)"
    )
    RowLimit.of(compose(["recipe=tiny"]), rank=0)(10**9, "receive", tag)


class NoRoom(Exception):
    pass


def refused(choice: str, at: str) -> tuple[list[tuple[str, int]], set[str]]:
    """What a dispatcher tells of rows until there is no room for them, and what it has sent by then."""
    mesh, told = connected(2), []
    own = tokens_of("uneven", mesh.world_size, torch.float32)[mesh.rank]

    def limit(rows: int, doing: str, tag: Tag) -> None:
        told.append((doing, rows))
        if doing == at:
            raise NoRoom

    dispatcher = build(choice, mesh, EXPERTS, limit=limit)
    passing = dispatcher.dispatch(own.x_TD, own.weights_TK, own.experts_TK, Tag("dispatch", 0, 0, 0))
    next(passing).work.wait()
    with contextlib.suppress(NoRoom):
        next(passing)
    traffic = dispatcher.traffic
    return told, {operation for kind in (traffic.inside, traffic.across) for operation, sent in kind.items() if sent}


@pytest.mark.parametrize(
    ("choice", "at"), [("all_to_all", "receive"), ("hierarchical", "receive"), ("hierarchical", "pass on")]
)
def test_a_dispatcher_tells_of_rows_before_any_travels(workers, choice, at):
    """Two nodes of one rank: what arrives at a node is what its only rank's experts receive."""
    experts = torch.cat([own.experts_TK.flatten() for own in tokens_of("uneven", 2, torch.float32)])
    for rank, (told, sent) in enumerate(workers(2).run(refused, choice, at)):
        rows = int((experts // (EXPERTS // 2) == rank).sum())
        assert told == [("receive", rows), ("pass on", rows)][: 2 if at == "pass on" else 1]
        assert sent == {"counts"}
