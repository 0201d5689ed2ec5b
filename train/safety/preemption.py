"""Preemption: asked to stop, a run saves one checkpoint at one step, leaves a marker and ends in good order.

SIGTERM or SIGUSR1 to any rank is only remembered. How many ranks have been asked is added up in a sum over the world
that every step makes anyway (`Engine.forward_backward`), so all ranks learn of it at the same step boundary, at no
cost. Asking again changes nothing: the save in flight commits. The launcher passes the signal on to the ranks
(`launch/local.py`); a launcher that dies leaves no orphans, for its death asks them too.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MARKER = "PREEMPTED"
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: start the same command again."""
STOP_VARIABLE = "WEFT_ASKED_TO_STOP"
"""Set by weft's launcher once it has been asked: ranks that its agent would start again then end at once."""
PR_SET_PDEATHSIG = 1


class Preemption:
    """What this rank has been asked: `asked` is the name of the first signal, or empty."""

    def __init__(self) -> None:
        self.asked = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile signals ask; before, they end the process, which has nothing to save. In the main thread.

        Afterwards they do again what they did before, unless an agent has started this process: then it is about to
        end, and what it still has to say, an error or an exit code, is not to be cut short.
        """
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            if not under_agent():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name


def under_agent() -> bool:
    """Whether torchrun's agent has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def asked_before_start() -> bool:
    """Whether the launcher was asked to stop before it started this process."""
    return STOP_VARIABLE in os.environ


def follow_parent() -> None:
    """Have the kernel send this process SIGTERM when the agent that started it is gone (Linux)."""
    if sys.platform == "linux" and under_agent():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def mark(directory: Path, step: int, tokens: int, signal_name: str) -> None:
    """Say in the run directory that the run was preempted, and where it stands. On one rank, once all is saved."""
    draft = directory / f"{MARKER}.tmp"
    draft.write_text(json.dumps({"step": step, "tokens": tokens, "signal": signal_name}) + "\n")
    draft.rename(directory / MARKER)


def marked(directory: Path) -> dict[str, object] | None:
    """What the marker says, or None without one."""
    file = directory / MARKER
    return json.loads(file.read_text()) if file.exists() else None


def unmark(directory: Path) -> None:
    """The run goes on. On one rank."""
    (directory / MARKER).unlink(missing_ok=True)
