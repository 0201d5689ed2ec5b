"""Node-limited dispatch gives what one rank with all experts gives, over the slow link as few bytes as can be.

The judge of results is `LocalExperts` on the tokens of all ranks end to end; the judge of bytes is a count from the
routing table. T tokens of a rank, K chosen experts, R rows, D width; W ranks as N nodes.
"""

import time
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kernels.fp8.formats import ROWS, dequantize, quantize, split
from kernels.linear import Numerics
from parallel.errors import UserError
from parallel.experts import LocalExperts, Tag, all_to_all, build, choose, hierarchical
from parallel.experts.local import Nothing
from parallel.experts.lockstep import predict
from parallel.mesh import Mesh
from parallel.passes import merge
from parallel.schedule import Program
from tests.parallel.test_experts import every_direction
from tests.train.layouts import batch_of, small_recipe
from train.engine import Engine
from train.model.config import ModelConfig
from train.model.router import Router

EXPERTS, WIDTH = 16, 5
SMALLEST = 2.0**-22  # scale of a tile whose values are all small
OUT, HOME = ("across", "inside"), ("inside", "across")
# name: experts that a token chooses
CASES = {
    "uneven": 4,
    "one expert": 4,
    "an expert with none": 4,
    "one token": 4,
    "a rank without tokens": 4,
    "no tokens": 4,
    "top-k 1": 1,
    "top-k all": EXPERTS,
    "another node only": 2,
}


@dataclass
class Tokens:
    """What the four directions start from, of one rank or of all end to end."""

    x_TD: torch.Tensor
    weights_TK: torch.Tensor
    experts_TK: torch.Tensor
    dy_TD: torch.Tensor


