"""Passes: the order of a pair is the report's, an exception leaves nothing in flight, memory goes when it can.

The stages here are toys: segments that double and add, and wires that pretend to send. A journal takes down what is
computed, posted and waited for.
"""

import inspect
from dataclasses import dataclass, field

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kernels.linear import WeightGrads
from parallel.passes import Comm, Compute, Local, Microbatch, Sum, add_grad, backward, forward, merge
from parallel.trace import Trace

B, F = "B", "F"


class Journal(list, Trace):
    """Entries ("compute" | "post" | "wait", what, direction)."""

    def lane(self, kind):
        return " ".join(f"{what}({direction})" for entry, what, direction in self if entry == kind)

    def span(self, lane, name, **details):
        """Computations as merge sees them; the residual sums are too small for the figure."""
        if lane == "compute" and not name.startswith("residual"):
            what, dot, direction = name.partition(".")
            if direction != "W":  # the weight gradients themselves write that they run
                self.append(("compute", what, B if dot else F))
        return super().span(lane, name)


class Work:
    """A communication that is only journalled."""

    def __init__(self, journal, what, direction):
        self.journal, self.entry = journal, (what, direction)
        journal.append(("post", *self.entry))

    def wait(self):
        self.journal.append(("wait", *self.entry))


@dataclass
class Wire:
    """Segment: `write` is a copy of `read` once it has arrived; backward copies the gradient."""

    journal: Journal
    name: str
    layer: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def forward(self, values, batch, stage):
        values[self.writes[0]] = yield from self.send(F, values[self.reads[0]])

    def backward(self, record, grads, batch, stage):
        add_grad(grads, self.reads[0], (yield from self.send(B, grads.pop(self.writes[0]))))

    def send(self, direction, value):
        work = Work(self.journal, self.name, direction)
        yield Comm(self.name, work, 0, 0, None)
        return value.clone()


class Weighted(torch.autograd.Function):
    """y = 2 x; its backward leaves behind a weight gradient."""

    @staticmethod
    def forward(ctx, x, name, weights, journal):
        ctx.pending = weights, lambda: journal.append(("compute", name, "W"))
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        weights, gradient = ctx.pending
        weights.now.append(gradient)
        return 2 * dy, None, None, None


@dataclass
class Toy:
    """A stage of `layers` MoE-like layers, or of one computation if there are none."""

    layers: int
    journal: Journal
    index: int = 0
    is_first: bool = False
    is_last: bool = False
    weights: WeightGrads = field(default_factory=WeightGrads)

    def __post_init__(self):
        self.segments = [Local("dense", 0, lambda batch, hidden: (self.weighted("dense", hidden),), *2 * [("hidden",)])]
        if self.layers:
            self.segments = [segment for number in range(self.layers) for segment in self.layer(number)]

    def weighted(self, name, x):
        return Weighted.apply(x, name, self.weights, self.journal)

    def layer(self, number):
        def attention(batch, hidden):
            hidden = self.weighted("attention", hidden)
            return hidden, 3 * hidden

        return [
            Local("attention", number, attention, ("hidden",), ("hidden", "normed")),
            Wire(self.journal, "dispatch", number, ("normed",), ("rows",)),
            Local("mlp", number, lambda batch, rows: (self.weighted("mlp", rows),), ("rows",), ("out_rows",)),
            Wire(self.journal, "combine", number, ("out_rows",), ("routed",)),
            Sum("residual", number, ("hidden", "routed"), ("hidden",)),
        ]


def run_forward(toy, batch=None, hidden=None):
    """A forward alone; returns its result and its tape. The journal starts afresh."""
    tape = []
    (result,) = merge(forward(toy, torch.ones(1) if hidden is None else hidden, batch or Microbatch(0, None), tape))
    toy.journal.clear()
    return result, tape


def pair(journal, forward_layers, backward_layers, split=False):
    """The two passes of an F&B, backward first, not yet begun; and the stage that the backward goes through."""
    upper, lower = Toy(backward_layers, journal), Toy(forward_layers, journal)
    batch = Microbatch(0, None)
    _, tape = run_forward(upper, batch)
    back = backward(upper, torch.ones(1), batch, tape, upper.weights, split)
    return [back, forward(lower, torch.ones(1), Microbatch(1, None), [])], upper


# ---------------------------------------------------------------- the figure
def test_a_pair_runs_in_the_order_of_the_figure():
    journal = Journal()
    passes, upper = pair(journal, 2, 2)
    merge(*passes, trace=journal)
    upper.weights.run()
    # Report, figure 4, from the start of one block to the end of the next.
    block = "mlp(B) mlp(W) mlp(F) attention(B) attention(W)"
    assert journal.lane("compute") == f"attention(F) {block} attention(F) {block}"
    assert journal.lane("post") == " ".join(2 * ["combine(B) dispatch(F) dispatch(B) combine(F)"])


