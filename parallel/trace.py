"""Where a rank says what it is doing. `Trace` looks away; the recorder that takes times is a subclass.

Spans nest: an instruction of the program holds the segments that its passes compute, and the waits for what has not
arrived. What is in flight meanwhile is posted. Nothing that listens may change what is computed.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from parallel.schedule.program import Program

_NOTHING = nullcontext()


class Trace:
    """The one that looks away; its methods say what a recorder is told."""

    def begin(self, step: int, program: Program) -> None:
        """Step number `step` begins, and is going to run `program`."""

    def end(self) -> dict[str, float]:
        """The step has ended: what was measured in it, by the keys of `metrics.jsonl`. Every rank calls this."""
        return {}

    def span(self, lane: str, name: str, **details: Any) -> AbstractContextManager[Any]:
        """Around a piece of work. lane: "instruction" | "compute" | "wait"; details: JSON values."""
        return _NOTHING

    def post(self, lane: str, name: str, work: Any, size: int, **details: int) -> None:
        """A communication of `size` bytes is in flight. lane: "experts" | "pipeline" | "gradients".

        details: of "experts" `across`, how many of the bytes go to other nodes.
        Whoever posts it holds its tensors until `wait` has returned.
        """

    def wait(self, lane: str, name: str, work: Any) -> None:
        """Stand still until `work` has arrived; it was posted on `lane`, if it was worth posting."""
        with self.span("wait", name):
            work.wait()


OFF = Trace()
