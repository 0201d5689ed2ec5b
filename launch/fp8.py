"""`weft doctor --fp8`: every FP8 backend that works here, operation by operation, against the reference.

A cast is right when every byte equals the reference's, a GEMM when its `calc_diff` stays below 1e-5: both sides read
the same FP8 operands, so only the order and precision of sums differ. The reference's own GEMMs are held against FP64.
Small ragged shapes show mistakes at edges; times mean something on a GPU only, and there `tests/benchmarks/fp8.py`
measures at full size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.fp8 import backends
from kernels.fp8.backends import BACKENDS, OPERATIONS, QUANTISATIONS, auto
from kernels.fp8.compare import Case, Sizes, Verdict, judge, seconds


@dataclass(frozen=True)
class Row:
    """One operation of one backend: how it compares and how long it takes, or why it did not run."""

    operation: str
    backend: str
    verdict: Verdict | None
    microseconds: float = 0.0
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether it ran, and agrees as far as its backend promises."""
        exact = self.operation in QUANTISATIONS and self.operation not in BACKENDS[self.backend].inexact
        return self.verdict is not None and self.verdict.good(exact)

    def __str__(self) -> str:
        if self.verdict is None:
            return f"{self.operation:<18}{self.backend:<20}FAILED {self.failure}"
        v = self.verdict
        return (
            f"{self.operation:<18}{self.backend:<20}{100 * v.equal:>9.3f} %{v.diff:>12.1e}{v.largest:>12.1e}"
            f"{self.microseconds:>11.1f} us  {'ok' if self.good else 'DIFFERS'}"
        )


def main(sizes: Sizes | None = None) -> int:
    """Print the table; returns 1 if a backend that works here is wrong."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"FP8 on {on}, torch {torch.__version__}\n")
    for line in presence(device):
        print(line)
    print(f"\n{'operation':<18}{'backend':<20}{'equal bytes':>11}{'calc_diff':>12}{'max error':>12}{'time':>11}")
    bad = 0
    for row in rows(device, sizes or Sizes()):
        print(row, flush=True)
        bad += not row.good
    print(f"\nauto would pick from: {picks(device)}")
    if device.type == "cpu":
        print("without a GPU nothing but the reference runs; what has run on one: docs/reference/fp8-results.md")
    print(f"{bad} operations are wrong" if bad else "every operation is right")
    return 1 if bad else 0


def presence(device: torch.device) -> Iterator[str]:
    """One line for each backend: whether it works here, why not, and what it lacks by nature."""
    for name, backend in BACKENDS.items():
        if name == "auto":
            continue
        reason = backends.obstacle(name, device)
        missing = [operation for operation in OPERATIONS if operation not in backend.operations]
        lacks = f"; has no {', '.join(missing)}" if missing else ""
        yield f"{name:<20}{f'no: {reason}' if reason else 'works here'}{lacks}"


def rows(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Every operation of every backend that works here."""
    for operation in OPERATIONS:
        case = Case(operation, sizes, device, torch.float32)
        for name in backends.available(device):
            if operation not in BACKENDS[name].operations:
                continue
            try:
                verdict = judge(case, name)
                time = seconds(lambda case=case, name=name: case.run(name), device, repeats=5)  # type: ignore[misc]
            except (RuntimeError, ValueError, TypeError) as error:
                yield Row(operation, name, None, failure=str(error).splitlines()[0])
                continue
            yield Row(operation, name, verdict, 1e6 * time)


def picks(device: torch.device) -> str:
    """Among which backends `auto` would choose for each operation."""
    lists = {operation: " or ".join(auto.candidates(operation, device)) for operation in OPERATIONS}
    if len(set(lists.values())) == 1:
        return f"{lists[OPERATIONS[0]]} for everything"
    return "; ".join(f"{operation}: {names}" for operation, names in lists.items())
