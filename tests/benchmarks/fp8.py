"""FP8 against BF16 at V3's shapes, every backend that is installed: `python -m tests.benchmarks.fp8` on an H200.

Random data with outliers; between calls a large tensor is written, so that no operand waits in the cache; medians of
CUDA events. BF16 is cuBLAS's. Prints tables in Markdown with date and versions, goals beside figures, and writes all
figures to a JSON file. `--smoke` runs the same with tiny sizes anywhere, to test the script itself.

Weight gradients are timed twice: with the requantisation of both operands, as training calls them, and the GEMM alone.
Shapes with K = 512 are listed apart: there the output weighs more than the product.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import gemm
from kernels.fp8 import BLOCKS, COLUMNS, ROWS, backends, formats
from kernels.fp8.backends import BACKENDS, GEMMS, GROUPED, auto
from kernels.fp8.compare import Case, Sizes, seconds
from kernels.linear import Numerics, linear

SHAPES = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
"""(N, K) of V3's linears: q_a with kv_a, kv_a, q_b, kv_b, o, gate or up, down (DeepGEMM's test shapes)."""
GROUPED_SHAPES = [(4096, 7168), (7168, 2048)]
GOALS = {
    "linear": 1.6,
    "linear_wgrad, GEMM alone": 1.4,
    "grouped_linear": 1.5,
    "whole linear": 1.3,
    "casts": 0.75,
    "auto": 0.97,
}
Rows = list[dict[str, Any]]


@dataclass
class Bench:
    """Sizes, the machine, and what has been measured."""

    device: torch.device
    rows: list[int] = field(default_factory=lambda: [4096, 8192])
    shapes: list[tuple[int, int]] = field(default_factory=lambda: SHAPES)
    grouped_shapes: list[tuple[int, int]] = field(default_factory=lambda: GROUPED_SHAPES)
    experts: int = 4
    expert_rows: int = 8192
    cast: tuple[int, int] = (8192, 7168)
    repeats: int = 20

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self.flush = torch.empty(2**28 if on_gpu else 2**10, dtype=torch.uint8, device=self.device)
        # The reference only defines; it is timed where there is nothing else.
        self.names = [name for name in backends.available(self.device) if name != "reference"] or ["reference"]
        self.auto = backends.resolve("auto", self.device)

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of a call."""
        return seconds(call, self.device, self.repeats, self.flush)

    def those_with(self, operation: str, *widths: int) -> list[str]:
        """Backends that have `operation` and tile these widths."""
        have = [name for name in self.names if operation in BACKENDS[name].operations]
        return [name for name in have if not any(width % BACKENDS[name].multiple for width in widths)]


# ---------------------------------------------------------------- GEMMs
def bf16(case: Case) -> list[Callable[[], object]]:
    """What cuBLAS offers for the same operation in BF16; the fastest counts."""
    w = formats.dequantize(case.w, case.w_scales, BLOCKS).bfloat16()
    x, dy, counts = case.x, case.dy, case.sizes.counts
    out = torch.zeros(case.out_shape, device=case.device)
    match case.operation:
        case "linear":
            return [lambda: torch.mm(x, w.t())]
        case "linear_dgrad":
            return [lambda: torch.mm(dy, w)]
        case "linear_wgrad":
            return [lambda: gemm.accumulate_mm(out, dy.t(), x)]
        case "grouped_linear":
            return [lambda: gemm.grouped_mm(x, w.transpose(1, 2), counts), *_grouped_mm(x, w.transpose(1, 2), counts)]
        case "grouped_dgrad":
            return [lambda: gemm.grouped_mm(dy, w, counts), *_grouped_mm(dy, w, counts)]
        case _:
            return [lambda: gemm.grouped_accumulate_mm(out, dy, x, counts)]


def _grouped_mm(rows: Tensor, weight: Tensor, counts: list[int]) -> list[Callable[[], object]]:
    """torch's grouped GEMM, where there is one that is worth timing."""
    if rows.device.type != "cuda":
        return []
    ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
    return [lambda: torch._grouped_mm(rows, weight, ends)]


