"""How long simulating takes: `python -m tests.benchmarks.simulator [--plan]`.

V3's step (`wall_seconds`, of which most goes to looking at stages), the engine on pipelines of growing length and
number of micro-batches, whose cost per instruction should stay, and with `--plan` what planning V3 takes per priced
plan. Seconds are of the process: on a machine that does nothing else, the wall shows the same.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from launch.simulate import engine, plan, world
from launch.simulate.result import simulate
from launch.simulate.sheet import Sheet, read
from parallel import schedule
from train.compose import compose

SIZES = ((8, 60), (16, 120), (16, 480), (32, 240), (64, 240), (64, 1000))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the process, and what came out."""
    began = time.process_time()
    found = call()
    return time.process_time() - began, found


def growth(sheet: Sheet) -> list[str]:
    """The engine on 1F1B and DualPipe, with the stages of recipe `tiny`."""
    tiny = compose(["recipe=tiny"])
    stage = world.study_stages(tiny, schedule.generate("1f1b", 2, 2).placement)[0]
    rows = [f"{'schedule':<10}{'PP':>4}{'N':>6}{'instructions':>14}{'seconds':>9}{'us each':>9}"]
    for name in ("1f1b", "dualpipe"):
        for ranks, microbatches in SIZES:
            program = schedule.generate(name, ranks, microbatches)
            count = sum(map(len, program.program))
            took, _ = timed(lambda: engine.run(program, dict.fromkeys(range(ranks), stage), sheet))  # noqa: B023
            rows.append(f"{name:<10}{ranks:>4}{microbatches:>6}{count:>14,}{took:>9.2f}{took / count * 1e6:>9.1f}")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", action="store_true", help="plan V3 too, which takes minutes")
    planning = parser.parse_args().plan
    sheet, v3 = read("h800x2048"), compose(["recipe=v3", "data.path=none"])
    took, found = timed(lambda: simulate(v3, sheet))
    print(f"V3's step: {took:.1f} s, {found.wall_seconds:.1f} s by the wall")
    took, _ = timed(lambda: simulate(v3, sheet, found.program, found.stages))
    print(f"  with stages and program known: {took:.2f} s")
    print("\n".join(growth(sheet)))
    if planning:
        took, plans = timed(lambda: plan.plan(v3, sheet))
        priced = sum(each.seconds is not None for each in (*plans.front, *plans.rejected))
        print(f"plan: {took:.0f} s for {priced} priced plans, {took / priced * 100:.0f} s for 100")


if __name__ == "__main__":
    main()
