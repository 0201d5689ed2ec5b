"""Dispatch through DeepEP's buffers is the local permutation of all tokens, against a strict model of these buffers.

The judge of results is `LocalExperts` on the tokens of all ranks end to end. Rows and gradients of rows are equal to
the bit. Sums are, for tokens whose sums BF16 holds exactly; else they are rounded twice. T tokens of a rank, D width.
"""

import pytest
import torch
import torch.distributed as dist

from kernels.fp8.formats import ROWS, dequantize, quantize
from parallel.errors import UserError
from parallel.experts import LocalExperts, Tag, build, choose, deepep
from tests.parallel.deepep_model import installed
from tests.parallel.test_experts import every_direction, padded_to
from tests.parallel.test_hierarchical import CASES, EXPERTS, connected, end_to_end, tokens_of

WIDTH, ALIGN = 256, 16
EXACT = {"rows", "weights", "drows", "dweights"}


def made_of(case, ranks, fp8, whole_numbers):
    """Each rank's tokens in BF16; in FP8 of values that it holds; whole numbers are -1, 0 and 1, weights 1 or 1/2."""
    made = tokens_of(case, ranks, torch.bfloat16, WIDTH)
    for own in made:
        if whole_numbers:
            own.x_TD, own.dy_TD = (x.float().clamp(-1, 1).round().bfloat16() for x in (own.x_TD, own.dy_TD))
            own.weights_TK = own.weights_TK.round() / 2 + 0.5
        if fp8:
            own.x_TD, own.dy_TD = (dequantize(*quantize(x, ROWS, True), ROWS, x.dtype) for x in (own.x_TD, own.dy_TD))
    return made


