"""How fast the machine is just now.

Its clock, its caches and whoever else runs on the same hardware make a machine faster and slower from one second to the
next: a virtual one by a third. So a fixed pass, the yardstick, is run again and again between measurements, and every
time that is measured is divided by how much longer the yardstick took just then than at the beginning. The sheet says
how long that was (`Cores.pace`): who compares a simulated step with a measured one reads the yardstick meanwhile. A GPU
keeps its pace, and has no yardstick.
"""

import time
from contextlib import nullcontext
from statistics import median

import torch

from launch.calibrate.model import Model

YARD = "fp8", (256, 128, 8, 1024)  # as weft's layers usually compute; width, tokens, experts, vocabulary
WARM_UP, READINGS = 3, 15


class Pace:
    """The yardstick of one device. usual: seconds that it took at the beginning, the median."""

    def __init__(self, device: torch.device, usual: float | None = None) -> None:
        """usual: what it took elsewhere, to compare with; else what it takes now."""
        self.readings: list[float] = []
        self._yard = Model(*YARD, device) if device.type == "cpu" else None
        for _ in range(WARM_UP):
            self._seconds()
        self.usual = usual or median(self._seconds() for _ in range(READINGS))

    def _seconds(self) -> float:
        if self._yard is None:
            return 1.0
        begin = time.thread_time()
        self._yard.run(nullcontext())
        return time.thread_time() - begin

    def slower(self) -> float:
        """How many times as long as usual everything takes now; 1 on a GPU."""
        self.readings.append(self._seconds() / self.usual)
        return self.readings[-1]
