"""Logs of ranks that were looked at one by one: those in step agree, and what would hang is found."""

from dataclasses import replace

import pytest

from launch.simulate.ranks.communication import Call, Communicator, disagreements, spans

WORLD, RIGHT = Communicator("world", (0, 1)), Communicator("travel right", (0, 1))


def log(rank: int) -> list[Call]:
    """Two collectives, an exchange of 1, 2, 3 and 4 bytes, and a message to the right."""
    exchange = {0: ((1, 2), (1, 3)), 1: ((3, 4), (2, 4))}[rank]
    message = (
        Call("send", RIGHT, "bfloat16", (8,), (), 1) if rank == 0 else Call("receive", RIGHT, "bfloat16", (), (8,), 0)
    )
    return [
        Call("all-reduce", WORLD, "float64", (64,), (64,)),
        message,
        Call("all-to-all", WORLD, "uint8", *exchange),
        Call("all-gather", WORLD, "bfloat16", (2,), (4,)),
        message,
    ]


def swap(calls: list[Call]) -> list[Call]:
    return [calls[2], calls[1], calls[0], *calls[3:]]


BROKEN = {
    "two collectives in the other order": (swap, "world of ranks 0..1: its collective number 0 is"),
    "one collective less": (lambda calls: calls[:3] + calls[4:], "its collective number 2 is"),
    "another size": (lambda calls: [replace(calls[0], gives=(65,), takes=(65,)), *calls[1:]], "all-reduce of 65 bytes"),
    "another expectation": (
        lambda calls: [*calls[:2], replace(calls[2], takes=(1, 4)), *calls[3:]],
        "rank 0 gives 2 bytes to rank 1, who takes 1",
    ),
    "a message that nobody receives": (lambda calls: calls[:4], "from rank 0 to rank 1: message number 1 is send"),
    "a shorter message": (lambda calls: [*calls[:4], replace(calls[4], takes=(6,))], "receive of 6 bytes"),
}


def test_logs_of_ranks_in_step_agree():
    assert disagreements({0: log(0), 1: log(1)}) == []


@pytest.mark.parametrize("how", BROKEN)
def test_a_rank_out_of_step_is_found(how):
    change, words = BROKEN[how]
    found = disagreements({0: log(0), 1: change(log(1))})
    assert found and any(words in line for line in found), found


def test_a_rank_that_is_not_there_is_not_missed():
    assert disagreements({0: log(0)}) == []


def test_ranks_are_spelled_in_few_characters():
    assert spans([0, 1, 2, 3, 8, 9]) == "0..3, 8..9"
    assert spans(range(5, 2048, 128)) == "5..1925 by 128"
    assert spans([3, 67, 1923, 1987]) == "3, 67, 1923, 1987"