def through(fp8, whole_numbers, align, nvl_peers):
    """For each case: results, counts, effects in words, log, bytes sent and host waits, on this rank."""
    size, found = dist.get_world_size(), {}
    with installed(nvl_peers) as model:
        mesh = connected(max(size // nvl_peers, 1))
        mesh.comm_sms = 24
        dispatcher = build("deepep", mesh, EXPERTS, fp8, align=align)
        assert model.num_sms == 24
        for case in CASES:
            own = made_of(case, size, fp8, whole_numbers)[mesh.rank]
            dispatcher.log.clear()
            dispatcher.traffic.clear()
            model.host_waits = 0
            results, counts, effects = every_direction(dispatcher, own)
            said = [(type(each).__name__, each.name) for each in effects]
            sent = dict(dispatcher.traffic.inside), dict(dispatcher.traffic.across)
            found[case] = results, counts, said, list(dispatcher.log), sent, model.host_waits
    return found


@pytest.mark.parametrize(("ranks", "nvl_peers"), [(2, 8), (4, 8), (4, 2)])
@pytest.mark.parametrize("whole_numbers", [True, False], ids=["exact", "rounded"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_results_are_those_of_one_rank_with_all_experts(workers, ranks, nvl_peers, whole_numbers, fp8):
    align = ALIGN if fp8 == whole_numbers else 1
    parts = workers(ranks).run(through, fp8, whole_numbers, align, nvl_peers)
    for case in CASES:
        expected, counts, _ = every_direction(
            LocalExperts(EXPERTS), end_to_end(made_of(case, ranks, fp8, whole_numbers))
        )
        assert [count for part in parts for count in part[case][1]] == [-(-count // align) * align for count in counts]
        for name, whole in expected.items():
            if name in ("rows", "weights", "drows"):
                whole = padded_to(align, whole, counts)
            got = torch.cat([part[case][0][name] for part in parts])
            assert got.dtype == whole.dtype and got.shape == whole.shape, (case, name)
            if name in EXACT or whole_numbers or CASES[case] == 1:
                assert torch.equal(got, whole), (case, name)
            torch.testing.assert_close(got.float(), whole.float(), rtol=2**-7, atol=2**-7 * CASES[case])


@pytest.mark.parametrize(("ranks", "nvl_peers"), [(2, 8), (4, 2)])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_one_host_wait_and_the_bytes_of_the_routing_table(workers, ranks, nvl_peers, fp8):
    """A token has one copy for each rank that it chose: from node to node at the same place, else on a node's links."""
    parts = workers(ranks).run(through, fp8, True, 1, nvl_peers)
    row = WIDTH + 4 * WIDTH // 128 if fp8 else 2 * WIDTH
    for case, chosen in CASES.items():
        for rank, own in enumerate(made_of(case, ranks, fp8, True)):
            _, _, said, log, (inside, across), host_waits = parts[rank][case]
            directions = ["dispatch", "combine", "combine_backward", "dispatch_backward"]
            assert said == [("HostSync", "counts"), *(("Comm", name) for name in directions)] and host_waits == 1
            assert log == [Tag(name, 1, 2, 3) for name in directions]
            to = [set(token) for token in (own.experts_TK // (EXPERTS // ranks)).tolist()]
            fanned = sum(each % nvl_peers != rank % nvl_peers for token in to for each in token)
            nodes = [{each // nvl_peers for each in token} - {rank // nvl_peers} for token in to]
            crossed = sum(map(len, nodes))
            widths = {
                "dispatch": row + 12 * chosen,
                "combine": 2 * WIDTH,
                "combine_backward": row,
                "dispatch_backward": 2 * WIDTH + 4 * chosen,
            }
            assert inside == {name: fanned * width for name, width in widths.items()}
            assert across == {name: crossed * width for name, width in widths.items()}


def told_of_rows():
    """What the limit hears on this rank."""
    heard = []
    with installed():
        mesh = connected(1)
        own = made_of("uneven", mesh.world_size, False, True)[mesh.rank]
        dispatcher = build("deepep", mesh, EXPERTS, align=ALIGN, limit=lambda *said: heard.append(said))
        results, _, _ = every_direction(dispatcher, own)
    return heard, int((results["weights"] != 0).sum())


def test_rows_are_told_before_they_are_made_without_those_of_padding(workers):
    for heard, rows in workers(2).run(told_of_rows):
        assert heard == [(rows, "receive", Tag("dispatch", 1, 2, 3))]


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(("expert", "node_size"), [(2, 2), (8, 8), (4, 8), (16, 8), (160, 8)])
def test_groups_that_the_kernels_serve(expert, node_size):
    assert choose("deepep", expert, node_size) == "deepep"


@pytest.mark.parametrize(("expert", "node_size"), [(1, 8), (3, 3), (8, 4), (4, 6), (16, 4), (40, 8), (320, 8)])
def test_other_groups_are_refused(expert, node_size):
    with pytest.raises(UserError, match=f"^parallel.dispatch=deepep: parallel.expert={expert} on .*; expected 2, 4"):
        choose("deepep", expert, node_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 200}, "model.hidden_size=200: expected a multiple of 256 up to 7936 with"),
        ({"width": 8192}, "model.hidden_size=8192: expected a multiple of 256 up to 7936 with"),
        ({"chosen": 33}, "model.num_experts_per_tok=33: expected at most 32 with"),
        ({"precision": "fp32"}, "precision=fp32: expected fp8 or bf16 with"),
        ({"sms": 21}, "parallel.comm_sms=21: expected an even number from 4 to 132 with"),
    ],
)
def test_models_that_the_kernels_do_not_serve_are_refused(change, message):
    fits = {"width": 7168, "chosen": 8, "precision": "fp8", "sms": 20}
    deepep.check_model(**fits)
    with pytest.raises(UserError, match=f"^{message} parallel.dispatch=deepep$"):
        deepep.check_model(**{**fits, **change})


def test_it_is_refused_without_a_gpu_and_without_the_package(monkeypatch):
    with pytest.raises(UserError, match=r"^parallel.dispatch=deepep: needs GPUs.*; expected auto"):
        deepep.check_device(torch.device("cpu"))
    monkeypatch.setattr(deepep.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^parallel.dispatch=deepep: needs the package deep_ep.*; expected auto"):
        deepep.check_device(torch.device("cuda"))
