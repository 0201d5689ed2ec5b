"""Fill-in-the-middle: a document with its middle moved to the end, so that the model learns to fill gaps.

Prefix, suffix, middle (PSM) with special tokens between them, applied to a fraction of the documents before packing
(report section 4.1). The two cuts are uniform over the characters; a part may be empty.
"""

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that mark structure; text can never produce them."""

    eos: int
    fim_begin: int
    fim_hole: int
    fim_end: int


def arrange(text: str, special: SpecialTokens, rate: float, random: Random) -> list[str | int]:
    """The parts of one document in training order, special tokens as ids; in PSM form with probability `rate`."""
    if random.random() >= rate:
        return [text, special.eos]
    start, end = sorted(int(random.random() * (len(text) + 1)) for _ in range(2))
    prefix, middle, suffix = text[:start], text[start:end], text[end:]
    return [special.fim_begin, prefix, special.fim_hole, suffix, special.fim_end, middle, special.eos]
