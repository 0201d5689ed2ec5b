"""Lowered programs: what was added, and that no rank can ever wait for ever."""

from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import Instruction, Message, Program, ProgramError, build, lower, verify
from parallel.schedule.program import makes, needs, passes, route

ADDED = ("SEND", "RECV", "R")
PRICE = st.floats(0.1, 9)


def transfers(program: Program) -> list[tuple[Message, int, int]]:
    """(message, sending rank, receiving rank) of all that has to travel."""
    made = [msg for each in program.program for ins in each for msg in makes(program, ins)]
    return sorted((msg, *route(program, msg)) for msg in made if len(set(route(program, msg))) == 2)


def is_sound(program: Program, lowered: list[list[Instruction]]) -> bool:
    """The oracle: every transfer is there once, made before it is sent, received before it is used; and no cycle.

    With blocking, unbuffered transfers a program ends exactly if its order has no cycle, where each rank's list is a
    chain of nodes and a transfer is one node in two chains, since its send and its receive happen together.
    """
    sends = [(ins[1:4], rank, ins[4]) for rank, each in enumerate(lowered) for ins in each if ins[0] == "SEND"]
    receives = [(ins[1:4], ins[4], rank) for rank, each in enumerate(lowered) for ins in each if ins[0] == "RECV"]
    if not sorted(sends) == sorted(receives) == transfers(program):
        return False
    order: TopologicalSorter[tuple] = TopologicalSorter()
    for rank, instructions in enumerate(lowered):
        here: set[Message] = set()
        chain: list[tuple] = []
        for ins in instructions:
            if ins[0] == "SEND" and ins[1:4] not in here:
                return False
            if ins[0] == "RECV":
                here.add(ins[1:4])
            elif ins[0] not in ADDED:
                if not here.issuperset(needs(program, ins)):
                    return False
                here.update(makes(program, ins))
            chain.append(("transfer", *ins[1:4]) if ins[0] in ("SEND", "RECV") else (rank, *ins))
            order.add(chain[-1], *chain[-2:-1])
    try:
        order.prepare()
    except CycleError:
        return False
    return True


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 4, 8), ("dualpipe", 6, 4), ("1f1b", 4, 6)])
def test_lowering_adds_each_transfer_once_and_changes_no_order(name: str, ranks: int, microbatches: int) -> None:
    program = build(name, ranks, microbatches)
    lowered = lower(program)
    assert [tuple(i for i in each if i[0] not in ADDED) for each in lowered] == list(program.program)
    assert is_sound(program, lowered)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 4, 8), ("dualpipe", 4, 2), ("1f1b", 3, 4)])
def test_each_stage_is_reduced_once_after_its_last_weight_gradient(name: str, ranks: int, microbatches: int) -> None:
    program = build(name, ranks, microbatches)
    for rank, instructions in enumerate(lower(program)):
        reduced = {ins[1]: at for at, ins in enumerate(instructions) if ins[0] == "R"}
        assert sorted(reduced) == sorted(program.placement[rank])
        for stage, at in reduced.items():
            weights = [
                i for i, ins in enumerate(instructions) if ins[0] not in ADDED
                for kind, s, _ in passes(ins) if s == stage and kind in ("B", "W")
            ]  # fmt: skip
            between = instructions[max(weights) + 1 : at]
            assert max(weights) < at and all(ins[0] in ("SEND", "RECV") for ins in between)


def test_an_evaluation_is_lowered_without_reductions() -> None:
    program = build("dualpipe", 4, 8).evaluation()
    verify(program)
    assert {ins[0] for each in lower(program) for ins in each} == {"F", "SEND", "RECV"}


def test_a_receive_is_posted_before_whatever_ends_after_its_message_is_made() -> None:
    program = build("dualpipe", 8, 20)
    ends = program.ends(delay=0.01)
    made: dict[Message, float] = {}
    for rank, instructions in enumerate(program.program):
        made |= {msg: end for ins, end in zip(instructions, ends[rank], strict=True) for msg in makes(program, ins)}
    for rank, lowered in enumerate(lower(program)):
        computed = 0
        for ins in lowered:
            if ins[0] == "RECV":
                assert computed == sum(end <= made[ins[1:4]] for end in ends[rank])
            computed += ins[0] not in ADDED


@settings(max_examples=25, deadline=None)
@given(half=st.integers(1, 6), microbatches=st.integers(1, 24), costs=st.lists(PRICE, min_size=5, max_size=5))
def test_any_costs_give_an_order_that_finishes(half: int, microbatches: int, costs: list[float]) -> None:
    prices = dict(zip(("F", "B", "I", "W", "FB"), costs, strict=True))
    for program in (build("dualpipe", 2 * half, 2 * microbatches), build("1f1b", half, microbatches)):
        lowered = lower(program, prices, delay=0.05)
        assert is_sound(program, lowered)
        verify(program, lowered)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_verifier_agrees_with_the_oracle_on_random_corruptions(data: st.DataObject) -> None:
    name, ranks, microbatches = data.draw(st.sampled_from([("dualpipe", 4, 8), ("dualpipe", 6, 6), ("1f1b", 4, 6)]))
    program = build(name, ranks, microbatches)
    lowered = lower(program)
    for _ in range(data.draw(st.integers(1, 3))):
        rank = data.draw(st.integers(0, ranks - 1))
        instructions = lowered[rank]
        moves = [at for at, ins in enumerate(instructions) if ins[0] in ("SEND", "RECV")]
        at = data.draw(st.sampled_from(moves))
        match data.draw(st.sampled_from(["drop", "duplicate", "move", "move", "move", "give away"])):
            case "drop":
                del instructions[at]
            case "duplicate":
                instructions.insert(at, instructions[at])
            case "move":
                ins = instructions.pop(at)
                instructions.insert(max(0, at + data.draw(st.integers(-4, 4))), ins)
            case "give away":
                lowered[(rank + 1) % ranks].append(instructions.pop(at))
    try:
        verify(program, lowered)
        accepted = True
    except ProgramError:
        accepted = False
    assert accepted == is_sound(program, lowered)
