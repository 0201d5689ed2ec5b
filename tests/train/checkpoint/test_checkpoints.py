"""Saving behind the training, and reading back into any layout.

The judges: a state whose every element is known (`states`), ZeRO-1 itself, which must go on as if it had not stopped,
and the safetensors library, which opens every file.
"""

import json
import os
import threading
import time

import pytest
import torch
from safetensors import safe_open

from parallel.errors import UserError
from tests.parallel.test_zero import LR, SHAPES, WIDE, accumulate, build, shards
from tests.train.checkpoint import states
from tests.train.checkpoint.states import checkpoints, resumes, save, state_at
from train.checkpoint import directory as names
from train.checkpoint import disk
from train.checkpoint import shards as files


# ---------------------------------------------------------------- with ZeRO-1
def advance(held, zero, steps):
    for step in steps:
        accumulate(held, step)
        zero.reduce_gradients()
        assert zero.step(LR, zero.grad_norm())


def everything(held, zero):
    values = {name: (part.start, parameter.detach().clone()) for name, (parameter, part, _) in held.items()}
    return values, shards(zero), int(zero.state_dict()["applied_steps"])


def train_on(directory, dtype):
    """Two steps, saved behind two more."""
    held, zero = build(dtype, torch.bfloat16)
    ours = checkpoints(directory)
    advance(held, zero, range(2))
    saved = everything(held, zero)
    ours.save(2, zero.state_dict(), {})
    ours.settle()
    advance(held, zero, range(2, 4))
    ours.finish()
    return saved, everything(held, zero)


def take_up(directory, dtype):
    """The checkpoint of step 2 in parameters that hold something else, and two steps from there."""
    held, zero = build(dtype, torch.bfloat16)
    for parameter, *_ in held.values():
        parameter.data.fill_(7)
        parameter.main_grad.fill_(7)
    ours, state = checkpoints(directory), zero.state_dict()
    ours.load(ours.find("auto"), state)
    zero.load_state_dict(state)
    loaded = everything(held, zero)
    advance(held, zero, range(2, 4))
    return loaded, everything(held, zero)


def gather(results):
    """{key: {name: whole flat tensor}} from every rank's shards."""
    wholes: dict[str, dict[str, torch.Tensor]] = {}
    for _, state, _ in results:
        for key, by_name in state.items():
            for name, (start, values) in by_name.items():
                shape = torch.Size(SHAPES[name]).numel()
                whole = wholes.setdefault(key, {}).setdefault(name, torch.full((shape,), torch.nan, dtype=values.dtype))
                whole[start : start + len(values)] = values
    return wholes


@pytest.mark.parametrize("size", [1, 2, 4])
def test_resuming_is_bitwise_equal_to_not_stopping(workers, size, tmp_path):
    straight = workers(size).run(train_on, tmp_path, torch.bfloat16)
    resumed = workers(size).run(take_up, tmp_path, torch.bfloat16)
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(4, 1), (4, 2), (1, 4), (2, 4)], ids="{0[0]} to {0[1]}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_any_layout_loads_what_another_saved(workers, sizes, dtype, tmp_path):
    before, after = sizes
    saved = [result for result, _ in workers(before).run(train_on, tmp_path, dtype)]
    loaded = [result for result, _ in workers(after).run(take_up, tmp_path, dtype)]
    wholes = gather(saved)
    assert set(wholes) == {"master", "exp_avg", "exp_avg_sq"}
    assert all(set(by_name) == set(SHAPES) for by_name in wholes.values())
    torch.testing.assert_close(gather(loaded), wholes, rtol=0, atol=0)
    assert wholes["master"]["embed.weight"].dtype == WIDE[dtype]
    for values, _, applied in loaded:
        assert applied == 2
        for name, (row, value) in values.items():
            master = wholes["master"][name].view(SHAPES[name])
            assert torch.equal(value, master[row : row + len(value)].to(dtype)), f"{name} is the cast of its master"


# ---------------------------------------------------------------- the files
def save_in_small_files(directory):
    files.FILE_BYTES = 1000
    try:
        save(directory, 3)
    finally:
        files.FILE_BYTES = 1 << 29


