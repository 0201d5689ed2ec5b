"""Where a rank says what it is doing. `Trace` looks away; a recorder that takes times is a subclass.

Spans nest: an instruction of the program holds the segments that its passes compute, and the waits for what has not
arrived. What is in flight meanwhile is posted. Nothing that listens may change what is computed.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

_NOTHING = nullcontext()


class Trace:
    """The one that looks away; its methods say what a recorder is told."""

    def span(self, lane: str, name: str, **details: Any) -> AbstractContextManager[None]:
        """Around a piece of work. lane: "instruction" | "compute" | "wait"; details: JSON values."""
        return _NOTHING

    def post(self, lane: str, name: str, work: Any, size: int) -> None:
        """A communication of `size` bytes is in flight. lane: "experts" | "pipeline" | "gradients"."""


OFF = Trace()