def test_every_computation_of_a_pair_hides_the_communication_that_the_trace_shows():
    journal = Journal()
    passes, _ = pair(journal, 3, 3)
    merge(*passes, trace=journal)
    hidden, in_flight = {}, []
    for kind, *what in journal:
        if kind == "compute":
            hidden.setdefault("{}({})".format(*what), []).append(list(in_flight))
        else:
            (in_flight.append if kind == "post" else in_flight.remove)("{}({})".format(*what))
    # DeepSeek's published trace of a pair on H800: what is under way while each block computes.
    expected = {
        "attention(F)": "combine(B)",
        "mlp(B)": "dispatch(F)",
        "mlp(W)": "dispatch(B)",
        "mlp(F)": "dispatch(B)",
        "attention(B)": "combine(F)",
        "attention(W)": "combine(B)",
    }
    assert hidden.keys() == expected.keys()
    for block, communication in expected.items():
        assert all(communication in under_way for under_way in hidden[block]), block
    assert not in_flight


@pytest.mark.parametrize(
    ("forward_layers", "backward_layers", "turns"),
    [(1, 3, "BFBFBBBB"), (3, 1, "BFBFFFFF"), (2, 0, "FFFF"), (0, 2, "BBBB"), (0, 0, "")],
)
def test_passes_of_unequal_length_alternate_while_both_last(forward_layers, backward_layers, turns):
    journal = Journal()
    passes, _ = pair(journal, forward_layers, backward_layers)
    grad, hidden = merge(*passes)
    assert "".join(direction for kind, _, direction in journal if kind == "post") == turns
    alone, _ = pair(Journal(), forward_layers, backward_layers)
    assert [merge(each)[0] for each in alone] == [grad, hidden], "what they compute does not depend on the merge"


def test_an_input_gradient_pass_leaves_all_weight_gradients_for_later():
    journal = Journal()
    passes, upper = pair(journal, 2, 2, split=True)
    merge(*passes, trace=journal)
    assert "(W)" not in journal.lane("compute")
    upper.weights.defer()
    journal.clear()
    upper.weights.pop()
    assert journal.lane("compute") == "mlp(W) attention(W) mlp(W) attention(W)"


def test_weight_gradients_after_the_last_communication_wait_for_the_executor():
    journal = Journal()
    passes, upper = pair(journal, 1, 1)
    merge(*passes, trace=journal)
    assert journal.lane("compute").endswith("attention(B)") and len(upper.weights.now) == 1


# ---------------------------------------------------------------- failures
@pytest.mark.parametrize("culprit", [B, F])
@pytest.mark.parametrize("block", ["attention", "mlp"])
def test_an_exception_closes_both_passes_and_waits_once_for_all_that_is_in_flight(culprit, block):
    journal = Journal()
    passes, _ = pair(journal, 2, 2)

    class Failing(Trace):
        def span(self, lane, name, **details):
            if name == block + (".B" if culprit == B else ""):
                raise KeyError("in the middle")
            return journal.span(lane, name)

    with pytest.raises(KeyError, match="in the middle"):
        merge(*passes, trace=Failing())
    assert [inspect.getgeneratorstate(each) for each in passes] == [inspect.GEN_CLOSED] * 2
    posted, waited = ([entry[1:] for entry in journal if entry[0] == kind] for kind in ("post", "wait"))
    assert sorted(posted) == sorted(waited)


def test_a_pass_that_raises_is_not_run_again_and_its_partner_is_drained():
    journal = Journal()
    (back, fore), _ = pair(journal, 2, 2)

    def raising():
        yield next(effect for effect in back if isinstance(effect, Comm))
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        merge(raising(), fore)
    assert inspect.getgeneratorstate(fore) == inspect.GEN_CLOSED
    assert ("wait", "dispatch", F) in journal


def test_a_communication_that_failed_does_not_hide_the_cause():
    class Broken:
        def wait(self):
            raise RuntimeError("connection closed by peer")

    def sends():
        yield Comm("dispatch", Broken(), 0, 0, None)

    def fails():
        yield Compute("attention", 0)
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        merge(sends(), fails())


# ---------------------------------------------------------------- memory
def storage(tensor):
    return StorageWeakRef(tensor.untyped_storage())