@pytest.mark.parametrize("function", [save, save_in_small_files], ids=["a file a rank", "many files"])
def test_safetensors_opens_every_file_and_finds_each_element_once(workers, tmp_path, function):
    workers(4).run(function, tmp_path, *([3] if function is save else []))
    folder = tmp_path / "step-00000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest["files"]}
    assert len(manifest["files"]) == 4 if function is save else len(manifest["files"]) > 4
    wholes = {name: torch.full((torch.Size(t["shape"]).numel(),), torch.nan) for name, t in manifest["tensors"].items()}
    for file in manifest["files"]:
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                [(start, length)] = [(s, n) for f, s, n in manifest["tensors"][name]["pieces"] if f == file]
                assert wholes[name][start : start + length].isnan().all(), "stored twice"
                wholes[name][start : start + length] = opened.get_tensor(name).float()
    assert torch.equal(wholes["router_bias.layers.2"], torch.full((3,), 3.25)) and wholes["applied_steps"] == 3
    for key in states.DTYPES:
        for name in states.SHAPES:
            assert torch.equal(wholes[f"{key}.{name}"], states.whole(key, name, 3).float())
    assert workers(2).run(resumes, tmp_path) == [3, 3]


def test_which_stay_and_that_those_of_another_history_are_left_alone(workers, tmp_path):
    workers(1).run(save, tmp_path, 10, 20, 30, 90, 40, 50, keep_last=2, keep_every=20)
    assert names.committed(tmp_path) == [20, 40, 50, 90]


def go_on(directory, *steps):
    """Resume from the newest that is whole, and save; what is committed after each save."""
    ours, seen = checkpoints(directory, keep_last=2), []
    assert ours.find("auto").step == 10
    for step in steps:
        ours.save(step, state_at(step), {"tokens": 10 * step})
        ours.wait()
        seen.append(names.committed(directory))
    ours.finish()
    return seen


@pytest.mark.parametrize(
    ("steps", "left"),
    [((20, 30), [[10, 17, 20], [20, 30]]), ((17, 30), [[10, 17], [17, 30]])],
    ids=["it goes with those of its age", "saved again, it counts"],
)
def test_a_damaged_one_that_was_left_out_is_not_one_of_those_kept(workers, tmp_path, steps, left):
    workers(1).run(save, tmp_path, 10, 17)
    os.truncate(tmp_path / "step-00000017" / "manifest.json", 9)
    assert workers(1).run(go_on, tmp_path, *steps) == [left]
    assert workers(1).run(resumes, tmp_path) == [30]


def save_other(directory):
    ours = checkpoints(directory)
    ours.save(10, {"x": torch.zeros(2)}, {"tokens": 1})
    ours.finish()
    return ours.find(10).meta


def test_a_checkpoint_of_the_same_step_is_replaced(workers, tmp_path):
    workers(1).run(save, tmp_path, 10)
    assert workers(1).run(save_other, tmp_path) == [{"tokens": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_resume_asks_for_what_exists(workers, tmp_path):
    nowhere = tmp_path / "checkpoints"
    assert workers(1).run(resumes, nowhere) == [None]
    with pytest.raises(UserError, match=r"checkpoint\.resume=10: expected .*; .*checkpoints has no checkpoint"):
        workers(1).run(resumes, nowhere, 10)
    workers(1).run(save, nowhere, 10, 20)
    for resume, step in (("auto", 20), ("never", None), (10, 10), ("10", 10)):
        assert workers(1).run(resumes, nowhere, resume) == [step]
    with pytest.raises(UserError, match=r"checkpoint\.resume=15: expected .* has 10, 20"):
        workers(1).run(resumes, nowhere, 15)


# ---------------------------------------------------------------- what does not fit
def refused(directory, change):
    ours, state = checkpoints(directory), states.blank()
    change(state)
    with pytest.raises(UserError) as caught:
        ours.load(ours.find(3), state)
    return str(caught.value)


def add_on_one_rank(state):
    if torch.distributed.get_rank() == 1:
        state["y"] = torch.zeros(2)


def leave_out(state):
    state["exp_avg"].pop("embed.weight")


def widen(state):
    state["applied_steps"] = torch.zeros(3, dtype=torch.long)


def narrow(state):
    state["applied_steps"] = torch.zeros((), dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_on_one_rank, "y: it is not in the checkpoint"),
        (leave_out, "exp_avg.embed.weight: this run has no such tensor"),
        (widen, "applied_steps: shape [] in the checkpoint, [3] in this run"),
        (narrow, "applied_steps: dtype I64 in the checkpoint, I32 in this run"),
    ],
    ids=["missing", "left over", "shape", "dtype"],
)
def test_what_does_not_fit_is_named_on_every_rank(workers, tmp_path, change, message):
    workers(2).run(save, tmp_path, 3)
    folder = tmp_path / "step-00000003"
    for said in workers(2).run(refused, tmp_path, change):
        assert said == f"{folder} cannot be loaded into this run: {message}"


