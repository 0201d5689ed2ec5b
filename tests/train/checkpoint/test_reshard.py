"""Item by item: a run saved in one layout goes on in another as if nothing had happened.

All pairs of layouts: the state is equal by name, to the bit, and loss and gradient norm of the next three steps are
those of the run that stayed, within 1e-5.
"""

import hashlib

import pytest
import torch
import torch.distributed as dist

from tests.train.checkpoint.states import checkpoints
from tests.train.layouts import LAYOUTS, batch_of, small_recipe
from train.checkpoint.shards import parts_of
from train.engine import Engine

NAMES = ["one process", "dualpipe 2", "dualpipe 2, data 2, expert 2", "1f1b 4", "data 4, expert 4"]
QUICK = [("dualpipe 2, data 2, expert 2", "1f1b 4"), ("1f1b 4", "dualpipe 2, data 2, expert 2")]
ODD = {"vocab_size": 251, "intermediate_size": 97}  # whatever is cut, is cut unevenly


def state_of(engine: Engine) -> dict:
    biases = {str(number): router.e_score_correction_bias for number, router in engine.routers().items()}
    return {**engine.optimizer.state_dict(), "router_bias": biases}


def by_name(state: dict) -> dict[str, str]:
    """A hash of each tensor, put together from all ranks."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [(p.name, p.start, p.shape, p.local) for p in parts_of(state)])
    wholes: dict[str, torch.Tensor] = {}
    for name, start, shape, local in (part for each in everyone for part in each):
        whole = wholes.setdefault(name, torch.full((torch.Size(shape).numel(),), 77, dtype=local.dtype))
        whole[start : start + len(local)] = local
    return {name: hashlib.sha256(bytes(t.view(torch.uint8).numpy())).hexdigest() for name, t in wholes.items()}


def go_on(engine: Engine, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of these steps."""
    course = []
    for step in steps:
        rows, size = batch_of(step, engine.recipe), engine.recipe.train.batch.start
        tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
        totals = engine.forward_backward(tokens if engine.needs_tokens else {}, size, mtp_weight=0.3)
        applied, norm = engine.update(1e-3, 1e-3, totals)
        assert applied
        course.append((totals.losses["loss"], norm))
    return course


def leave(layout: str, directory) -> tuple[dict, list]:
    """Two steps, a checkpoint, three more."""
    engine = Engine(small_recipe(LAYOUTS[layout], "fp32", **ODD), torch.device("cpu"))
    go_on(engine, range(2))
    state = state_of(engine)
    ours = checkpoints(directory)
    ours.save(2, state, {})
    ours.settle()
    ours.finish()
    return by_name(state), go_on(engine, range(2, 5))


def arrive(layout: str, directories: list) -> list[tuple[dict, list]]:
    """From each of these checkpoints: what is taken up, and three steps."""
    found = []
    for directory in directories:
        engine = Engine(small_recipe(LAYOUTS[layout], "fp32", **ODD), torch.device("cpu"))
        go_on(engine, range(7, 8))  # elsewhere, so that nothing is right by chance
        ours, state = checkpoints(directory), state_of(engine)
        ours.load(ours.find("auto"), state)
        engine.optimizer.load_state_dict(state)
        engine.numerics.bump()
        found.append((by_name(state_of(engine)), go_on(engine, range(2, 5))))
    return found


def switch(workers, tmp_path, pairs) -> None:
    size = {name: small_recipe(LAYOUTS[name], "fp32").parallel.world_size for name in NAMES}
    left = {name: workers(size[name]).run(leave, name, tmp_path / name)[0] for name in {before for before, _ in pairs}}
    for layout in dict.fromkeys(after for _, after in pairs):
        origins = [before for before, after in pairs if after == layout]
        [arrived, *_] = workers(size[layout]).run(arrive, layout, [tmp_path / each for each in origins], timeout=200)
        for origin, (state, course) in zip(origins, arrived, strict=True):
            assert state == left[origin][0], f"{origin} -> {layout}: the state differs"
            for (loss, norm), (loss_stayed, norm_stayed) in zip(course, left[origin][1], strict=True):
                assert loss == pytest.approx(loss_stayed, rel=1e-5), f"{origin} -> {layout}"
                assert norm == pytest.approx(norm_stayed, rel=1e-5), f"{origin} -> {layout}"


@pytest.mark.slow
def test_a_pair_of_layouts_changes_over(workers, tmp_path):
    switch(workers, tmp_path, QUICK)


@pytest.mark.slow
def test_every_pair_of_layouts_changes_over(workers, tmp_path):
    switch(workers, tmp_path, [(before, after) for before in NAMES for after in NAMES if before != after])
