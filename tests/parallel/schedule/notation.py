"""The short notation in which the golden sequences are written down: Fa0 [Fb1+Ba0] Ib2 Wb2.

a counts the micro-batches that enter where the first does, b those of the other end; stages are left out, since the
rank and the direction give them.
"""

from parallel.schedule import Instruction, Program


def shorthand(program: Program, rank: int) -> str:
    entries = [program.host(0, mb) for mb in range(program.microbatches)]

    def name(kind: str, mb: int) -> str:
        return f"{kind}{'a' if entries[mb] == entries[0] else 'b'}{entries[:mb].count(entries[mb])}"

    def write(ins: Instruction) -> str:
        return f"[{name('F', ins[2])}+{name('B', ins[4])}]" if ins[0] == "FB" else name(ins[0], ins[2])

    return " ".join(map(write, program.program[rank]))


def mirrored(sequence: str) -> str:
    """The same sequence with the two directions exchanged."""
    return sequence.translate(str.maketrans("ab", "ba"))