# ---------------------------------------------------------------- behind the training
def save_slowly(directory):
    """Two saves on a disk that waits for us; what is known at each point."""
    free, seen = threading.Event(), []
    ours = checkpoints(directory)
    disk.observer = lambda operation, path: operation == "write" and free.wait(60)
    try:
        state = state_at(1)
        ours.save(1, state, {"tokens": 10})
        ours.settle()
        for part in files.parts_of(state):
            part.local.zero_()  # the optimizer moves on
        seen.append(("not committed", names.committed(directory)))
        addresses = [part.local.data_ptr() for part in ours.buffers]
        threading.Timer(0.3, free.set).start()
        began = time.perf_counter()
        ours.save(2, state_at(2), {"tokens": 20})
        seen.append(("waited for the first", time.perf_counter() - began >= 0.25, names.committed(directory)[:1]))
        ours.finish()
        seen.append(("the same buffers", addresses == [part.local.data_ptr() for part in ours.buffers]))
        figures, warnings = ours.take()
        seen.append(("told", figures["checkpoint_stall_seconds"] >= 0.25, figures["checkpoint_seconds"] > 0, warnings))
        seen.append(("once", ours.take()))
    finally:
        disk.observer = disk.ignore
    return seen


def test_training_goes_on_while_a_save_is_written_and_waits_for_it_before_the_next(workers, tmp_path):
    for seen in workers(2).run(save_slowly, tmp_path):
        assert seen == [
            ("not committed", []),
            ("waited for the first", True, [1]),
            ("the same buffers", True),
            ("told", True, True, []),
            ("once", ({}, [])),
        ]
    for step in (1, 2):
        assert workers(1).run(resumes, tmp_path, step) == [step]


def save_in_the_foreground(directory):
    ours = checkpoints(directory, background=False)
    ours.save(1, state_at(1), {"tokens": 10})
    return names.committed(directory), ours.buffers, set(ours.take()[0])


def test_a_save_in_the_foreground_needs_no_buffers(workers, tmp_path):
    told = {"checkpoint_stall_seconds", "checkpoint_seconds"}
    assert workers(2).run(save_in_the_foreground, tmp_path) == [([1], None, told)] * 2


def save_and_discard(directory):
    """Rank 1 wants no save any more, the others wait for it as if for any."""
    ours, free = checkpoints(directory), threading.Event()
    disk.observer = lambda operation, path: operation == "create" and free.wait(60)
    try:
        ours.save(2, state_at(2), {})
        threading.Timer(0.2, free.set).start()
        if torch.distributed.get_rank() == 1:
            ours.discard()
        else:
            ours.wait()
    finally:
        disk.observer = disk.ignore
    failed, (figures, warnings) = ours.failed, ours.take()
    ours.save(3, state_at(3), {"tokens": 30})
    ours.finish()
    return failed, figures.get("checkpoint_failures"), warnings


def test_a_discarded_save_leaves_nothing_and_the_next_one_works(workers, tmp_path):
    told = ["checkpoint of step 2: it was given up"]
    assert workers(2).run(save_and_discard, tmp_path) == [("it was given up", None, told)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def discard_what_is_committed(directory):
    ours = checkpoints(directory)
    ours.save(4, state_at(4), {"tokens": 40})
    ours.wait()
    ours.discard()
    return ours.find("auto").step


def test_what_is_committed_cannot_be_discarded(workers, tmp_path):
    assert workers(2).run(discard_what_is_committed, tmp_path) == [4, 4]
