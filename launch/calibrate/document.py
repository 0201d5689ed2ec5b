"""The sheet that the measurements make: figures, where each is from, and how far curves are from what was seen."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import yaml

from launch.calibrate import communication, operators, optimizer, together
from launch.calibrate.fitting import Fit, line, link, python
from launch.calibrate.pace import Pace
from launch.simulate.cluster.sheet import Line, local_path
from parallel.errors import UserError

LARGE = 1 << 18  # bytes; below them a call costs more than they do


def calibrate(out: str | None, quick: bool) -> int:
    """Measure this machine, write its sheet to `out` (else where `cluster=local` looks), and tell how good it is."""
    path = Path(out) if out else local_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # before minutes of measuring
    except OSError as error:
        raise UserError(f"{path}: expected a file to write; {error.strerror}") from None
    if not path.stat().st_size:
        path.unlink()
    sheet, fits = measure(quick, lambda line: print(line, flush=True))
    path.write_text(text(sheet))
    print(f"\n{table(fits)}\n\n{path}: weft simulate recipe=tiny cluster={path if out else 'local'}")
    return 0


def measure(quick: bool, tell: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Fit[Any]]]:
    """The sheet, as YAML has it, and its curves."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, cores = device.type == "cuda", os.cpu_count() or 1
    torch.set_num_threads(1)
    pace = Pace(device)
    found = operators.measure(device, quick, pace, tell)
    moved, spread = optimizer.measure(device, 3 if quick else 7, pace)
    tell(f"the optimizer touches {moved / 1e9:.2f} GB a second")
    talk = communication.Talk()
    if not on_gpu or torch.cuda.device_count() > 1:
        talk = communication.measure(device.type, 5 if quick else 25, pace.usual, tell)
    rows = talk.operators | found.rows
    fits: dict[str, Fit[Any]] = {f"operators.{key}": line(rows[key]) for key in sorted(rows)}
    fits |= {name: link(each) for name, each in talk.links.items()}
    alone = {"bytes_per_second": 1e15, "latency": 0.0}  # a machine with one GPU has nobody to talk to
    way = asdict(fits["exchange"].curve) if talk.exchange else alone
    sheet = shape(device) | {
        "peak": {unit: rate for unit in ("fp8", "bf16", "fp32") if (rate := best(found, unit))},
        "products": {},
        "attention": {},
        "memory": bandwidth(found),
        "launch": min(fit.curve.call for fit in fits.values() if isinstance(fit.curve, Line)),
        "optimizer": moved,
        **{name: dict(way) for name in ("inside", "across", "exchange", "exchange_alone")},
        "comm_sms": 0,
        "read": way["latency"],
        "operators": {key.removeprefix("operators."): asdict(fit.curve) for key, fit in fits.items() if "." in key},
    }
    told = {
        "peak": "measured: the best rate of any of its products",
        "memory": "measured: the median rate of what copies and adds",
        "launch": "measured: the least call of an operator",
        "optimizer": f"measured: {optimizer.ELEMENTS:,} parameters; times differ by up to {spread:.0%}",
        "inside": "measured: two processes; " + words(fits["exchange"]) if talk.exchange else "given",
        "across": "estimated: as inside; this is one machine",
        "exchange": "estimated: as inside",
        "exchange_alone": "estimated: as inside",
        "comm_sms": "estimated",
        "read": "measured: the latency of an exchange",
        "price_per_hour": "given: nothing",
        "memory_bytes": "measured: the GPU's" if on_gpu else "measured: the machine's, which its ranks share",
    }
    if not on_gpu:
        each, more = python(found.gaps)
        slower, crowded = together.all_busy(cores, tell)
        sheet["cores"] = {
            "count": cores,
            "together": slower,
            "crowded": crowded,
            "between": each,
            "between_fp8": more,
            "message": asdict(fits["processor"].curve),
            "pace": pace.usual,
        }
        gaps = [seconds / operators for operators, _, seconds in found.gaps]
        told["cores"] = f"measured: between from {len(gaps)} models, with FP8's {min(gaps):.1e} to {max(gaps):.1e}"
        told["cores"] += "; message: " + words(fits["processor"])
        told["cores"] += (
            f"; pace: from {min(pace.readings):.2f} to {max(pace.readings):.2f} times while this was measured"
        )
    told |= {key: "measured: " + words(fit) for key, fit in fits.items() if "." in key}
    return sheet | {"provenance": told}, fits


def shape(device: torch.device) -> dict[str, Any]:
    """What the machine consists of."""
    if device.type == "cuda":
        card, count = torch.cuda.get_device_properties(device), torch.cuda.device_count()
        sizes = {"sms": card.multi_processor_count, "memory_bytes": card.total_memory}
    else:
        count = max(16, 4 * (os.cpu_count() or 1))  # processes that `weft train` starts here
        sizes = {"sms": 1, "memory_bytes": psutil.virtual_memory().total}
    return {"name": "local", "gpus": count, "node_size": count, **sizes, "price_per_hour": 0.0}


def best(found: operators.Measured, unit: str) -> float:
    """The highest rate at which products of `unit` ran; 0 if there were none."""
    rows = [row for key, rows in found.rows.items() if key.endswith(f".{unit}") for row in rows]
    return max((cost.flops / seconds for cost, seconds in rows), default=0.0)


def bandwidth(found: operators.Measured) -> float:
    """Bytes a second of operators that do little else than to move them."""
    rows = [row for name in ("add", "mul", "copy_", "_to_copy") for row in found.rows.get(name, [])]
    return median(cost.bytes / seconds for cost, seconds in rows if cost.bytes > LARGE)


def words(fit: Fit[Any]) -> str:
    return f"{fit.rows} rows, residual {fit.median:.1%} in the median, {fit.worst:.0%} at worst"


def text(sheet: dict[str, Any]) -> str:
    """The file."""
    machine = f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores"
    head = (
        f"# This machine ({machine}), measured by weft calibrate on {date.today()} with PyTorch {torch.__version__}.\n"
    )
    return head + yaml.safe_dump(sheet, sort_keys=False, default_flow_style=None, width=118)


def table(fits: dict[str, Fit[Any]]) -> str:
    """What was measured, and how far curves are from it."""
    rows = [
        (key.removeprefix("operators."), str(fit.rows), f"{fit.median:.1%}", f"{fit.worst:.0%}")
        for key, fit in fits.items()
    ]
    rows = [("curve", "rows", "median", "worst"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