def tokens_of(case: str, ranks: int, dtype: torch.dtype, width: int = WIDTH) -> list[Tokens]:
    """Each rank's tokens: random, of unlike numbers, routed as the case says."""
    generator = torch.Generator().manual_seed(list(CASES).index(case))
    made, chosen = [], CASES[case]
    for rank in range(ranks):
        count = {"one token": int(rank == ranks - 1), "no tokens": 0}.get(case, 5 + 3 * rank)
        if case == "a rank without tokens" and rank == 1:
            count = 0
        experts = torch.rand(count, EXPERTS, generator=generator).argsort(1)[:, :chosen]
        if case == "one expert":
            experts[:] = 5  # as no router would: all choices of all tokens
        elif case == "an expert with none":
            experts[experts == 2] = 3
        elif case == "another node only":
            experts = ((rank // (ranks // 2) + 1) % 2) * (EXPERTS // 2) + experts % (EXPERTS // 2)
        x, dy = (torch.randn(count, width, generator=generator).to(dtype) for _ in range(2))
        weights = torch.rand(count, chosen, generator=generator)
        made.append(Tokens(x, weights.to(torch.promote_types(dtype, torch.float32)), experts, dy))
    return made


def end_to_end(made: list[Tokens]) -> Tokens:
    return Tokens(*(torch.cat([getattr(each, name) for each in made]) for name in Tokens.__dataclass_fields__))


def connected(nodes: int) -> Mesh:
    """The world as one expert group on so many nodes."""
    size = dist.get_world_size()
    mesh = Mesh(1, size, 1, size, dist.get_rank(), size // nodes)
    mesh.connect()
    return mesh


def through(cases, nodes, chunks, dtype, fp8=False, choice="hierarchical", width=WIDTH):
    """For each case: results, counts, effects in words, log and bytes sent, on this rank."""
    mesh, found = connected(nodes), {}
    dispatcher = build(choice, mesh, EXPERTS, fp8, chunks)
    for case in cases:
        own = tokens_of(case, mesh.world_size, dtype, width)[mesh.rank]
        dispatcher.log.clear()
        dispatcher.traffic.clear()
        results, counts, effects = every_direction(dispatcher, own)
        sizes = [(getattr(each, "bytes", None), getattr(each, "across", None)) for each in effects]
        said = [(type(each).__name__, each.name, *size) for each, size in zip(effects, sizes, strict=True)]
        sent = dict(dispatcher.traffic.inside), dict(dispatcher.traffic.across)
        found[case] = results, counts, said, list(dispatcher.log), sent
    return found


def compare(ranks, nodes, parts, case, dtype):
    """What all ranks got end to end against one rank with all experts."""
    made = tokens_of(case, ranks, dtype)
    expected, counts, _ = every_direction(LocalExperts(EXPERTS), end_to_end(made))
    assert [count for part in parts for count in part[case][1]] == counts, "rows of each expert"
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    for name, whole in expected.items():
        got = torch.cat([part[case][0][name] for part in parts])
        assert got.dtype == whole.dtype and got.shape == whole.shape
        if name in ("rows", "weights", "drows", "dweights") or nodes == 1 or CASES[case] == 1:
            assert torch.equal(got, whole), (case, name)
        torch.testing.assert_close(got, whole, rtol=tolerance, atol=tolerance * EXPERTS, msg=lambda m: f"{case}: {m}")


def check_results(pool, ranks, nodes, chunks, dtype):
    parts = pool.run(through, list(CASES), nodes, chunks, dtype)
    for case in CASES:
        compare(ranks, nodes, parts, case, dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@DTYPES
@pytest.mark.parametrize(
    ("ranks", "nodes", "chunks"), [(2, 1, 1), (2, 2, 1), (2, 2, 3), (4, 1, 2), (4, 2, 1), (4, 2, 3), (4, 4, 1)]
)
def test_results_are_those_of_one_rank_with_all_experts(workers, ranks, nodes, chunks, dtype):
    check_results(workers(ranks), ranks, nodes, chunks, dtype)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize(("nodes", "chunks"), [(1, 1), (2, 1), (4, 1), (4, 4)])
def test_results_on_eight_processes(workers, nodes, chunks, dtype):
    check_results(workers(8), 8, nodes, chunks, dtype)


# ---------------------------------------------------------------- bytes
def least_across(made, ranks, nodes):
    """(token, other node) pairs, from each rank: each token once for each other node that it chose."""
    pairs = []
    for rank, own in enumerate(made):
        home = rank // (ranks // nodes)
        chosen = [{expert // (EXPERTS // nodes) for expert in row} for row in own.experts_TK.tolist()]
        pairs.append(sum(len(each - {home}) for each in chosen))
    return pairs


def copies(made, ranks, nodes):
    """Copies of tokens for experts elsewhere, by sender: (in the same node, in others)."""
    places, local = ranks // nodes, EXPERTS // ranks
    inside, across = [0] * ranks, [0] * ranks
    for rank, own in enumerate(made):
        for expert in own.experts_TK.flatten().tolist():
            target = expert // local
            if target // places != rank // places:
                across[rank] += 1
            elif target != rank:
                inside[rank] += 1
    return inside, across


def relayed(made, ranks, nodes):
    """Copies handed on inside a node, by the rank that hands them on: at the token's place, for an expert elsewhere."""
    places, local = ranks // nodes, EXPERTS // ranks
    handed = [0] * ranks
    for rank, own in enumerate(made):
        for expert in own.experts_TK.flatten().tolist():
            target = expert // local
            if target % places != rank % places:
                handed[target // places * places + rank % places] += 1
    return handed


@pytest.mark.parametrize("chunks", [1, 3])
def test_bytes_are_the_least_possible_and_counted_where_they_are_sent(workers, chunks):
    ranks, nodes = 4, 2
    parts = workers(ranks).run(through, list(CASES), nodes, chunks, torch.float32)
    for case, chosen in CASES.items():
        made = tokens_of(case, ranks, torch.float32)
        pairs, handed = least_across(made, ranks, nodes), relayed(made, ranks, nodes)
        sums = [part[case][4][1] for part in parts]
        row, weight, number = 4 * WIDTH, 4, 2
        for rank in range(ranks):
            inside, across = parts[rank][case][4]
            assert across["dispatch"] == pairs[rank] * (row + chosen * (weight + number)), case
            assert across["combine_backward"] == pairs[rank] * row
            assert inside["dispatch"] == handed[rank] * (row + weight)
            assert inside["combine_backward"] == handed[rank] * row
            [counts] = [said for said in parts[rank][case][2] if said[1] == "dispatch"]
            assert counts[2:] == (inside["dispatch"] + across["dispatch"], across["dispatch"]), (
                "a Comm says what leaves"
            )
        assert sum(each["combine"] for each in sums) == sum(pairs) * row, "each partial sum crosses once"
        assert sum(each["dispatch_backward"] for each in sums) == sum(pairs) * (row + chosen * weight)


def test_flat_bytes_are_one_copy_for_each_expert_elsewhere(workers):
    ranks, nodes = 4, 2
    parts = workers(ranks).run(through, list(CASES), nodes, 1, torch.float32, choice="all_to_all")
    for case in CASES:
        inside, across = copies(tokens_of(case, ranks, torch.float32), ranks, nodes)
        for rank, part in enumerate(parts):
            sent_inside, sent_across = part[case][4]
            row, weight = 4 * WIDTH, 4
            assert sent_inside["dispatch"] == inside[rank] * (row + weight)
            assert sent_across["dispatch"] == across[rank] * (row + weight)
            assert sent_across["combine_backward"] == across[rank] * row


def test_across_nodes_v3_s_routing_sends_half_of_what_a_flat_dispatch_does():
    """8 of 256 experts in 4 of 8 nodes, chosen by the router among random tokens whose homes are spread evenly."""
    config = ModelConfig(
        hidden_size=64, n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=8, initializer_range=0.006
    )
    torch.manual_seed(0)
    router = Router(config, Numerics("fp32"))
    torch.nn.init.normal_(router.weight, std=0.05)
    _, _, experts_TK = router(torch.randn(32768, 64))
    node_TK = experts_TK // 32
    reached_TN = torch.zeros(len(node_TK), 8, dtype=torch.bool).scatter_(1, node_TK, True)
    assert int(reached_TN.sum(1).max()) == 4
    home_T = torch.arange(len(node_TK)) % 8
    once = reached_TN.sum(1) - reached_TN.gather(1, home_T[:, None])[:, 0].long()
    each = (node_TK != home_T[:, None]).sum(1)
    assert abs(float(once.sum() / each.sum()) - 0.496) < 0.004


# ---------------------------------------------------------------- FP8
def in_both_precisions(choice, nodes):
    return [through(["uneven"], nodes, 2, torch.bfloat16, fp8, choice, width=200)["uneven"] for fp8 in (False, True)]


@pytest.mark.parametrize("choice", ["all_to_all", "hierarchical"])
def test_rows_in_fp8_are_half_the_bytes_and_what_quantising_afterwards_gives(workers, choice):
    """Two tiles a row, one of them ragged."""
    for wide, narrow in workers(4).run(in_both_precisions, choice, 2):
        for name in ("rows", "drows"):
            codes, scales = quantize(wide[0][name], ROWS, True)
            assert torch.equal(narrow[0][name], dequantize(codes, scales, ROWS).bfloat16()), name
        assert torch.equal(narrow[0]["weights"], wide[0]["weights"]) and narrow[1] == wide[1]
        for sent_narrow, sent_wide in zip(narrow[4], wide[4], strict=True):
            for operation in ("combine", "dispatch_backward"):
                assert sent_narrow.get(operation) == sent_wide.get(operation), "the way back is BF16"
            assert sent_narrow["combine_backward"] * (2 * 200) == sent_wide["combine_backward"] * (200 + 2 * 4)


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1.0, 3e4, 1e20])
def test_quantising_again_changes_nothing(scale):
    """The codes too are the same, unless the largest of a tile has been rounded down to 224, half of E4M3's largest:
    then scale and codes say the same by another power of two."""
    x = torch.randn(512, 300, generator=torch.Generator().manual_seed(1)).mul(scale).bfloat16()
    codes, scales = quantize(x, ROWS, True)
    dispatched = dequantize(codes, scales, ROWS).bfloat16()
    assert torch.equal(dispatched.float(), dequantize(codes, scales, ROWS)), "BF16 holds them exactly"
    again, again_scales = quantize(dispatched, ROWS, True)
    assert torch.equal(dequantize(again, again_scales, ROWS), dispatched.float())
    halved = again_scales != scales
    largest = split(codes.float(), ROWS).abs().amax((-3, -1)).squeeze(-2)
    assert torch.equal(halved, (largest == 224) & (scales > SMALLEST)) and (halved.any() or scale < 1e-4)
    kept = ~halved.repeat_interleave(128, 1)[:, :300]
    assert torch.equal(again.float()[kept], codes.float()[kept])


# ---------------------------------------------------------------- turns, reads, order
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_direction_is_one_turn_and_the_host_reads_once(workers, chunks):
    for part in workers(4).run(through, ["uneven", "no tokens"], 2, chunks, torch.float32):
        for _, _, said, log, _ in part.values():
            assert [each[:2] for each in said] == [
                ("HostSync", "counts"),
                *(("Comm", each) for each in ("dispatch", "combine", "combine_backward", "dispatch_backward")),
            ]
            hops = {"dispatch": OUT, "combine": HOME, "combine_backward": OUT, "dispatch_backward": HOME}
            expected = [f"{name}.{hop}" for name, way in hops.items() for hop in way for _ in range(chunks)]
            assert [tag.operation for tag in log] == ["counts", *expected]


class Here:
    """A thread that is none."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def read_by_the_host(choice, fp8):
    """Reads of row counts in a real exchange, and in one of tensors without values that is told what the first read."""
    dispatcher = build(choice, connected(2), EXPERTS, fp8, 2)
    own = tokens_of("uneven", 4, torch.bfloat16)[dist.get_rank()]
    owner = {"hierarchical": hierarchical, "all_to_all": all_to_all}[choice]
    real, told, real_exchange = owner.host_counts, [], dist.all_to_all_single
    try:
        owner.host_counts = lambda counts: told.append(real(counts)) or told[-1]
        every_direction(dispatcher, own)
        first = len(told)
        owner.host_counts = lambda counts: told.append(None) or told[0]
        dist.all_to_all_single = lambda *args, **kwargs: Nothing()
        dispatcher.thread = Here()  # the mode is this thread's
        with FakeTensorMode() as mode:
            there = Tokens(*(mode.from_tensor(getattr(own, name)) for name in Tokens.__dataclass_fields__))
            results, _, _ = every_direction(dispatcher, there)
    finally:
        owner.host_counts, dist.all_to_all_single = real, real_exchange
    return first, len(told) - first, {type(value) for value in results.values()}


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("choice", ["all_to_all", "hierarchical"])
def test_only_the_row_counts_make_the_host_wait_for_the_device(workers, choice, fp8):
    """On fake tensors, which have no values, any other read of one is an error."""
    for seen in workers(4).run(read_by_the_host, choice, fp8):
        assert seen == (1, 1, {FakeTensor})


def sent_inside_before_the_pass_is_resumed():
    dispatcher = build("hierarchical", connected(2), EXPERTS, False, 2)
    own = tokens_of("uneven", 4, torch.float32)[dist.get_rank()]
    passing = dispatcher.dispatch(own.x_TD, own.weights_TK, own.experts_TK, Tag("dispatch", 0, 0, 0))
    next(passing).work.wait()
    comm = next(passing)
    deadline = time.monotonic() + 30
    while not dispatcher.traffic.inside["dispatch"] and time.monotonic() < deadline:
        time.sleep(0.01)
    sent = dispatcher.traffic.inside["dispatch"]
    comm.work.wait()
    return sent


def test_both_hops_are_made_while_the_pass_stands_still(workers):
    """So another pass computes meanwhile."""
    assert all(workers(4).run(sent_inside_before_the_pass_is_resumed))


PAIR = Program("train", 1, 1, 2, ((0,),), ((("F", 0, 0), ("FB", 0, 1, 0, 0), ("B", 0, 1)),))


def a_pair(nodes, chunks):
    """An F&B pair over two layers: (log, prediction, whether results are those of passes that run alone)."""
    dispatcher = build("hierarchical", connected(nodes), EXPERTS, False, chunks)
    own = [tokens_of(case, 4, torch.float32)[dist.get_rank()] for case in ("uneven", "a rank without tokens")]

    def forward(mb):
        results, layouts = [], []
        for layer in (1, 2):
            tag = [Tag(name, 0, mb, layer) for name in ("dispatch", "combine")]
            each = own[mb]
            rows, weights, layout = yield from dispatcher.dispatch(each.x_TD, each.weights_TK, each.experts_TK, tag[0])
            results.append((yield from dispatcher.combine(layout, rows, tag[1])))
            layouts.append((layout, weights))
        return results, layouts

    def backward(mb, layouts):
        results = []
        for layer in (2, 1):
            layout, weights = layouts[layer - 1]
            tag = [Tag(name, 0, mb, layer) for name in ("combine.B", "dispatch.B")]
            drows = yield from dispatcher.combine_backward(layout, own[mb].dy_TD, tag[0])
            results.extend((yield from dispatcher.dispatch_backward(layout, drows, weights, tag[1])))
        return results

    [(_, first)] = merge(forward(0))
    backwards, (forwards, second) = merge(backward(0, first), forward(1))
    merge(backward(1, second))
    log = list(dispatcher.log)
    [alone] = merge(backward(0, first))
    [(alone_forwards, _)] = merge(forward(1))
    same = all(map(torch.equal, [*backwards, *forwards], [*alone, *alone_forwards]))
    visits = {0: [(name, layer) for layer in (1, 2) for name in ("dispatch", "combine")]}
    return log, predict(PAIR, 0, visits, dispatcher.issues), same


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_pair_issues_what_is_predicted_on_all_ranks_and_mixes_nothing_up(workers, chunks):
    parts = workers(4).run(a_pair, 2, chunks)
    for log, predicted, same in parts:
        assert log == predicted == parts[0][0] and same
    assert len(parts[0][0]) == 4 + 32 * chunks


# ---------------------------------------------------------------- in the engine
LAYOUT = {"data": 4, "expert": 4, "node_size": 2}


def losses_of(dispatch, precision, **layout):
    """Two steps: losses and gradient norms, log as predicted, bytes sent, and which dispatcher it was."""
    recipe = small_recipe({**LAYOUT, "dispatch": dispatch, **layout}, precision)
    engine, found = Engine(recipe, torch.device("cpu")), []
    for step in range(2):
        rows, size = batch_of(step, recipe), recipe.train.batch.start
        tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
        totals = engine.forward_backward(tokens if engine.needs_tokens else {}, size, 0.3)
        found.append((totals.losses, engine.update(1e-3, 1e-3, totals)))
    traffic = engine.dispatcher.traffic
    return found, type(engine.dispatcher).__name__, dict(traffic.inside), dict(traffic.across)


FOUR_RANKS = {"schedule": "dualpipe", "pipeline": 2, "data": 2, "expert": 2, "node_size": 1}


@pytest.mark.parametrize("layout", [{}, pytest.param(FOUR_RANKS, marks=pytest.mark.slow)])
def test_a_run_is_the_same_with_either_dispatcher(workers, layout):
    flat, other = (
        workers(4).run(losses_of, dispatch, "fp64", **layout, dispatch_chunks=2) for dispatch in ("all_to_all", "auto")
    )
    for (expected, a, *_), (found, b, *_) in zip(flat, other, strict=True):
        assert (a, b) == ("AllToAll", "Hierarchical")
        for (losses, (_, norm)), (losses_too, (applied, norm_too)) in zip(expected, found, strict=True):
            assert losses_too == pytest.approx(losses, rel=1e-12) and applied
            assert norm_too == pytest.approx(norm, rel=1e-11)
    for operation in ("dispatch", "combine", "dispatch.B", "combine.B"):
        bytes_flat, bytes_once = (sum(part[3][operation] for part in parts) for parts in (flat, other))
        assert bytes_once < bytes_flat, operation


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["all_to_all", "hierarchical"])
def test_sending_fp8_changes_no_bit_of_a_run(workers, dispatch):
    wide, narrow = (
        workers(4).run(losses_of, dispatch, "fp8", dispatch_precision=precision) for precision in ("bf16", "auto")
    )
    assert [part[0] for part in wide] == [part[0] for part in narrow]
    for operation in ("dispatch", "combine.B"):
        assert all(less[3][operation] < 0.65 * more[3][operation] for more, less in zip(wide, narrow, strict=True))


# ---------------------------------------------------------------- the choice
@pytest.mark.parametrize(
    ("choice", "expert", "node_size", "expected"),
    [
        ("auto", 1, 8, "local"),
        ("auto", 8, 8, "all_to_all"),
        ("auto", 4, 8, "all_to_all"),
        ("auto", 64, 8, "hierarchical"),
        ("auto", 6, 4, "all_to_all"),
        ("all_to_all", 64, 8, "all_to_all"),
        ("hierarchical", 8, 8, "hierarchical"),
    ],
)
def test_what_a_layout_gets(choice, expert, node_size, expected):
    assert choose(choice, expert, node_size) == expected


@pytest.mark.parametrize(("choice", "expert", "node_size"), [("local", 2, 8), ("hierarchical", 6, 4)])
def test_what_a_layout_cannot_have(choice, expert, node_size):
    with pytest.raises(UserError, match=f"parallel.dispatch={choice}: expected parallel.expert"):
        choose(choice, expert, node_size)
