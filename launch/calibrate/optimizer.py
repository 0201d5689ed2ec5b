"""How fast ZeRO-1 moves parameters here: norm, clipping, AdamW, the cast to the model's dtype, gradients cleared."""

import time
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch.nn import Parameter

from launch.calibrate.pace import Pace
from parallel.zero import Bucket, ZeRO1
from train.optim import MOMENTS, AdamW16

ELEMENTS = 4 << 20
MOMENT = "bf16"


def measure(device: torch.device, repeats: int, pace: Pace) -> tuple[float, float]:
    """(bytes a second, the relative spread of the times); bytes as `launch.simulate.step.update` counts them."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = Parameter(torch.zeros(ELEMENTS // 2048, 2048, dtype=torch.bfloat16, device=device))
        group = dist.group.WORLD
        assert group is not None
        bucket = Bucket((0,), "dense", group, {"weight": weight}, frozenset({0}))
        zero = ZeRO1([bucket], partial(AdamW16, moments=MOMENTS[MOMENT]), clip=1.0)
        times = []
        for _ in range(repeats + 1):
            weight.main_grad.fill_(1e-3)  # type: ignore[attr-defined]
            begin = _now(device)
            zero.reduce_gradients()
            zero.step(1e-4, zero.grad_norm())
            times.append((_now(device) - begin) / pace.slower())
    finally:
        dist.destroy_process_group()
    state = 4 + 2 * MOMENTS[MOMENT].itemsize
    took = median(times[1:])
    return ELEMENTS * (2 * state + 4 + weight.element_size()) / took, max(abs(each / took - 1) for each in times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()
