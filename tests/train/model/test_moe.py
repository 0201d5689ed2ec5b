"""What a MoE layer's dispatch and experts hold at most, by docs/explanations/experts.md, and that padding is nothing.

Memory is what torch's CPU allocator was asked for, temporaries included. Exchanges are copies here: what a backend
holds of its own is not counted. T tokens, K chosen experts, R rows, D width, F expert width.
"""

from concurrent.futures import Future
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from kernels.linear import Numerics, attach_main_grads
from parallel.experts import build
from parallel.experts.local import Nothing
from parallel.mesh import Mesh
from parallel.passes import Comm, Microbatch, live_after, merge
from train.model.config import ModelConfig
from train.model.layer import Layer
from train.model.moe import Experts

T, K, EXPERTS = 512, 4, 8
MARK = 54321  # bytes that nobody else asks for


class Here:
    """A thread that is none: what is allocated on another one is not seen."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def copied(output, rows, *_, **__):
    """The exchange of a group of one."""
    output.copy_(rows)
    return Nothing()


@dataclass
class MoE:
    """The segments of a layer between its router and its residual sum, on tokens of a rank that is alone."""

    choice: str
    width: int
    inner: int
    align: int

    def __post_init__(self):
        mesh = Mesh(1, 1, 1, 1, 0, 1)
        mesh.connect()
        dispatcher = build(self.choice, mesh, EXPERTS, align=self.align)
        if self.choice == "hierarchical":
            dispatcher.thread = Here()
        sizes = {"hidden_size": self.width, "moe_intermediate_size": self.inner, "n_routed_experts": EXPERTS}
        groups = {"num_experts_per_tok": K, "n_group": 1, "topk_group": 1, "n_shared_experts": 0}
        config = ModelConfig(**sizes, **groups, num_attention_heads=1, first_k_dense_replace=0)
        self.numerics = Numerics("fp32")
        layer = Layer(config, 0, self.numerics, 0, EXPERTS)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        attach_main_grads(layer, torch.float32)
        self.segments = [each for each in layer.segments(dispatcher) if each.name in ("dispatch", "experts", "combine")]
        self.experts_TK = torch.rand(T, EXPERTS).argsort(1)[:, :K]
        self.weights_TK = torch.rand(T, K)
        self.x, self.dy = torch.randn(2, 1, T, self.width)

    def forward(self, tape):
        values = {"normed": self.x, "hidden": self.x, "weights": self.weights_TK, "experts": self.experts_TK}
        for segment, live in zip(self.segments, live_after(self.segments), strict=True):
            tape.append((segment, (yield from segment.forward(values, Microbatch(0, None), 0))))
            for name in values.keys() - live:
                del values[name]

    def backward(self, tape):
        """As `parallel.passes.backward`."""
        grads = {"routed": self.dy}
        while tape:
            segment, record = tape.pop()
            for effect in segment.backward(record, grads, Microbatch(0, None), 0):
                if isinstance(effect, Comm) and self.numerics.weight_grads.now:
                    self.numerics.weight_grads.run()
                yield effect

    def step(self):
        tape = []
        merge(self.forward(tape))
        torch.empty(MARK, dtype=torch.uint8)
        merge(self.backward(tape))

    def measure(self):
        """Bytes: kept from forward to backward, most in forward, most in backward."""
        self.step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step()
        events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
        live, most, found = 0, 0, []
        for event in sorted(events, key=lambda each: each.start_ns()):
            if event.nbytes() == MARK:
                found, most = [live, most], 0
            live += event.nbytes()
            most = max(most, live)
        assert live == 0, "all is given back"
        return [*found, most]


def formula(choice: str, width: int, inner: int, rows: int) -> list[int]:
    """The same by docs/explanations/experts.md, in FP32; every token reaches one node."""
    D, F, b, R = width, inner, 4, rows
    exchanged = {"local": 0, "all_to_all": 2, "hierarchical": 2}[choice]
    returned = {"local": 0, "all_to_all": 2, "hierarchical": 3}[choice]
    sums = T * D * (4 + b) if choice == "local" else T * D * (4 + 2 * b) if choice == "hierarchical" else 0
    kept = R * (D + 3 * F) * b
    home = R * ((3 + returned) * D + 3 * F) * b + (sums if choice == "hierarchical" else 0)
    return [kept, kept + R * (1 + exchanged) * D * b + sums, max(R * (2 * D + 8 * F) * b, home)]


@pytest.mark.parametrize(("width", "inner"), [(256, 192), (512, 64)], ids=["experts cost more", "rows cost more"])
@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("choice", ["local", "all_to_all", "hierarchical"])
def test_memory_is_what_the_formula_says(workers, monkeypatch, choice, align, width, inner):
    monkeypatch.setattr(dist, "all_to_all_single", copied)

    def measured():
        torch.manual_seed(0)
        moe = MoE(choice, width, inner, align)
        rows = sum(-(-count // align) * align for count in torch.bincount(moe.experts_TK.flatten()).tolist())
        return moe.measure(), rows

    [(found, rows)] = workers(1).run(measured)
    expected = formula(choice, width, inner, rows)
    assert found == pytest.approx(expected, rel=0.05), [a / b for a, b in zip(found, expected, strict=True)]


# ---------------------------------------------------------------- padding
@pytest.mark.parametrize("align", [16, 128])
@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp64"])
def test_padding_changes_neither_results_nor_gradients(precision, align):
    """Not even the scales of weight gradients' tiles, which run over the rows of an expert."""
    counts = [5, 0, 130, 16]
    padded_counts = [-(-count // align) * align for count in counts]
    config = ModelConfig(hidden_size=128, moe_intermediate_size=64, n_routed_experts=len(counts))
    generator = torch.Generator().manual_seed(0)
    plain, weights, douts = (torch.randn(sum(counts), each, generator=generator) for each in (128, 1, 128))

    def filled(rows):
        parts = zip(rows.split(counts), padded_counts, strict=True)
        return torch.cat([torch.cat([part, part.new_zeros(n - len(part), rows.shape[1])]) for part, n in parts])

    def run(rows, weights, douts, counts):
        numerics = Numerics(precision)
        experts = Experts(config, numerics, 0, len(counts))
        for number, parameter in enumerate(experts.parameters()):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
        attach_main_grads(experts, numerics.main_grad_dtype)
        rows, weights = rows.to(numerics.dtype).requires_grad_(), weights[:, 0].to(numerics.wide).requires_grad_()
        out = experts(rows, weights, counts)
        out.backward(douts.to(numerics.dtype))
        numerics.weight_grads.run()
        return [out.detach(), rows.grad, weights.grad.unsqueeze(1)], [each.main_grad for each in experts.parameters()]

    by_row, by_weight = run(plain, weights, douts, counts)
    by_row_too, by_weight_too = run(*map(filled, (plain, weights, douts)), padded_counts)
    for one, other in zip(by_row, by_row_too, strict=True):
        assert torch.equal(filled(one), other) or precision == "fp64"
        torch.testing.assert_close(filled(one), other, rtol=1e-12, atol=1e-12)
    for one, other in zip(by_weight, by_weight_too, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
