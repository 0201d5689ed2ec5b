"""Programs as data: what instructions need and make, and the JSON form."""

import json

import pytest

from parallel.errors import UserError
from parallel.schedule import Program, build, verify
from parallel.schedule.program import makes, needs, passes, route


def test_a_pair_needs_and_makes_what_its_halves_do() -> None:
    program = build("dualpipe", 4, 8)
    pair = ("FB", 1, 2, 2, 5)
    assert passes(pair) == [("F", 1, 2), ("B", 2, 5)]
    assert needs(program, pair) == [("F", 0, 2), ("B", 3, 5)]
    assert makes(program, pair) == [("F", 1, 2), ("B", 2, 5)]
    assert route(program, ("F", 1, 2)) == (1, 2)  # direction a runs down
    assert route(program, ("B", 2, 5)) == (1, 2)  # direction b's gradients too


def test_the_ends_of_the_model_exchange_nothing_with_others() -> None:
    program = build("1f1b", 3, 4)
    assert needs(program, ("F", 0, 1)) == [] and makes(program, ("F", 2, 1)) == []
    assert needs(program, ("B", 2, 1)) == [] and makes(program, ("B", 0, 1)) == []
    assert needs(program, ("W", 1, 1)) == [] and makes(program, ("W", 1, 1)) == []


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 8, 20), ("dualpipe", 4, 4), ("zbv", 3, 5)])
def test_json_comes_back_as_the_same_program(name: str, ranks: int, microbatches: int) -> None:
    program = build(name, ranks, microbatches)
    again = Program.from_json(program.to_json())
    assert again == program
    verify(again)


def test_json_has_the_documented_keys() -> None:
    data = json.loads(build("dualpipe", 2, 4).to_json())
    program = data.pop("program")
    assert data == {
        "version": 1,
        "kind": "train",
        "stages": 2,
        "ranks": 2,
        "microbatches": 4,
        "placement": [[0, 1], [1, 0]],
    }
    assert program[0] == [
        ["F", 0, 0], ["F", 1, 2], ["F", 0, 1], ["B", 1, 2], ["FB", 1, 3, 0, 0], ["B", 1, 3], ["I", 0, 1], ["W", 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a program"),
        ("[1]", "not a program"),
        ('{"version": 1, "kind": "train"}', "stages"),
        ('{"version": 2}', "version=2"),
    ],
)
def test_other_json_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Program.from_json(text)
