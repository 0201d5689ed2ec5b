"""The exponential moving average of the parameters, on the CPU (report section 3.2.3).

Each rank averages its own shares of the FP32 masters, so that the average costs the cluster one copy of them. It is
updated behind the next step and travels in checkpoints under the parameters' names, from where `weft export --ema`
takes it.
"""

from concurrent.futures import Future

import torch

from parallel.flat_shard import FlatShard
from parallel.zero import ZeRO1
from train.behind import Behind, on_host


class EMA:
    """`average` <- decay x `average` + (1 - decay) x masters, after each step that was applied."""

    def __init__(self, optimizer: ZeRO1, decay: float, behind: Behind) -> None:
        self.optimizer, self.decay, self.behind = optimizer, decay, behind
        self.average = [master.detach().cpu().clone() for master in optimizer.masters]
        self.landing = [on_host(master) for master in optimizer.masters if master.device.type == "cuda"]
        self.running: Future[None] | None = None

    def restart(self) -> None:
        """Begin anew from the masters as they are."""
        self.settle()
        for average, master in zip(self.average, self.optimizer.masters, strict=True):
            average.copy_(master.detach())

    def update(self) -> None:
        """Take in the masters of the step that has just been applied; returns at once."""
        self.settle()
        self.running = self.behind.start(self._update)

    def settle(self) -> None:
        """Wait until the masters may move, and the average has taken them in."""
        if self.running:
            self.running.result()
            self.running = None

    @torch.no_grad()
    def _update(self) -> None:
        masters = [master.detach() for master in self.optimizer.masters]
        for host, master in zip(self.landing, masters, strict=False):
            host.copy_(master, non_blocking=True)
        if self.landing:
            torch.cuda.current_stream().synchronize()
        for average, master in zip(self.average, self.landing or masters, strict=True):
            average.lerp_(master, 1 - self.decay)

    def by_name(self) -> dict[str, FlatShard]:
        """The average as a checkpoint holds it, sharing its memory."""
        return self.optimizer.by_name(self.average)
