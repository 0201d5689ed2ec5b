"""What an expert group issues is what was predicted, and a rank out of step is found and named."""

import pytest
import torch
import torch.distributed as dist

from parallel import schedule
from parallel.experts import AllToAll, Tag
from parallel.experts.lockstep import agree, digest, exchanges, predict
from parallel.passes import merge
from tests.train.layouts import batch_of, small_recipe
from train.engine import Engine

LAYER = [("dispatch", 1), ("combine", 1)]
DUALPIPE = {"schedule": "dualpipe", "pipeline": 2, "data": 2, "expert": 2}
ONE_F_ONE_B = {**DUALPIPE, "schedule": "1f1b"}
# 1 dense and 4 MoE layers, and MTP on the last stage: [1, 4] leaves the first stage without any exchange.
LAYOUTS = {
    "dualpipe": DUALPIPE,
    "dualpipe, layers 1 and 4": {**DUALPIPE, "layers_per_stage": [1, 4]},
    "dualpipe, layers 4 and 1": {**DUALPIPE, "layers_per_stage": [4, 1]},
    "1f1b": ONE_F_ONE_B,
    "1f1b, layers 3 and 2": {**ONE_F_ONE_B, "layers_per_stage": [3, 2]},
    "dualpipe, two hops": {**DUALPIPE, "node_size": 1, "dispatch": "hierarchical", "dispatch_chunks": 2},
}


def complaint(call, *args):
    """What a call raises, in words; None if it does not."""
    try:
        call(*args)
    except RuntimeError as error:
        return str(error)
    return None


def run_and_predict(layout):
    """(predicted, issued) of two steps and an evaluation on this rank."""
    recipe = small_recipe(layout, "bf16")
    engine = Engine(recipe, torch.device("cpu"))
    size = recipe.train.batch.start
    rows = {mb: batch_of(0, recipe)[list(ids)] for mb, ids in engine.sequences(size).items()}
    tokens = rows if engine.needs_tokens else {}
    program = engine.program(size)
    visits = {number: exchanges(stage.segments) for number, stage in engine.stages.items()}
    found = []
    for run in (program, program, program.evaluation()):
        if run.kind == "train":
            engine.update(1e-3, 1e-3, engine.forward_backward(tokens, size, 0.3))
        else:
            engine.evaluate(tokens, size)
        predicted = predict(run, engine.mesh.pipeline_rank, visits, engine.dispatcher.issues)
        found.append((predicted, list(engine.dispatcher.log)))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_executor_issues_what_was_predicted(workers, name):
    ranks = workers(4).run(run_and_predict, LAYOUTS[name])
    for runs in ranks:
        assert all(predicted == issued for predicted, issued in runs)
    moe_layers = {tag.layer for runs in ranks for _, issued in runs for tag in issued}
    assert moe_layers == {1, 2, 3, 4, 5}, "of every MoE layer, MTP's too"
    assert all(runs[0] == runs[1] != runs[2] for runs in ranks if runs[0][0]), "a log holds one step"


def test_of_a_pair_the_passes_alternate_backward_first():
    pair = ("FB", 0, 7, 1, 3)
    program = schedule.Program("train", 2, 1, 8, ((0, 1),), ((("F", 1, 3), pair),))
    issued = predict(program, 0, {0: [*LAYER, ("dispatch", 2), ("combine", 2)], 1: [("dispatch", 4), ("combine", 4)]})
    assert [(tag.operation, tag.stage, tag.microbatch, tag.layer) for tag in issued] == [
        ("counts", 1, 3, 4),
        ("dispatch", 1, 3, 4),
        ("combine", 1, 3, 4),
        ("combine.B", 1, 3, 4),
        ("counts", 0, 7, 1),
        ("dispatch", 0, 7, 1),
        ("dispatch.B", 1, 3, 4),
        ("combine", 0, 7, 1),
        ("counts", 0, 7, 2),
        ("dispatch", 0, 7, 2),
        ("combine", 0, 7, 2),
    ]


def test_deferred_weight_gradients_issue_nothing():
    halves, whole = (("F", 0, 0), ("I", 0, 0), ("W", 0, 0)), (("F", 0, 0), ("B", 0, 0))
    split, full = (schedule.Program("train", 1, 1, 1, ((0,),), (each,)) for each in (halves, whole))
    assert predict(split, 0, {0: LAYER}) == predict(full, 0, {0: LAYER})


def test_a_digest_is_that_of_the_log_alone():
    log = [Tag("dispatch", 0, 1, 2), Tag("combine", 0, 1, 2)]
    assert digest(log) == digest(tuple(Tag(t.operation, t.stage, t.microbatch, t.layer) for t in log))
    assert len({digest(log), digest(log[::-1]), digest(log[:1]), digest([])}) == 4


def swap_on_last_rank():
    """Two equal dispatches at once, begun in the other order on the last rank; returns what arrived for the first."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    dispatcher = AllToAll(4, dist.group.WORLD)
    experts = torch.tensor([[0, 3]])
    run = [
        dispatcher.dispatch(torch.full((1, 2), 1.0 + mb), torch.ones(1, 2), experts, Tag("dispatch", 0, mb, 1))
        for mb in (0, 1)
    ]
    order = [1, 0] if rank == last else [0, 1]
    results = dict(zip(order, merge(*(run[mb] for mb in order)), strict=True))
    agree(dist.group.WORLD, [Tag("agreed", 0, 0, 0)])
    return results[0][0].tolist(), complaint(agree, dist.group.WORLD, dispatcher.log)


def test_a_reversed_order_that_swaps_data_in_silence_is_found_and_named(workers):
    for rank, (rows, message) in enumerate(workers(2).run(swap_on_last_rank)):
        assert [1.0, 1.0] in rows and [2.0, 2.0] in rows, "rows of the other micro-batch arrived in silence"
        assert "collective number 0 is counts of stage 0, micro-batch 0, layer 1 on ranks [0]" in message, rank
        assert "counts of stage 0, micro-batch 1, layer 1 on ranks [1]" in message, rank


def agree_in_pairs():
    """Expert groups (0, 1) and (2, 3); the log of rank 3 is one entry short."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    log = [Tag("dispatch", 1, 0, 2), Tag("combine", 1, 0, 2)]
    return complaint(agree, groups[rank // 2], log[:-1] if rank == 3 else log)


def test_a_missing_collective_is_named_in_its_group_only(workers):
    first, second, *others = workers(4).run(agree_in_pairs)
    assert first is None and second is None
    for message in others:
        assert "number 1 is combine of stage 1, micro-batch 0, layer 2 on ranks [2]; none on ranks [3]" in message


def differ_in_layers():
    """Ranks of one expert group whose recipes place the layers differently, on an engine each."""
    layers = [3, 2] if dist.get_rank() % 2 else [4, 1]
    recipe = small_recipe({**ONE_F_ONE_B, "layers_per_stage": layers}, "bf16")
    engine = Engine(recipe, torch.device("cpu"))
    rows = {mb: batch_of(0, recipe)[mb : mb + 1] for mb in range(4)}
    return complaint(engine.forward_backward, rows, 8, 0.3)


def test_ranks_with_unlike_recipes_are_told_before_they_wait_for_each_other(workers):
    for message in workers(4).run(differ_in_layers):
        assert "out of step" in message