@contextmanager
def requantised(case: Case) -> Iterator[None]:
    """Inside, requantising the operands of `case` takes no time: it has been done."""
    groups = case.sizes.counts if case.grouped else [case.x.shape[0]]
    ready = {}
    for codes, scales in (case.x_codes, case.dy_codes):
        whole = [(codes, scales, groups)]
        parts = [(c, s, [n]) for c, s, n in zip(codes.split(groups), scales.split(groups), groups, strict=True)]
        ready |= {(c.data_ptr(), len(c)): auto.requantize(c, s, counts) for c, s, counts in whole + parts}

    def again(codes: Tensor, scales: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        return ready[codes.data_ptr(), len(codes)]

    with ExitStack() as patches:
        patches.enter_context(patch.object(auto, "requantize", again))
        if "triton" in backends.available(case.device):
            from kernels.fp8.backends.triton import gemm as ours

            patches.enter_context(patch.object(ours, "requantize", again))
        yield


def gemms(bench: Bench, operations: tuple[str, ...]) -> Rows:
    """One row for each operation and shape: microseconds of BF16, of every backend, and of auto."""
    rows: Rows = []
    for operation in operations:
        grouped = operation in GROUPED
        for M in [bench.experts * bench.expert_rows] if grouped else bench.rows:
            for N, K in bench.grouped_shapes if grouped else bench.shapes:
                counts = [bench.expert_rows] * bench.experts if grouped else [M]
                case = Case(operation, Sizes(M, N, K, counts), bench.device)
                baseline = min(bench.time(call) for call in bf16(case))
                rows.append(_row(bench, case, operation, baseline))
                if operation.endswith("wgrad") and bench.auto == "auto":
                    with requantised(case):
                        rows.append(_row(bench, case, f"{operation}, GEMM alone", baseline))
    return rows


def _row(bench: Bench, case: Case, what: str, baseline: float) -> dict[str, Any]:
    sizes = case.sizes
    out = torch.zeros(case.out_shape, device=case.device) if case.operation.endswith("wgrad") else None
    names = bench.those_with(case.operation, sizes.N, sizes.K)
    times = {name: bench.time(partial(case.run, name, out)) for name in dict.fromkeys([*names, bench.auto])}
    rows, flops = case.x.shape[0], case.flops
    return {"what": what, "M": rows, "N": sizes.N, "K": sizes.K, "flops": flops, "bf16": baseline, "times": times}


# ---------------------------------------------------------------- a whole linear
def whole_linears(bench: Bench) -> Rows:
    """Forward and backward of a linear with all casts, that of the weight too, and its weight gradient."""
    rows: Rows = []
    for M in bench.rows:
        for N, K in bench.shapes:
            x = torch.randn(M, K, device=bench.device).bfloat16().requires_grad_()
            dy = torch.randn(M, N, device=bench.device).bfloat16()
            weight = torch.nn.Parameter(torch.randn(N, K, device=bench.device).bfloat16())
            weight.main_grad = torch.zeros(N, K, device=bench.device)  # type: ignore[attr-defined]
            names = [name for name in bench.names if not backends.lacking(name)]
            names = list(
                dict.fromkeys([*(name for name in names if name in bench.those_with("linear", N, K)), bench.auto])
            )
            times = {name: bench.time(partial(_step, Numerics("fp8", name), x, dy, weight)) for name in names}
            baseline = bench.time(partial(_step, Numerics("bf16"), x, dy, weight))
            row = {"what": "whole linear", "M": M, "N": N, "K": K, "flops": 6 * M * N * K}
            rows.append({**row, "bf16": baseline, "times": times})
    return rows


def _step(numerics: Numerics, x: Tensor, dy: Tensor, weight: torch.nn.Parameter) -> None:
    numerics.bump()
    (y,) = linear(x, (weight,), numerics)
    x.grad = None
    y.backward(dy)
    numerics.weight_grads.run()


# ---------------------------------------------------------------- casts
def casts(bench: Bench) -> Rows:
    """Every cast: bytes that it must read and write, and how long each backend takes."""
    R, C = bench.cast
    x = torch.randn(R, C, device=bench.device).bfloat16()
    codes = formats.quantize(x, ROWS)
    packed = torch.cat([codes[0].view(torch.uint8), codes[1].view(torch.uint8), codes[0][:, :4].view(torch.uint8)], 1)
    travelled = packed[:, :C].view(codes[0].dtype), packed[:, C:-4]  # beside a routing weight
    order = torch.randperm(R, device=bench.device)
    once, scales = R * C, 4 * R * C // 128
    calls: dict[str, tuple[int, str, Callable[[Any], object]]] = {
        "1x128": (3 * once + scales, "quantize", lambda backend: backend.quantize(x, ROWS)),
        "1x128, power of two": (3 * once + scales, "quantize", lambda backend: backend.quantize(x, ROWS, True)),
        "128x1": (3 * once + scales, "quantize", lambda backend: backend.quantize(x, COLUMNS)),
        "128x128": (3 * once, "quantize", lambda backend: backend.quantize(x, BLOCKS)),
        "requantise, transposed": (
            2 * once + 2 * scales,
            "requantize",
            lambda backend: backend.requantize(*codes, [R]),
        ),
        "dequantise": (
            3 * once + scales,
            "dequantize",
            lambda backend: backend.dequantize(*codes, ROWS, torch.bfloat16),
        ),
        "pick rows that travelled, dequantise": (
            3 * once + scales,
            "gather_dequantize",
            lambda backend: backend.gather_dequantize(*travelled, order, torch.bfloat16),
        ),
    }
    copy = copy_bandwidth(bench, x)
    rows = [{"what": "copy", "bytes": 4 * once, "copy": copy, "times": {"torch": 4 * once / copy}}]
    for what, (size, operation, call) in calls.items():
        names = dict.fromkeys([*bench.those_with(operation, C), bench.auto])
        times = {name: bench.time(partial(call, backends.implementation(name, operation))) for name in names}
        rows.append({"what": what, "bytes": size, "copy": copy, "times": times})
    if "triton" in bench.names:
        rows += [{**row, "copy": copy} for row in fused(bench, x)]
    return rows


def fused(bench: Bench, x: Tensor) -> Rows:
    """Casts that our kernels fuse with what comes before them."""
    ours = backends.load("triton")
    R, C = x.shape
    once, scales = R * C, 4 * R * C // 128
    gate_up, weight = torch.randn(R, 2 * C, device=x.device).bfloat16(), torch.rand(R, device=x.device)
    gain, order = torch.ones(C, device=x.device).bfloat16(), torch.randperm(R, device=x.device)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "both groupings": (4 * once + 2 * scales, lambda: ours.quantize_both(x)),
        "SwiGLU, routing weight": (5 * once + scales, lambda: ours.swiglu_quantize(gate_up, weight)),
        "RMSNorm": (3 * once + scales, lambda: ours.rmsnorm_quantize(x, gain, 1e-6)),
        "permute": (3 * once + scales, lambda: ours.permute_quantize(x, order)),
    }
    return [{"what": what, "bytes": size, "times": {"triton": bench.time(c)}} for what, (size, c) in calls.items()]


