"""`weft doctor`: what this machine has, what it lacks for which purpose, and what nobody has tried.

Every line is one finding: a mark, a name, what was found and, where it matters, what to do about it. A missing thing
that stops even recipe `tiny` makes the exit code 1.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement

from train.data.config import DataConfig

MARKS = {"good": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True)
class Finding:
    """One line: how good it is (`good`, `note`, `bad`), of what, and what was found."""

    verdict: str
    name: str
    found: str


def main() -> int:
    """Print the diagnosis; returns 1 if something stops recipe `tiny`."""
    findings = [*interpreter(), *packages(), *tools(), *machine(), *devices(), *places()]
    for finding in findings:
        print(f"{MARKS[finding.verdict]}  {finding.name:<20}{finding.found}")
    bad = sum(finding.verdict == "bad" for finding in findings)
    print(f"\n{f'{bad} findings stop weft here' if bad else 'recipe tiny can run here: weft train recipe=tiny'}")
    return 1 if bad else 0


def interpreter() -> Iterator[Finding]:
    """Python itself."""
    version = platform.python_version()
    yield Finding(
        "good" if sys.version_info >= (3, 11) else "bad", "python", f"{version} ({sys.executable}); 3.11 or newer"
    )


def packages() -> Iterator[Finding]:
    """What pyproject.toml asks for, against what is installed."""
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("weft") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "note", "weft", "runs from a checkout that is not installed: versions of packages are not checked"
        )
        return
    for need in wanted:
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in ("", "gpu")):
            continue
        optional = need.marker is not None
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            advice = f"missing, for GPUs only: pip install 'weft[gpu]' ({need})" if optional else f"missing: {need}"
            yield Finding("note" if optional else "bad", need.name, advice)
            continue
        fits = need.specifier.contains(version, prereleases=True)
        yield Finding(
            "good" if fits else "bad", need.name, version if fits else f"{version}, expected {need.specifier}"
        )


def tools() -> Iterator[Finding]:
    """Compilers that torch and DeepSpeed may call."""
    for tool, purpose in (("g++", "C++ extensions"), ("ninja", "faster builds of them"), ("nvcc", "CUDA extensions")):
        path = shutil.which(tool)
        yield Finding("good" if path else "note", tool, path or f"not found; needed for {purpose} only")


def machine() -> Iterator[Finding]:
    """Cores, memory and threads."""
    cores = os.cpu_count() or 1
    yield Finding("good" if cores >= 2 else "note", "cores", f"{cores}; recipe tiny runs 4 processes on them")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding("good" if memory >= 8 else "bad", "memory", f"{memory:.0f} GB; recipe tiny wants 8")
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding("good", "OMP_NUM_THREADS", threads or "not set: cores / processes")
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    yield Finding("good" if gloo else "bad", "gloo", "available" if gloo else "this torch is built without it")


def devices() -> Iterator[Finding]:
    """GPUs, and how much to expect of weft on them."""
    if not torch.cuda.is_available():
        yield Finding("note", "GPU", "none that torch can use: training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        fp8 = "FP8 GEMMs" if (gpu.major, gpu.minor) >= (9, 0) else "no FP8 GEMMs (compute capability 9.0 or newer)"
        yield Finding("good", f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, {fp8}")
    never = (
        "training, the NCCL backend, parallel.dispatch=deepep, FP8 backends transformer_engine, triton, cublas and auto"
    )
    yield Finding("note", "never run on a GPU", f"{never}; weft doctor --fp8 runs the last four")


def places() -> Iterator[Finding]:
    """Where data is kept and whether W&B is set up."""
    cache = DataConfig().cache_directory()
    prepared = len(list(cache.glob("data/*/manifest.json")))
    parent = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    writable = os.access(parent, os.W_OK)
    found = f"{cache} ($WEFT_CACHE), {prepared} prepared, {shutil.disk_usage(parent).free / 1e9:.0f} GB free"
    yield Finding("good" if writable else "bad", "data cache", found if writable else f"{cache}: cannot be written")
    known = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in netrc()
    advice = "key found" if known else "no key: wandb.mode=offline works, online needs `wandb login`"
    yield Finding("good" if known else "note", "W&B", advice)


def netrc() -> str:
    """The user's .netrc, where `wandb login` keeps its key, or nothing."""
    try:
        return Path("~/.netrc").expanduser().read_text()
    except OSError:
        return ""
