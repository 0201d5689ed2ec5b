"""How long simulating takes: `python -m tests.benchmarks.simulator [--plan]`.

V3's step (`wall_seconds`, of which most goes to looking at stages), the engine on pipelines of growing length and
number of micro-batches, whose cost per instruction should stay, and with `--plan` what planning V3 takes per priced
plan. Seconds are of the process: on a machine that does nothing else, the wall shows the same.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from launch.simulate.cluster.sheet import Sheet, read
from launch.simulate.planner import plan
from launch.simulate.result import simulate
from launch.simulate.stages import world
from launch.simulate.step import engine
from parallel import schedule
from train.compose import compose

SIZES = ((8, 60), (16, 120), (16, 480), (32, 240), (64, 240), (64, 1000))
WIDTH = 13


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the process, and what came out."""
    began = time.process_time()
    found = call()
    return time.process_time() - began, found


def growth(sheet: Sheet) -> list[str]:
    """Seconds to write, prove, lower and simulate programs; us of the last for each instruction."""
    tiny = compose(["recipe=tiny"])
    stage = world.study_stages(tiny, schedule.generate("1f1b", 2, 2).placement)[0]
    heads = ("schedule", "PP", "N", "instructions", "write", "prove", "lower", "simulate", "us each")
    rows = ["".join(f"{head:>{WIDTH}}" for head in heads)]
    for name in ("1f1b", "dualpipe"):
        for ranks, microbatches in SIZES:
            writing, program = timed(lambda: schedule.generate(name, ranks, microbatches))  # noqa: B023
            proving, _ = timed(lambda: schedule.verify(program))  # noqa: B023
            lowering, _ = timed(lambda: schedule.lower(program))  # noqa: B023
            took, _ = timed(lambda: engine.run(program, dict.fromkeys(range(ranks), stage), sheet))  # noqa: B023
            count = sum(map(len, program.program))
            seconds = (f"{each:.2f}" for each in (writing, proving, lowering, took))
            cells = name, ranks, microbatches, f"{count:,}", *seconds, f"{took / count * 1e6:.1f}"
            rows.append("".join(f"{cell:>{WIDTH}}" for cell in cells))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", action="store_true", help="plan V3 too, which takes minutes")
    planning = parser.parse_args().plan
    sheet, v3 = read("h800x2048"), compose(["recipe=v3", "data.path=none"])
    for when in ("at first", "again"):
        took, found = timed(lambda: simulate(v3, sheet))
        print(f"V3's step {when}: {took:.2f} s, {found.wall_seconds:.2f} s by the wall")
    took, _ = timed(lambda: simulate(v3, sheet, found.program, found.stages))
    print(f"  with stages and program known: {took:.2f} s")
    print("\n".join(growth(sheet)))
    if planning:
        took, plans = timed(lambda: plan.plan(v3, sheet))
        priced = sum(each.seconds is not None for each in (*plans.front, *plans.rejected))
        print(f"plan: {took:.0f} s for {priced} priced plans, {took / priced * 100:.0f} s for 100")


if __name__ == "__main__":
    main()
