"""Work on the state between two steps of the optimizer, in a thread beside forward and backward.

What is handed to `start` sees the state as the device leaves it at that moment. Nobody may move the state before the
future that comes back is done: checkpoints (`train/checkpoint`) and the average of the parameters (`train/ema.py`)
each wait for theirs when the trainer tells them that the optimizer is about to step.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Behind:
    """One thread, and on a GPU one stream, that does what it is given in order."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(1, "behind")

    def start(self, work: Callable[[], None]) -> Future[None]:
        """Do `work` once the device has done what it has been given so far."""
        if self.stream is None:
            return self.pool.submit(work)
        ready = torch.cuda.Event()
        ready.record()

        def on_stream() -> None:
            assert self.stream is not None
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(ready)
                work()
                self.stream.synchronize()

        return self.pool.submit(on_stream)


def on_host(like: Tensor) -> Tensor:
    """Memory on the host for a copy of `like`, touched already, such that a GPU can write there by itself."""
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