def copy_bandwidth(bench: Bench, x: Tensor) -> float:
    """Bytes read plus bytes written a second by a device copy as large as the casts' input."""
    target = torch.empty_like(x)
    return 2 * x.nbytes / bench.time(lambda: target.copy_(x))


# ---------------------------------------------------------------- the report
def report(results: dict[str, Any]) -> str:
    """Markdown: what was measured where and when, a table for each part, and the goals."""
    lines = [f"FP8 on {results['device']}, {results['date']}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in results["versions"].items()), ""]
    by_what: dict[str, Rows] = {}
    for row in results["gemms"]:
        by_what.setdefault(row["what"], []).append(row)
    for what, rows in by_what.items():
        lines += [f"### {what}: TFLOP/s", "", *gemm_table(rows, results["auto"]), ""]
    if results["casts"]:
        lines += ["### casts: GB/s read and written", "", *cast_table(results["casts"]), ""]
    return "\n".join([*lines, "### goals", "", *goals(results)])


def gemm_table(rows: Rows, auto_name: str) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    names = [name for name in names if name != auto_name] + [auto_name]
    head = ["M", "N", "K", "BF16", *names, f"{auto_name} / BF16", "/ cublas", "/ transformer_engine", "/ best"]
    table = [_line(head), _line(["---:"] * len(head))]
    for row in rows:
        picked, times = row["times"][auto_name], row["times"]
        rates = [f"{row['flops'] / times[name] / 1e12:.0f}" if name in times else "" for name in names]
        ratios = [
            row["bf16"] / picked,
            *(times[n] / picked if n in times else None for n in ("cublas", "transformer_engine")),
        ]
        cells = [row["M"], row["N"], row["K"], f"{row['flops'] / row['bf16'] / 1e12:.0f}", *rates]
        table.append(_line([*cells, *("" if r is None else f"{r:.2f}" for r in [*ratios, best_share(row, auto_name)])]))
    return table


def cast_table(rows: Rows) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    head = ["cast", *names, "best / copy"]
    table = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        rates = {name: row["bytes"] / time for name, time in row["times"].items()}
        cells = [f"{rates[name] / 1e9:.0f}" if name in rates else "" for name in names]
        table.append(_line([row["what"], *cells, f"{max(rates.values()) / row['copy']:.2f}"]))
    return table


def goals(results: dict[str, Any]) -> list[str]:
    """Each goal beside its figure, shapes with K = 512 apart."""
    rows, name = results["gemms"], results["auto"]
    table = [_line(["", "goal", "measured", "K = 512"]), _line(["---", "---:", "---:", "---:"])]
    for what, goal in GOALS.items():
        if what in ("casts", "auto"):
            continue
        means = [
            geometric_mean(
                [r["bf16"] / r["times"][name] for r in rows if r["what"] == what and (r["K"] == 512) == small]
            )
            for small in (False, True)
        ]
        table.append(_line([f"{what} / BF16, geometric mean", f"{goal}", *(f"{m:.2f}" if m else "" for m in means)]))
    shares = [best_share(row, name) for row in rows]
    table.append(_line(["auto / best backend, worst shape", GOALS["auto"], f"{min(shares):.2f}" if shares else "", ""]))
    bandwidths = [row["bytes"] / min(row["times"].values()) / row["copy"] for row in results["casts"][1:]]
    worst = f"{min(bandwidths):.2f}" if bandwidths else ""
    table.append(_line(["cast / copy bandwidth, worst cast", GOALS["casts"], worst, ""]))
    return table


def best_share(row: dict[str, Any], auto_name: str) -> float:
    """How fast auto is beside the best backend."""
    return min(row["times"].values()) / row["times"][auto_name]


def geometric_mean(values: list[float]) -> float | None:
    """None for no values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "gemms": lambda bench: gemms(bench, GEMMS),
    "grouped": lambda bench: gemms(bench, GROUPED),
    "linear": whole_linears,
    "casts": casts,
}


def measure(bench: Bench, parts: list[str]) -> dict[str, Any]:
    """All figures of these parts, in seconds."""
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "CUDA": str(torch.version.cuda),
            **{name: auto.version(name) for name in ("triton", "transformer-engine")},
        },
        "auto": bench.auto,
        "gemms": [],
        "casts": [],
    }
    for part in parts:
        results["casts" if part == "casts" else "gemms"] += PARTS[part](bench)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on whatever machine")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--json", type=Path, default=Path("fp8-results.json"), help="where all figures go")
    options = parser.parse_args(words)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if options.smoke:
        bench = Bench(device, [32], [(48, 160), (64, 512)], [(48, 160)], 2, 32, (160, 272), repeats=2)
    elif device.type == "cpu":
        parser.error("these sizes need a GPU; --smoke runs anywhere")
    else:
        bench = Bench(device)
    results = measure(bench, options.part or list(PARTS))
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(report(results))


if __name__ == "__main__":
    main()
