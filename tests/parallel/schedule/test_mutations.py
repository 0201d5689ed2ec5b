"""500 random corruptions of valid programs: the verifier refuses exactly those that break when they are run."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from parallel.schedule import Instruction, Program, ProgramError, build, lower, verify
from tests.parallel.schedule.oracle import Broken, mailboxes, rendezvous
from tests.parallel.schedule.programs import of_every_schedule
from tests.parallel.schedule.queues import DISCIPLINES, finishes

Rows = list[list[Instruction]]

VALID = of_every_schedule((2, 4), (3, 5), (4, 8), (4, 4), (6, 6))
PROGRAMS = VALID + [program.evaluation() for program in VALID[::4]]


def corrupt(rows: Rows, chance: random.Random) -> str:
    """One corruption of the rows, in place; its name."""
    rank = chance.choice([rank for rank, row in enumerate(rows) if len(row) > 1])
    row = rows[rank]
    reductions = [at for at, ins in enumerate(row) if ins[0] == "R"]  # few, so they are hit more often
    at = chance.choice(reductions) if reductions and chance.random() < 0.15 else chance.randrange(len(row))
    match how := chance.choice(["swap", "swap", "swap", "drop", "duplicate", "move"]):
        case "swap":
            other = (at + chance.choice([1, 1, 1, 2, 3, 8])) % len(row)
            row[at], row[other] = row[other], row[at]
        case "drop":
            del row[at]
        case "duplicate":
            row.insert(chance.randrange(len(row) + 1), row[at])
        case "move":
            other = chance.choice([each for each in range(len(rows)) if each != rank])
            rows[other].insert(chance.randrange(len(rows[other]) + 1), row.pop(at))
    return how


def accepts(program: Program, lowered: Rows | None) -> bool:
    try:
        verify(program, lowered)
    except ProgramError as refusal:
        assert re.search(r"rank \d+, position \d+", str(refusal)), "a refusal says where"
        return False
    return True


def is_sound(program: Program, lowered: Rows | None) -> bool:
    try:
        if lowered is None:
            mailboxes(program)
        else:
            rendezvous(program, lowered)
    except Broken:
        return False
    return True


def computing(rows: Rows) -> tuple[tuple[Instruction, ...], ...]:
    """What lowered lists compute, without what lowering added."""
    return tuple(tuple(ins for ins in row if ins[0] not in ("SEND", "RECV", "R")) for row in rows)


def case(seed: int) -> tuple[str, Program, Rows | None]:
    """(what was done, the corrupted program, its corrupted lowered lists; None if not these but the program was hit)"""
    chance = random.Random(seed)
    program = chance.choice(PROGRAMS)
    lists = lower(program) if seed % 2 else [list(row) for row in program.program]
    what = [corrupt(lists, chance) for _ in range(chance.choice([1, 1, 1, 2]))]
    broken = replace(program, program=computing(lists))
    return f"{program.kind} {' '.join(what)}", broken, lists if seed % 2 else None


def test_every_valid_program_comes_out_right_on_threads() -> None:
    for program in PROGRAMS:
        mailboxes(program)
        rendezvous(program, lower(program))


def test_verifier_and_oracle_agree_on_500_corruptions() -> None:
    verdicts: Counter[bool] = Counter()
    disagreements = []
    for seed in range(500):
        what, program, lowered = case(seed)
        accepted = accepts(program, lowered)
        verdicts[accepted] += 1
        if accepted != is_sound(program, lowered):
            disagreements.append((seed, what, f"accepted={accepted}"))
        elif accepted:  # then whatever is less strict finishes too
            lists = lowered or lower(program)
            rendezvous(program, lists)
            assert all(finishes(program, lists, **how) for how in DISCIPLINES.values())
    assert not disagreements
    assert verdicts[True] >= 25 and verdicts[False] >= 250, "the corruptions are neither all harmless nor all fatal"


# What the oracle itself can see, each on 1F1B of 2 ranks and 2 micro-batches, as in test_verifier:
#   rank 0: F(0,0) SEND(F,0,0,1) F(0,1) SEND(F,0,1,1) RECV(B,1,0,1) B(0,0) RECV(B,1,1,1) B(0,1) R(0)
#   rank 1: RECV(F,0,0,0) RECV(F,0,1,0) F(1,0) B(1,0) SEND(B,1,0,0) F(1,1) B(1,1) SEND(B,1,1,0) R(1)
@pytest.mark.parametrize(
    ("rank", "order", "words"),
    [
        (0, [0, 1, 2, 4, 3, 5, 6, 7, 8], "deadlock"),
        (0, [0, 1, 2, 3, 4, 5, 6, 7], "another gradient"),  # not reduced
        (0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 8], "another gradient"),  # reduced twice
        (0, [0, 1, 2, 3, 4, 5, 6, 8, 7], "another gradient"),  # reduced too early
        (0, [0, 1, 2, 3, 4, 5, 6, 8], "left over"),  # a backward is lost
        (0, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8], "AssertionError"),  # a forward is doubled
        (0, [1, 0, 2, 3, 4, 5, 6, 7, 8], "KeyError"),  # sent before it is made
        (1, [1, 0, 2, 3, 4, 5, 6, 7, 8], "another"),  # received under each other's names
        (1, [0, 1, 2, 3, 4, 5, 6, 7], "another gradient"),
    ],
)
def test_the_oracle_sees_what_is_wrong(rank: int, order: list[int], words: str) -> None:
    program = build("1f1b", 2, 2)
    lowered = lower(program)
    lowered[rank] = [lowered[rank][at] for at in order]
    with pytest.raises(Broken, match=words):
        rendezvous(program, lowered)