@pytest.mark.parametrize("training", [False, True])
def test_forward_lets_dead_values_go(training):
    """At each `attention` the values of the layer before are gone: nobody reads them, and no graph here saves them."""
    toy, made, seen = Toy(3, Journal()), [], []

    def spied(segment):
        inner = segment.run

        def run(batch, *inputs):
            if segment.name == "attention":
                seen.append([one.expired() for one in made])
                made.clear()
            results = inner(batch, *inputs)
            made.extend(storage(result) for result in results)
            return results

        return run

    for segment in toy.segments:
        if isinstance(segment, Local):
            segment.run = spied(segment)
    result, _ = run_forward(toy, Microbatch(0, None, training=training))
    assert seen == [[], [True] * 3, [True] * 3], "attention's hidden and normed, and the experts' rows"
    assert result.tolist() == [14.0**3]


@pytest.mark.parametrize(
    ("run", "lets_go", "kept_on"),
    [
        (lambda batch, x: (2 * x,), True, False),
        (lambda batch, x: (2 * x,), False, True),
        (lambda batch, x: (x * x,), True, True),
    ],
)
def test_the_tape_keeps_no_outputs_and_inputs_unless_it_lets_them_go(run, lets_go, kept_on):
    toy = Toy(1, Journal())
    toy.segments = [Local("dense", 0, run, ("hidden",), ("hidden",), lets_go=lets_go)]
    incoming, batch = torch.ones(1), Microbatch(0, None)
    result, tape = run_forward(toy, batch, incoming)
    kept, gone = storage(incoming), storage(result)
    del incoming, result
    assert kept.expired() != kept_on
    assert gone.expired(), "what was handed to the next stage"
    assert merge(backward(toy, torch.ones(1), batch, tape, toy.weights, split=True))[0].tolist() == [2.0]
    assert tape == [] and kept.expired()


def test_the_tape_shrinks_as_backward_goes():
    toy, batch = Toy(3, Journal()), Microbatch(0, None)
    _, tape = run_forward(toy, batch)
    lengths = []

    class Ruler(Trace):
        def span(self, lane, name, **details):
            lengths.append(len(tape))
            return super().span(lane, name)

    merge(backward(toy, torch.ones(1), batch, tape, toy.weights, split=True), trace=Ruler())
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == 0


def test_evaluation_keeps_no_tape_and_no_graph():
    result, tape = run_forward(Toy(2, Journal()), Microbatch(0, None, training=False), torch.ones(1).requires_grad_())
    assert tape == [] and not result.requires_grad


# ---------------------------------------------------------------- gradients
def test_segments_together_have_the_gradients_of_one_graph():
    """A value read by two segments, one that nobody reads, numbers without gradient, losses in the middle and last."""
    torch.manual_seed(0)
    first, second = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    chosen, hidden, seed = torch.tensor([2, 0]), torch.randn(3, 4, dtype=torch.float64), {"loss": 0.5, "extra": -2.0}

    def split(batch, hidden):
        return hidden @ first, chosen, hidden.exp(), (hidden**3).sum()

    def join(batch, hidden, picked):
        return (hidden[:, picked].sum(1, keepdim=True) * hidden @ second,)

    def score(batch, hidden, joined):
        return (hidden * joined.sin()).sum(), joined

    def segments():
        yield Local("split", 0, split, ("hidden",), ("hidden", "picked", "unread"), ("extra",))
        yield Local("join", 0, join, ("hidden", "picked"), ("joined",))
        yield Sum("sum", 0, ("hidden", "joined"), ("summed",))
        yield Local("score", 0, lambda b, h, j: score(b, h, j)[::-1], ("hidden", "summed"), ("hidden",), ("loss",))

    def plain(hidden):
        middle, picked, _, extra = split(None, hidden)
        summed = middle + join(None, middle, picked)[0]
        loss, out = score(None, middle, summed)
        return out, seed["loss"] * loss + seed["extra"] * extra, (loss, extra)

    toy, batch = Toy(0, Journal()), Microbatch(0, None, seeds=seed)
    toy.segments = list(segments())
    result, tape = run_forward(toy, batch, hidden)
    grad = torch.randn_like(result)
    (dhidden,) = merge(backward(toy, grad, batch, tape, toy.weights, split=False))
    got = dhidden, first.grad, second.grad

    leaf = hidden.clone().requires_grad_()
    out, objective, (loss, extra) = plain(leaf)
    expected = torch.autograd.grad([out, objective], [leaf, first, second], [grad, torch.ones_like(objective)])
    assert torch.equal(result, out) and batch.losses == {("loss", 0): loss, ("extra", 0): extra}
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
