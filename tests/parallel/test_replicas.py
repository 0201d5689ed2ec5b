"""Every parameter lies in one bucket, over exactly the ranks that hold it, in an order on which they agree.

The judge walks all ranks of a layout and sees who holds what: no arithmetic on ranks. Stages are the real ones, on the
meta device; process groups are stand-ins that remember their ranks (tests/train/test_layouts.py has real ones).
"""

from collections import Counter, defaultdict
from functools import cache

import pytest
import torch

from kernels.linear import Numerics
from parallel import schedule
from parallel.experts import LocalExperts
from parallel.experts.shard import share_of
from parallel.mesh import Mesh
from parallel.replicas import buckets
from tests.train.layouts import LAYOUTS, small_recipe
from train.compose import compose
from train.model.stage import EMBEDDING, build, embedding_stages, split_layers

MORE = {
    **LAYOUTS,
    "dualpipe 4, data 4, expert 2": {"schedule": "dualpipe", "pipeline": 4, "data": 4, "expert": 2},
    "1f1b 2, data 4, expert 4": {"pipeline": 2, "data": 4, "expert": 4},
}


class Group:
    """Stands for a process group."""

    def __init__(self, ranks):
        self.ranks = tuple(ranks)


def seen_by(rank, recipe):
    """A rank's stages by number, its buckets, and the groups that it made, in order."""
    parallel, model, made = recipe.parallel, recipe.model, []
    program = schedule.build(parallel.schedule, parallel.pipeline, recipe.microbatches(recipe.train.batch.start))
    tied = {EMBEDDING: embedding_stages(model, program.stages)}
    layers, local = split_layers(model, program.stages), model.n_routed_experts // parallel.expert
    mesh = Mesh(parallel.pipeline, parallel.data, 1, parallel.expert, rank, parallel.world_size)
    held, experts = program.placement[mesh.pipeline_rank], (mesh.expert_rank * local, local)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr("torch.distributed.get_backend", lambda: "gloo")
        patch.setattr("torch.distributed.new_group", lambda ranks, **options: made.append(ranks) or Group(ranks))
        stages = build(model, Numerics("bf16"), LocalExperts(model.n_routed_experts), held, layers, experts)
        stages = dict(sorted(stages.items(), reverse=rank % 2 == 1))  # the order in which a rank holds them is its own
        return stages, buckets(mesh, program.placement, stages, tied), made


@cache
def world(name, depths=1):
    """What every rank of a layout sees; where it is one expert group, of two of them."""
    layout = MORE[name] | ({"data": 8} if name.startswith("data") else {})
    recipe = small_recipe(layout, "bf16", num_nextn_predict_layers=depths)
    return [seen_by(rank, recipe) for rank in range(recipe.parallel.world_size)]


def identity(name, parameter):
    """What makes two ranks' parameters copies of each other."""
    share = share_of(parameter)
    return name, share.first if share else None


@pytest.mark.parametrize("name", MORE)
def test_each_parameter_is_in_one_bucket(name):
    for stages, made, _ in world(name):
        bucketed = Counter(id(parameter) for bucket in made for parameter in bucket.parameters.values())
        held = {id(parameter) for stage in stages.values() for parameter in stage.parameters()}
        assert set(bucketed.values()) == {1} and bucketed.keys() == held
        for bucket in made:
            kinds = {share_of(parameter) is not None for parameter in bucket.parameters.values()}
            assert kinds == {bucket.kind == "experts"}


@pytest.mark.parametrize("name", MORE)
def test_a_bucket_spans_the_ranks_that_hold_its_parameters(name):
    holders = defaultdict(set)
    for rank, (stages, *_) in enumerate(world(name)):
        for stage in stages.values():
            for key, parameter in stage.named_parameters():
                holders[identity(key, parameter)].add(rank)
    for rank, (_, made, _) in enumerate(world(name)):
        for bucket in made:
            assert rank in bucket.ranks and bucket.group.ranks == bucket.ranks
            for key, parameter in bucket.parameters.items():
                assert holders[identity(key, parameter)] == set(bucket.ranks), key


@pytest.mark.parametrize("name", MORE)
def test_members_of_a_bucket_flatten_it_alike_and_meet_in_one_order(name):
    flattened, orders = {}, []
    for _, made, _ in world(name):
        orders.append([(bucket.ranks, bucket.kind, bucket.stages) for bucket in made])
        for bucket in made:
            contents = [identity(*item) for item in bucket.parameters.items()]
            assert flattened.setdefault((bucket.ranks, bucket.kind, bucket.stages), contents) == contents
    for one in orders:
        for other in orders:
            common = set(one) & set(other)
            assert [key for key in one if key in common] == [key for key in other if key in common]


@pytest.mark.parametrize("name", MORE)
def test_every_rank_makes_all_groups_in_one_order(name):
    first, *others = (made for *_, made in world(name))
    assert all(made == first for made in others)


def ranks_of(name, key, depths=1):
    """The replica set of a parameter, experts of each place in a group on their own."""
    made = [bucket for _, each, _ in world(name, depths) for bucket in each]
    return {bucket.ranks for bucket in made if any(key in parameter for parameter in bucket.parameters)}


def test_mirrored_stages_of_dualpipe_are_copies():
    """Stage s lies on ranks s and P-1-s."""
    assert ranks_of("dualpipe 4", "layers.0.") == {(0, 3)}
    assert ranks_of("dualpipe 4", "lm_head") == {(0, 3)}
    assert ranks_of("dualpipe 4", "layers.3.") == {(1, 2)}
    data, name = (0, 1, 2, 3), "dualpipe 2, data 2, expert 2"
    assert ranks_of(name, "layers.2.self_attn") == {data}
    assert ranks_of(name, "layers.2.mlp.experts") == {(0, 2), (1, 3)}


def test_deepseek_v3_has_256_copies_of_what_is_dense_and_4_of_each_expert():
    """On 2,048 GPUs (report, section 3.2). The same ranks hold stages r and 15-r: a bucket of each and kind."""
    _, made, _ = seen_by(5 * 128 + 70, compose(["recipe=v3", "data.path=none"]))
    sizes = [("dense", 256), ("experts", 4)]
    assert sorted((bucket.kind, len(bucket.ranks)) for bucket in made) == [size for size in sizes for _ in range(2)]
    elements = sum(parameter.numel() for bucket in made for parameter in bucket.parameters.values())
    assert elements == 2 * 4 * 409_157_632, "two stages of four MoE layers with 4 of 256 experts each"


def test_the_tied_embedding_is_one_tensor_on_a_rank_and_one_replica_set_across_ranks():
    assert ranks_of("1f1b 4", EMBEDDING) == {(0, 3)}
    assert ranks_of("1f1b 4", "layers.0.") == {(0,)} and ranks_of("1f1b 4", "lm_head") == {(3,)}
    assert ranks_of("1f1b 2, data 4, expert 4", EMBEDDING) == {tuple(range(8))}
    assert ranks_of("dualpipe 4", EMBEDDING) == {(0, 3)}
    stages, _, _ = world("dualpipe 4")[0]
    assert stages[0].model.embed_tokens.weight is stages[3].model.embed_tokens.weight


def test_without_mtp_the_embedding_belongs_to_the_first_stage():
    assert ranks_of("1f1b 4", EMBEDDING, depths=0) == {(0,)}
    stages, _, _ = world("1f1b 4", 0)[3]
    assert EMBEDDING not in dict(stages[3].named_parameters())
