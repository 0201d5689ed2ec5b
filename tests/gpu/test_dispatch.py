"""On a GPU, dispatch gives what the local permutation gives; the host waits for row counts only. `make test-gpu`."""

import importlib.util

import pytest
import torch
import torch.distributed as dist

from parallel.experts import LocalExperts, all_to_all, build, hierarchical
from parallel.mesh import Mesh
from tests.parallel.test_deepep import made_of
from tests.parallel.test_experts import every_direction
from tests.parallel.test_hierarchical import CASES, EXPERTS, Tokens, connected, end_to_end, tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def alone():
    """The mesh of a world of one."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    mesh = Mesh(1, 1, 1, 1, 0, 1)
    mesh.connect()
    yield mesh
    dist.destroy_process_group()


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("choice", ["all_to_all", "hierarchical"])
def test_rows_travel_on_a_gpu_and_the_host_reads_once(alone, monkeypatch, choice, chunks):
    [own] = tokens_of("uneven", 1, torch.bfloat16)
    there = Tokens(*(getattr(own, name).cuda() for name in Tokens.__dataclass_fields__))
    expected, counts, _ = every_direction(LocalExperts(EXPERTS), there)
    dispatcher = build(choice, alone, EXPERTS, False, chunks)
    every_direction(dispatcher, there)  # communicators are made
    owner = {"hierarchical": hierarchical, "all_to_all": all_to_all}[choice]
    real, reads = owner.host_counts, []

    def read(numbers):
        torch.cuda.set_sync_debug_mode("default")
        reads.append(real(numbers))
        torch.cuda.set_sync_debug_mode("error")
        return reads[-1]

    monkeypatch.setattr(owner, "host_counts", read)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results, found, _ = every_direction(dispatcher, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 1 and found == counts
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def through_deepep(fp8):
    """Results and counts of each case on this rank, which has a GPU of its own."""
    rank, found = dist.get_rank(), {}
    torch.cuda.set_device(rank)
    dispatcher = build("deepep", connected(1), EXPERTS, fp8)
    for case in CASES:
        own = made_of(case, dist.get_world_size(), fp8, True)[rank]
        there = Tokens(*(getattr(own, name).cuda() for name in Tokens.__dataclass_fields__))
        results, counts, _ = every_direction(dispatcher, there)
        found[case] = {name: value.cpu() for name, value in results.items()}, counts
    return found


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="needs the package deep_ep")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_deepep_gives_what_one_rank_with_all_experts_gives(workers, fp8):
    parts = workers(2).run(through_deepep, fp8)
    for case in CASES:
        expected, counts, _ = every_direction(LocalExperts(EXPERTS), end_to_end(made_of(case, 2, fp8, True)))
        assert [count for part in parts for count in part[case][1]] == counts
        for name, whole in expected.items():
            assert torch.equal(torch.cat([part[case][0][name] for part in parts]), whole), (case, name)
