"""A link that is slow and takes no CPU, for benchmarks on a machine whose ranks share memory.

A communication over it arrives when the link has carried what was posted before it, and then its own bytes.
"""

import time
from dataclasses import dataclass

from parallel.experts import LocalExperts, Tag
from parallel.passes import Comm
from train.recipe import Recipe

EXPERT_RANKS = 8  # the expert group whose traffic the link carries: 7 of 8 rows leave a rank
LATENCY = 100e-6


@dataclass
class Link:
    """Carries one communication at a time, in the order in which they are posted, and takes no CPU.

    seconds_per_byte: 0 while it is free of charge. serial: `post` stands still until the communication has arrived.
    """

    seconds_per_byte: float = 0.0
    serial: bool = False
    busy_until: float = 0.0
    posted: float = 0.0  # seconds that the link has carried

    def post(self, size: int) -> "Carried":
        now, takes = time.perf_counter(), (LATENCY + size * self.seconds_per_byte) * (self.seconds_per_byte > 0)
        self.busy_until = max(now, self.busy_until) + takes
        self.posted += takes
        carried = Carried(self.busy_until)
        if self.serial:
            carried.wait()
        return carried


@dataclass(frozen=True)
class Carried:
    """A communication on the link."""

    arrives: float

    def wait(self) -> None:
        left = self.arrives - time.perf_counter()
        if left > 0:
            time.sleep(left)


class FarExperts(LocalExperts):
    """All experts are here, but their rows take the time of a link: T tokens, K rows each, of D values in 16 bits."""

    def __init__(self, recipe: Recipe, link: Link) -> None:
        super().__init__(recipe.model.n_routed_experts)
        rows = recipe.train.sequence_length * recipe.model.num_experts_per_tok
        self.link, self.row_bytes = link, 2 * recipe.model.hidden_size
        self.leaving = rows * (EXPERT_RANKS - 1) // EXPERT_RANKS

    def _turn(self, tag: Tag) -> Comm:
        routing = 4 if tag.operation.startswith("dispatch") else 0  # a weight, or its gradient, travels with the row
        size = self.leaving * (self.row_bytes + routing)
        return Comm(tag.operation, self.link.post(size), size, 0, None)
