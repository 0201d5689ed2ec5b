"""Where ranks sit, and that the groups made of them hold who they should."""

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import Mesh, communicator_options


def world(pipeline, data, context, expert, node_size=8):
    """The mesh as every rank of a world sees it."""
    return [Mesh(pipeline, data, context, expert, rank, node_size) for rank in range(pipeline * data * context)]


@st.composite
def worlds(draw):
    pipeline, data, context = (draw(st.integers(1, 4)) for _ in range(3))
    expert = draw(st.sampled_from([n for n in range(1, data * context + 1) if data * context % n == 0]))
    return world(pipeline, data, context, expert)


def test_the_report_s_layout():
    """PP16 x DP128 with EP64 over 8 nodes of 8 (report, section 3.2); DualPipe puts each stage at two positions."""
    ranks = world(16, 128, 1, 64)
    assert ranks[0].world_size == 2048 and len({mesh.node for mesh in ranks}) == 256
    last = ranks[-1]
    assert (last.pipeline_rank, last.data_rank, last.expert_rank, last.node) == (15, 127, 63, 255)
    assert last.expert_ranks() == tuple(range(2048 - 64, 2048))
    assert last.expert_nodes() == tuple(rank // 8 for rank in range(2048 - 64, 2048))
    assert last.in_node() == tuple(range(2040, 2048)), "the ranks of its expert group that are in its node"
    assert last.across_nodes() == tuple(range(1991, 2048, 8)), "and those at its place of each node"
    assert len(last.replicas((3, 12), None)) == 256, "copies of a stage's dense parameters"
    assert last.replicas((3, 12), 5) == (389, 453, 1541, 1605), "copies of its experts"
    assert [last.line(127)[position] for position in (0, 1, 15)] == [127, 255, 2047]


def test_context_ranks_work_on_the_same_sequences_and_may_share_an_expert_group():
    ranks = world(1, 2, 4, 8)
    assert [mesh.data_rank for mesh in ranks] == [0] * 4 + [1] * 4
    assert ranks[5].expert_ranks() == tuple(range(8))


@given(worlds())
def test_every_kind_of_set_divides_the_world(ranks):
    everyone = list(range(len(ranks)))
    for sets in (
        {mesh.expert_ranks() for mesh in ranks},
        {mesh.in_node() for mesh in ranks},
        {mesh.line(mesh.rank % mesh.width) for mesh in ranks},
        {mesh.replicas([mesh.pipeline_rank], None) for mesh in ranks},
        {mesh.replicas([mesh.pipeline_rank], mesh.expert_rank) for mesh in ranks},
    ):
        assert sorted(rank for each in sets for rank in each) == everyone


@given(worlds())
def test_members_of_a_set_agree_on_it(ranks):
    for mesh in ranks:
        group = [ranks[rank] for rank in mesh.expert_ranks()]
        assert [other.expert_rank for other in group] == list(range(mesh.expert))
        assert {(other.expert_ranks(), other.pipeline_rank) for other in group} == {
            (mesh.expert_ranks(), mesh.pipeline_rank)
        }
        line = [ranks[rank] for rank in mesh.line(mesh.rank % mesh.width)]
        assert [other.pipeline_rank for other in line] == list(range(mesh.pipeline))
        assert {(other.data_rank, other.expert_rank) for other in line} == {(mesh.data_rank, mesh.expert_rank)}


@given(worlds())
def test_a_token_s_way_leads_to_every_rank_of_its_expert_group(ranks):
    """First to a rank at its place of another node, then to a rank of that node."""
    size = ranks[0].expert
    for places in (each for each in range(1, size + 1) if size % each == 0):
        nodes = [replace(mesh, node_size=places) for mesh in ranks]
        for mesh in nodes:
            assert mesh.rank in mesh.in_node() and mesh.rank in mesh.across_nodes()
            reached = [rank for halfway in mesh.across_nodes() for rank in nodes[halfway].in_node()]
            assert tuple(reached) == mesh.expert_ranks()


@given(worlds(), st.data())
def test_an_expert_and_its_replicas_lie_at_one_place_of_every_group(ranks, data):
    mesh = data.draw(st.sampled_from(ranks))
    positions = data.draw(st.sets(st.integers(0, mesh.pipeline - 1), min_size=1))
    expected = [
        other.rank for other in ranks if other.pipeline_rank in positions and other.expert_rank == mesh.expert_rank
    ]
    assert list(mesh.replicas(positions, mesh.expert_rank)) == expected


def members(pipeline, data, expert):
    """Sums of the ranks over each group that this rank is in: of its experts, to the right and to the left."""
    mesh = Mesh(pipeline, data, 1, expert, dist.get_rank(), 4)
    mesh.connect()
    groups = [mesh.group(mesh.expert_ranks(), "all-to-all")]
    if pipeline > 1:
        groups += [mesh.travel(0, 1), mesh.travel(1, 0)]
        assert groups[1] is not groups[2], "a direction of travel has a group of its own"
        assert mesh.travel(0, pipeline - 1) is groups[1]
    totals = []
    for group in groups:
        total = torch.tensor(10**mesh.rank)  # a digit for each rank
        dist.all_reduce(total, group=group)
        totals.append(int(total))
    return totals


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ((2, 2, 2), [[11, 101, 101], [11, 1010, 1010], [1100, 101, 101], [1100, 1010, 1010]]),
        ((2, 2, 1), [[1, 101, 101], [10, 1010, 1010], [100, 101, 101], [1000, 1010, 1010]]),
        ((4, 1, 1), [[1, 1111, 1111], [10, 1111, 1111], [100, 1111, 1111], [1000, 1111, 1111]]),
        ((1, 4, 2), [[11], [11], [1100], [1100]]),
        ((1, 4, 4), [[1111]] * 4),
    ],
)
def test_groups_reach_their_members(workers, layout, expected):
    assert workers(4).run(members, *layout) == expected


# ---------------------------------------------------------------- SMs
class NCCL:
    """What torch has where it has NCCL."""

    class Options:
        def __init__(self):
            self.config = SimpleNamespace(min_ctas=None, max_ctas=None)
            self._timeout = None


def test_every_group_gets_its_share_of_the_gpu_where_nccl_carries_it(monkeypatch):
    made = []
    monkeypatch.setattr(dist, "ProcessGroupNCCL", NCCL, raising=False)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda ranks, **options: made.append(options))
    mesh = Mesh(2, 2, 1, 2, 0, 1, timedelta(seconds=7), comm_sms=20)
    mesh.connect()
    mesh.connect_nodes()
    assert len(made) == 2 + 2 * 2 + 4 + 2
    assert [each["pg_options"].config.max_ctas for each in made] == [20] * len(made)
    assert {each["pg_options"].config.min_ctas for each in made} == {None}, "NCCL's own"
    assert {each["pg_options"]._timeout for each in made} == {each["timeout"] for each in made} == {mesh.timeout}
    assert len({id(each["pg_options"]) for each in made}) == len(made), "torch writes the group's name into them"


@pytest.mark.parametrize(("backend", "sms"), [("gloo", 20), ("nccl", None)])
def test_other_groups_get_no_options(backend, sms):
    assert communicator_options(backend, sms) is None


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL")
def test_torch_takes_the_number_of_sms():
    options = communicator_options("nccl", 20, timedelta(seconds=7))
    assert options.config.max_ctas == 20 and options._timeout == timedelta(seconds=7)
