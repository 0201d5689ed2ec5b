"""The state on a GPU: copied out beside the computation through pinned memory, and read back."""

import pytest
import torch

from parallel.flat_shard import FlatShard
from train.behind import Behind, on_host
from train.checkpoint import Checkpoints
from train.ema import EMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZE = 1 << 24


def state_of(values: torch.Tensor, bias: torch.Tensor) -> dict:
    return {"master": {"weight": FlatShard(values, 0, (SIZE,))}, "bias": bias}


def save_and_load(directory) -> dict[str, bool]:
    """A save of what a stream is still computing, overwritten as soon as it may be."""
    device = torch.device("cuda")
    values, bias = torch.zeros(SIZE, device=device), torch.zeros(4, device=device)
    ours = Checkpoints(directory, Behind(device), keep_last=2)
    ours.reserve(state_of(values, bias))
    matrix = torch.ones(4096, 4096, device=device)
    for _ in range(20):
        matrix = matrix @ matrix / 4096
    values += matrix.view(-1)[0] + torch.arange(SIZE, device=device) % 97  # after all of that
    bias += 2
    wanted = values.clone(), bias.clone()
    ours.save(1, state_of(values, bias), {})
    ours.settle()
    values.fill_(-1)
    bias.fill_(-1)
    ours.finish()
    loaded = torch.zeros(SIZE, device=device), torch.zeros(4, device=device)
    ours.load(ours.find("auto"), state_of(*loaded))
    return {
        "pinned": all(part.local.is_pinned() for part in ours.buffers),
        "values": torch.equal(loaded[0], wanted[0]),
        "bias": torch.equal(loaded[1], wanted[1]),
    }


def test_the_state_is_saved_as_it_was_when_save_was_called_and_returns_to_the_gpu(workers, tmp_path):
    assert workers(1).run(save_and_load, tmp_path) == [{"pinned": True, "values": True, "bias": True}]


class Masters:
    """All that the average asks of an optimizer."""

    def __init__(self, master: torch.Tensor) -> None:
        self.masters = [master]


def test_the_average_lives_on_the_host_and_takes_in_every_step():
    device = torch.device("cuda")
    master = torch.zeros(SIZE, device=device)
    ema = EMA(Masters(master), 0.5, Behind(device))
    wanted = torch.zeros(SIZE)
    for step in range(1, 4):
        ema.settle()
        master += step
        ema.update()
        wanted = (wanted + sum(range(step + 1))) / 2
    ema.settle()
    assert ema.average[0].device.type == "cpu" and torch.equal(ema.average[0], wanted)
    assert on_host(master).is_pinned()
