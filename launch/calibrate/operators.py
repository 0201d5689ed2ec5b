"""Every operator of weft's layers, timed where it runs: in passes through small models of several widths and lengths.

On a CPU a time is the thread's own processor time, which other programs on the machine do not lengthen; on a GPU it is
what CUDA's events say. It is corrected by the machine's pace (`pace`). What Python spends between operators is what a
pass takes beyond them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.ops import Cost, price
from launch.calibrate.model import Model, Sizes
from launch.calibrate.pace import Pace
from launch.simulate.cluster.sheet import operator_key

# (width, tokens, experts, vocabulary); all differ from those of weft's own small recipes
CPU = (128, 192, 8, 1024), (384, 320, 8, 2048), (512, 128, 16, 6144), (640, 512, 8, 3072)
GPU = (1024, 2048, 16, 16384), (2048, 4096, 16, 32768), (4096, 1024, 8, 65536), (7168, 4096, 8, 129280)
PRECISIONS = {"cpu": ("fp8", "bf16", "fp32"), "cuda": ("fp8", "bf16")}
REPEATS = 5
Call = tuple[str, Cost, float]  # an operator by `operator_key`, what the call costs, its seconds


@dataclass
class Measured:
    """rows: by operator (`operator_key`) what its calls cost, and their seconds. gaps: of each model, how many
    operators its pass had, how many of them products in FP8, and the pass's seconds beyond them.
    """

    rows: dict[str, list[tuple[Cost, float]]] = field(default_factory=lambda: defaultdict(list))
    gaps: list[tuple[int, int, float]] = field(default_factory=list)


class Stopwatch(TorchDispatchMode):
    """Times every operator that has a price."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.now: Callable[[], Any] = _event if device.type == "cuda" else time.thread_time
        self.calls: list[tuple[str, Cost, Any, Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and to skip it would import it, which takes two seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = self.now()
        result = func(*args, **(kwargs or {}))
        end = self.now()
        cost = price(func, args, kwargs or {}, result)
        if cost is not None:
            self.calls.append((operator_key(func._opname, cost), cost, begin, end))
        return result

    def seconds(self, slower: float) -> list[Call]:
        """What was seen, at the usual pace; slower: how far from it the machine was."""
        return [(key, cost, _seconds(*when) / slower) for key, cost, *when in self.calls]


def _event() -> torch.cuda.Event:
    made = torch.cuda.Event(enable_timing=True)
    made.record()
    return made


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return cast(float, end - begin)
    end.synchronize()
    return cast(float, begin.elapsed_time(end) / 1e3)


def measure(device: torch.device, quick: bool, pace: Pace, tell: Callable[[str], None]) -> Measured:
    """All operators in all models. quick: half of the models, fewer times."""
    found = Measured()
    models = CPU if device.type == "cpu" else GPU
    for precision in PRECISIONS[device.type]:
        for sizes in models[: 2 if quick else None]:
            began = time.perf_counter()
            measure_model(found, precision, sizes, pace, device, 3 if quick else REPEATS)
            tell(f"{precision}, width {sizes[0]}, {sizes[1]} tokens: {time.perf_counter() - began:.1f} s")
    return found


def measure_model(
    found: Measured, precision: str, sizes: Sizes, pace: Pace, device: torch.device, repeats: int
) -> None:
    """Add what one model's operators take, each the median of `repeats`."""
    model = Model(precision, sizes, device)
    model.run(nullcontext())  # memory, compiled kernels, everything that a first time has
    watched, plain = [], []
    before = pace.slower()
    for _ in range(repeats):
        watch = Stopwatch(device)
        model.run(watch)
        between = pace.slower()
        begin = time.thread_time()
        model.run(nullcontext())
        took = time.thread_time() - begin
        after = pace.slower()
        slower = (before + between) / 2
        watched.append(watch.seconds(slower))
        plain.append(took / ((between + after) / 2))
        before = after
    calls = usual(watched)
    for key, cost, seconds in calls:
        found.rows[key].append((cost, seconds))
    if device.type == "cpu":
        in_fp8, total = sum(key.endswith(".fp8") for key, *_ in calls), sum(seconds for *_, seconds in calls)
        found.gaps.append((len(calls), in_fp8, max(0.0, median(plain) - total)))


def usual(watched: Sequence[Sequence[Call]]) -> list[Call]:
    """The calls of a pass that was watched several times, each with the median of its seconds."""
    return [(*each[0][:2], max(median(seconds for *_, seconds in each), 1e-7)) for each in zip(*watched, strict=True)]
