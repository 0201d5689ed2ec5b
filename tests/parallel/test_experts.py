"""All-to-all over an expert group is the local permutation of all its tokens, bit for bit, in all four directions.

The judge of `AllToAll` is `LocalExperts` on the tokens of all ranks end to end; the judge of `LocalExperts` is the
definition, token by token. T tokens of a rank, K chosen experts, R rows, D width.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist

from parallel.experts import AllToAll, LocalExperts, Tag, build
from parallel.experts.shard import expert_shard, global_shape, global_span
from parallel.mesh import Mesh
from parallel.passes import Comm

EXPERTS, CHOSEN, WIDTH = 8, 3, 5
CASES = ["uneven", "an expert with none", "all to one expert", "all to the last rank", "a rank without tokens"]


@dataclass
class Tokens:
    """What the four directions start from, of one rank or of all end to end."""

    x_TD: torch.Tensor
    weights_TK: torch.Tensor
    experts_TK: torch.Tensor
    dy_TD: torch.Tensor


def tokens(case: str, ranks: int, dtype: torch.dtype) -> list[Tokens]:
    """Each rank's tokens: random, of unlike numbers, routed as the case says."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    made = []
    for rank in range(ranks):
        count = 0 if case == "a rank without tokens" and rank == 1 else 7 + 4 * rank
        experts = torch.rand(count, EXPERTS, generator=generator).argsort(1)[:, :CHOSEN]
        if case == "an expert with none":
            experts[experts == 2] = 3
        elif case == "all to one expert":
            experts[:] = 5
        elif case == "all to the last rank":
            experts = EXPERTS - 1 - experts % (EXPERTS // ranks)
        x, dy = (torch.randn(count, WIDTH, generator=generator).to(dtype) for _ in range(2))
        made.append(Tokens(x, torch.rand(count, CHOSEN, generator=generator), experts, dy))
    return made


def every_direction(dispatcher, own: Tokens):
    """Rows go, are worked on, and return; gradients likewise. Returns what arrives each time, and all effects."""
    effects = []

    def run(direction, *arguments):
        passing = getattr(dispatcher, direction)(*arguments, Tag(direction, 1, 2, 3))
        try:
            while True:
                effects.append(next(passing))
                effects[-1].work.wait()
        except StopIteration as end:
            return end.value

    rows, weights, layout = run("dispatch", own.x_TD, own.weights_TK, own.experts_TK)
    y = run("combine", layout, worked_on(rows, weights))
    drows = run("combine_backward", layout, own.dy_TD)
    dx, dweights = run("dispatch_backward", layout, worked_on(drows, weights), weights * 3)
    results = {"rows": rows, "weights": weights, "y": y, "drows": drows, "dx": dx, "dweights": dweights}
    return results, layout.counts, effects


def worked_on(rows, weights):
    """What experts might make of rows: uneven in every row, rounded."""
    return (rows.float() * weights.unsqueeze(1)).to(rows.dtype)


def end_to_end(made: list[Tokens]) -> Tokens:
    return Tokens(*(torch.cat([getattr(each, name) for each in made]) for name in Tokens.__dataclass_fields__))


def through_all_to_all(case, dtype):
    made = tokens(case, dist.get_world_size(), dtype)
    dispatcher = AllToAll(EXPERTS, dist.group.WORLD)
    results, counts, effects = every_direction(dispatcher, made[dist.get_rank()])
    described = [
        (type(each).__name__, each.name, getattr(each, "bytes", None), getattr(each, "group", None) is dist.group.WORLD)
        for each in effects
    ]
    return results, counts, described, dispatcher.log


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_to_all_is_the_local_permutation_of_all_tokens(workers, ranks, case, dtype):
    made = tokens(case, ranks, dtype)
    expected, counts, _ = every_direction(LocalExperts(EXPERTS), end_to_end(made))
    parts = workers(ranks).run(through_all_to_all, case, dtype)
    assert [count for _, own, _, _ in parts for count in own] == counts, "rows of each expert"
    for name, whole in expected.items():  # rows lie by expert, tokens by rank: both end to end are the whole
        assert torch.equal(torch.cat([results[name] for results, *_ in parts]), whole), name
    for own, (results, *_) in zip(made, parts, strict=True):
        assert results["y"].shape == results["dx"].shape == own.x_TD.shape
        assert results["y"].dtype == dtype and results["dweights"].dtype == torch.float32


# ---------------------------------------------------------------- padding
def padded_to(align, rows, counts):
    """Each expert's rows, then zeros up to a multiple of `align`."""
    parts = [(part, part.new_zeros(-len(part) % align, *part.shape[1:])) for part in rows.split(counts)]
    return torch.cat([piece for pair in parts for piece in pair])


def check_padding(align, plain, filled):
    """The same but for rows of zeros after each expert's; what returns to the tokens knows nothing of them."""
    (expected, counts, sent), (results, padded_counts, sent_too) = plain, filled
    assert padded_counts == [-(-count // align) * align for count in counts]
    for name, value in expected.items():
        padded = name in ("rows", "weights", "drows")
        assert torch.equal(results[name], padded_to(align, value, counts) if padded else value), name
    assert sent == sent_too, "padding does not travel"


def with_and_without(align, dispatcher, own):
    """Results, counts and bytes in flight of `dispatcher(1)` and `dispatcher(align)`."""
    found = [every_direction(dispatcher(each), own) for each in (1, align)]
    return [(results, counts, [getattr(each, "bytes", 0) for each in effects]) for results, counts, effects in found]


@pytest.mark.parametrize("align", [3, 16])
@pytest.mark.parametrize("case", CASES)
def test_padding_of_the_local_permutation(case, align):
    own = end_to_end(tokens(case, 2, torch.float32))
    check_padding(align, *with_and_without(align, partial(LocalExperts, EXPERTS), own))


def through_both(align, fp8):
    """Each dispatcher and case on this rank of two nodes."""
    size = dist.get_world_size()
    mesh = Mesh(1, size, 1, size, dist.get_rank(), size // 2)
    mesh.connect()
    made = {choice: partial(build, choice, mesh, EXPERTS, fp8, 2) for choice in ("all_to_all", "hierarchical")}
    of_case = {case: tokens(case, size, torch.bfloat16 if fp8 else torch.float32)[mesh.rank] for case in CASES}
    return [with_and_without(align, each, own) for each in made.values() for own in of_case.values()]


@pytest.mark.parametrize("fp8", [False, True])
def test_padding_of_what_has_travelled(workers, fp8):
    for part in workers(4).run(through_both, 16, fp8):
        for pair in part:
            check_padding(16, *pair)


@pytest.mark.parametrize("case", CASES)
def test_what_is_in_flight_is_said(workers, case):
    """Every rank yields the same effects in the same order, also if it has nothing to send."""
    made = tokens(case, 2, torch.float32)
    parts = workers(2).run(through_all_to_all, case, torch.float32)
    away = [int((own.experts_TK // (EXPERTS // 2) != rank).sum()) for rank, own in enumerate(made)]
    for rank, (_, _, described, log) in enumerate(parts):
        out, back = away[rank], away[1 - rank]  # what stays on the rank is not in flight
        row, weight = 4 * WIDTH, 4
        assert described == [
            ("HostSync", "counts", None, False),
            ("Comm", "dispatch", out * (row + weight), True),
            ("Comm", "combine", back * row, True),
            ("Comm", "combine_backward", out * row, True),
            ("Comm", "dispatch_backward", back * (row + weight), True),
        ]
        issued = ["counts", "dispatch", "combine", "combine_backward", "dispatch_backward"]
        assert log == [Tag(operation, 1, 2, 3) for operation in issued]


@pytest.mark.parametrize("case", CASES)
def test_the_local_permutation_is_the_definition(case):
    """Rows by expert, then by token and choice; a token gets the sum of its rows in the order of its choices."""
    own = end_to_end(tokens(case, 2, torch.float32))
    results, counts, effects = every_direction(LocalExperts(EXPERTS), own)
    chosen = own.experts_TK.tolist()
    copies = [
        (t, k) for expert in range(EXPERTS) for t in range(len(chosen)) for k in range(CHOSEN) if chosen[t][k] == expert
    ]
    assert counts == [sum(row.count(expert) for row in chosen) for expert in range(EXPERTS)]
    assert torch.equal(results["rows"], torch.stack([own.x_TD[t] for t, _ in copies]))
    assert torch.equal(results["weights"], torch.stack([own.weights_TK[t, k] for t, k in copies]))
    assert torch.equal(results["drows"], torch.stack([own.dy_TD[t] for t, _ in copies]))
    for name, rows in (("y", results["rows"]), ("dx", results["drows"])):
        back = dict(zip(copies, worked_on(rows, results["weights"]), strict=True))
        for t in range(len(chosen)):
            total = back[t, 0]
            for k in range(1, CHOSEN):
                total = total + back[t, k]
            torch.testing.assert_close(results[name][t], total, rtol=1e-6, atol=1e-6)
    assert torch.equal(results["dweights"], own.weights_TK * 3)
    assert all(isinstance(effect, Comm) and effect.bytes == 0 for effect in effects) and len(effects) == 4


def test_a_share_of_experts_knows_its_place_in_the_whole():
    whole = torch.randn(8, 3, 2)
    share = expert_shard(whole[4:6].clone(), 4, 8)
    assert isinstance(share, torch.nn.Parameter) and share.requires_grad
    start, total = global_span(share)
    assert global_shape(share) == whole.shape and total == whole.numel()
    assert torch.equal(whole.flatten()[start:][: share.numel()], share.detach().flatten())
