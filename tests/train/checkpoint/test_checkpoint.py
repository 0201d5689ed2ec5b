"""Checkpoints are whole or ignored, resume bitwise, and fit every layout."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from parallel.errors import UserError
from tests.parallel.test_zero import LR, SHAPES, WIDE, accumulate, build, shards
from tests.workers import Pool, WorkerError
from train import checkpoint
from train.checkpoint import directory as checkpoints

META = {"tokens": 4096, "model": {"hidden_size": 5, "rope_scaling": None}}


def biases(value):
    """Router biases of the layers that this rank holds: all hold layer 0, the others are shared by some."""
    layers = [0, 1 + dist.get_rank() % 2] if dist.get_world_size() == 4 else [0, 1, 2]
    return {f"layers.{layer}.gate.bias": torch.full((3,), value + layer) for layer in layers}


def advance(held, zero, steps):
    for step in steps:
        accumulate(held, step)
        zero.reduce_gradients()
        assert zero.step(LR, zero.grad_norm())


def everything(held, zero):
    values = {name: (part.start, parameter.detach().clone()) for name, (parameter, part, _) in held.items()}
    return values, shards(zero), int(zero.state_dict()["applied_steps"])


def save(directory, dtype, steps=2, keep_last=9):
    held, zero = build(dtype, torch.bfloat16)
    advance(held, zero, range(steps))
    checkpoint.save(directory, steps, {**zero.state_dict(), "router_bias": biases(0.5)}, META, keep_last)
    saved = everything(held, zero)
    advance(held, zero, range(steps, steps + 2))
    return saved, everything(held, zero)


def resume(directory, dtype, steps=2):
    held, zero = build(dtype, torch.bfloat16)
    for parameter, *_ in held.values():
        parameter.data.fill_(7)
        parameter.main_grad.fill_(7)
    state = {**zero.state_dict(), "router_bias": biases(0.0)}
    meta = checkpoint.load(directory, steps, state, expected={"model": META["model"]})
    zero.load_state_dict(state)
    assert meta == {"version": 1, "step": steps, **META}
    for name, bias in state["router_bias"].items():
        assert torch.equal(bias, biases(0.5)[name])
    loaded = everything(held, zero)
    advance(held, zero, range(steps, steps + 2))
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
    straight = workers(size).run(save, tmp_path, torch.bfloat16)
    resumed = workers(size).run(resume, tmp_path, torch.bfloat16)
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(4, 1), (4, 2), (1, 4), (2, 4)], ids="{0[0]} to {0[1]}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_any_layout_loads_what_another_saved(workers, sizes, dtype, tmp_path):
    before, after = sizes
    saved = [result for result, _ in workers(before).run(save, tmp_path, dtype)]
    loaded = [result for result, _ in workers(after).run(resume, tmp_path, dtype)]
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


def test_tied_and_replicated_tensors_are_stored_once(workers, tmp_path):
    workers(4).run(save, tmp_path, torch.bfloat16)
    stored = FileSystemReader(tmp_path / "step-00000002").read_metadata()
    names = {f"{key}.{name}" for key in ("master", "exp_avg", "exp_avg_sq") for name in SHAPES}
    names |= {f"router_bias.layers.{layer}.gate.bias" for layer in range(3)} | {"applied_steps"}
    assert set(stored.state_dict_metadata) == names
    for name in SHAPES:
        tensor = stored.state_dict_metadata[f"master.{name}"]
        assert isinstance(tensor, TensorStorageMetadata)
        assert sum(chunk.sizes[0] for chunk in tensor.chunks) == torch.Size(SHAPES[name]).numel()


def save_and_be_killed(directory):
    if dist.get_rank() == 0:
        checkpoints.commit = lambda *_: os._exit(9)
    save(directory, torch.bfloat16, steps=3)


def test_a_save_that_is_killed_before_its_rename_is_ignored_and_cleared_away(workers, tmp_path):
    workers(2).run(save, tmp_path, torch.bfloat16)
    doomed = Pool(2)
    with pytest.raises(WorkerError, match="exit code 9"):
        doomed.run(save_and_be_killed, tmp_path)
    assert (tmp_path / "step-00000003.tmp" / ".metadata").exists(), "it was killed at the last moment"
    assert checkpoint.committed(tmp_path) == [2] and checkpoint.resume_step(tmp_path, "auto") == 2
    workers(2).run(resume, tmp_path, torch.bfloat16)
    workers(2).run(save, tmp_path, torch.bfloat16, steps=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def save_empty(directory, step, keep_last=9, meta=META):
    checkpoint.save(directory, step, {"x": torch.full((2,), float(step))}, meta, keep_last)


def test_only_the_newest_stay_and_later_ones_of_another_history_are_left_alone(workers, tmp_path):
    for step in (10, 20, 30, 90, 40):
        workers(1).run(save_empty, tmp_path, step, keep_last=2)
    assert checkpoint.committed(tmp_path) == [30, 40, 90]


def test_a_checkpoint_of_the_same_step_is_replaced(workers, tmp_path):
    workers(1).run(save_empty, tmp_path, 10)
    workers(1).run(save_empty, tmp_path, 10, meta={"tokens": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert checkpoint.read_meta(tmp_path, 10)["tokens"] == 1


def test_resume_asks_for_what_exists(workers, tmp_path):
    nowhere = tmp_path / "checkpoints"
    assert checkpoint.resume_step(nowhere, "auto") is None and checkpoint.newest(nowhere) is None
    with pytest.raises(UserError, match=r"checkpoint\.resume=10: expected .*; .*checkpoints has no checkpoint"):
        checkpoint.resume_step(nowhere, 10)
    for step in (10, 20):
        workers(1).run(save_empty, nowhere, step)
    assert checkpoint.resume_step(nowhere, "auto") == 20
    assert checkpoint.resume_step(nowhere, "never") is None
    assert checkpoint.resume_step(nowhere, 10) == checkpoint.resume_step(nowhere, "10") == 10
    with pytest.raises(UserError, match=r"checkpoint\.resume=15: expected .* has 10, 20"):
        checkpoint.resume_step(nowhere, 15)


@pytest.mark.parametrize("text", [None, "{", json.dumps({"version": 0})], ids=["missing", "damaged", "other version"])
def test_a_checkpoint_without_its_description_is_refused(workers, tmp_path, text):
    workers(1).run(save_empty, tmp_path, 10)
    meta = tmp_path / "step-00000010" / "meta.json"
    meta.unlink() if text is None else meta.write_text(text)
    with pytest.raises(UserError, match=r"meta\.json: .*expected"):
        checkpoint.read_meta(tmp_path, 10)


def refused(directory, state, expected=None):
    with pytest.raises(UserError) as caught:
        checkpoint.load(directory, 10, state, expected)
    return str(caught.value)


def one_rank_asks_for_more(directory):
    state = {"x": torch.zeros(2)}
    if dist.get_rank() == 1:
        state["y"] = torch.zeros(2)
    return refused(directory, state)


def test_what_does_not_fit_is_named_on_every_rank(workers, tmp_path):
    workers(1).run(save_empty, tmp_path, 10)
    [message] = workers(1).run(refused, tmp_path, {"x": torch.zeros(3)})
    assert "x" in message and "step-00000010" in message
    [message] = workers(1).run(refused, tmp_path, {}, {"model": {"hidden_size": 6, "rope_scaling": None}})
    assert message.startswith("model.hidden_size=6: ") and "with 5" in message
    for message in workers(2).run(one_rank_asks_for_more, tmp_path):
        assert "Missing key" in message and ": y" in message
