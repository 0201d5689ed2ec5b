"""How long each turn of each pass takes, as the run itself says it: a trace that counts CPU seconds.

A turn is what a pass computes between two of its communications.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from parallel.schedule.program import passes
from parallel.trace import Trace
from tests.benchmarks.slow_link import Link

Key = tuple[str, int, str]  # "F" | "B" | "W", stage, the communication that ends the turn ("" for none)


class Turns(Trace):
    """Takes the CPU time of each turn of each pass, weight gradients apart, and the waits by kind of instruction.

    CPU time is what a turn takes on a core of its own, whatever else the machine has to do.
    """

    def __init__(self) -> None:
        self.link = Link()
        self.clear()

    def clear(self) -> None:
        """Forget."""
        self.turns: dict[Key, list[float]] = defaultdict(list)
        self.compute, self.size, self.count, self.link.posted = 0.0, 0, 0, 0.0
        self.posted: dict[str, float] = defaultdict(float)  # by "FB", "F", "B", "I": seconds on the link
        self.waited: dict[str, float] = defaultdict(float)  # and of standing still for it
        self.inside, self.weights, self.mark = "", 0.0, 0.0
        self.stages: dict[str, int] = {}

    @contextmanager
    def span(self, lane: str, name: str, **details: Any) -> Iterator[None]:
        start = time.thread_time()
        if lane == "instruction":
            kind, *numbers = re.findall(r"\w+", name)
            halves = passes((kind, *map(int, numbers)))
            self.inside, self.mark, self.weights = kind, start, 0.0
            self.stages = {"F" if half == "F" else "B": stage for half, stage, _ in halves}
            carried = self.link.posted
        yield
        took = time.thread_time() - start
        if lane == "instruction":
            self._turn("")
            self.posted[kind] += self.link.posted - carried
            self.compute += took
            self.inside = ""
        elif name == "weights.W":
            self.weights += took
            if not self.inside:
                self.compute += took
                self.turns["W", self.stages["B"], ""].append(took)

    def post(self, lane: str, name: str, work: Any, size: int, **details: int) -> None:
        if lane == "experts":
            self.size, self.count = self.size + size, self.count + 1
            self._turn(name)

    def wait(self, lane: str, name: str, work: Any) -> None:
        start = time.perf_counter()
        super().wait(lane, name, work)
        self.mark = time.thread_time()
        if lane == "experts":
            self.waited[self.inside] += time.perf_counter() - start

    def _turn(self, name: str) -> None:
        now = time.thread_time()
        solo = len(self.stages) == 1
        if name or solo:
            way = "B" if name.endswith(".B") or (not name and "B" in self.stages) else "F"
            if self.inside != "W":
                self.turns[way, self.stages[way], name].append(now - self.mark - self.weights)
            if name.endswith(".B") and self.inside != "I":
                self.turns["W", self.stages[way], name].append(self.weights)
        self.mark, self.weights = now, 0.0
