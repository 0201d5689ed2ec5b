"""The element-wise loops of FP8 on a CPU, compiled once from `tiles.cpp` where there is a C++ compiler.

They are an accelerator beneath `formats` and `e5m6`, not another meaning: bit for bit what PyTorch's operators
give in about ten passes over memory each. Without a compiler everything works, slower.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("tiles.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, built on first use into $WEFT_CACHE (else ~/.cache/weft); None where that is impossible."""
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError):
        return None


def _build() -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("g++")
    source = SOURCE.read_bytes()
    what = hashlib.sha256(source + " ".join(FLAGS).encode() + _processor()).hexdigest()[:16]
    folder = Path(os.environ.get("WEFT_CACHE") or Path.home() / ".cache" / "weft")
    target = folder / f"fp8-tiles-{what}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # other ranks may be building: the last rename wins
            built = Path(scratch) / target.name
            command = [compiler, *FLAGS, "-o", str(built), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            built.replace(target)
    return target


def _processor() -> bytes:
    """What `-march=native` depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return platform.processor().encode()


def loops(x: Tensor) -> ctypes.CDLL | None:
    """The library if it can work on `x`."""
    return library() if x.device.type == "cpu" else None


def quantize_rows(lib: ctypes.CDLL, x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`formats.quantize` of BF16 in 1x128 tiles."""
    *rows, C = x.shape
    x = x.contiguous()
    codes = torch.empty(*rows, C, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*rows, -(-C // 128))
    lib.quantize_rows(
        _data(x), _long(math.prod(rows)), _long(C), ctypes.c_bool(power_of_two), _data(codes), _data(scales)
    )
    return codes, scales


def e5m6_quantize(lib: ctypes.CDLL, x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """`e5m6.quantize` of BF16."""
    *rows, C = x.shape
    x = x.contiguous()
    words = torch.empty(*rows, -(-C // 8) * 3, dtype=torch.int32)
    scales = torch.empty(*rows, -(-C // 128))
    lib.e5m6_quantize(
        _data(x), _long(math.prod(rows)), _long(C), ctypes.c_bool(power_of_two), _data(words), _data(scales)
    )
    return words, scales


def e5m6_dequantize(lib: ctypes.CDLL, words: Tensor, scales: Tensor, columns: int) -> Tensor:
    """`e5m6.dequantize`."""
    rows = words.shape[:-1]
    words, scales = words.contiguous(), scales.contiguous()
    values = torch.empty(*rows, columns)
    lib.e5m6_dequantize(_data(words), _data(scales), _long(math.prod(rows)), _long(columns), _data(values))
    return values


def widen(lib: ctypes.CDLL, codes: Tensor) -> Tensor:
    """`formats.widen`."""
    codes = codes.contiguous()
    values = torch.empty(codes.shape)
    lib.widen(_data(codes), _long(codes.numel()), _data(values))
    return values


def regroup(lib: ctypes.CDLL, codes_TC: Tensor, scales: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """`formats.regroup`."""
    C = codes_TC.shape[1]
    tiles = sum(-(-count // 128) for count in counts)
    codes, scales = codes_TC.contiguous(), scales.contiguous()
    values, column_scales = torch.empty(tiles * 128, C), torch.empty(tiles, C)
    groups = (ctypes.c_int64 * len(counts))(*counts)
    lib.regroup(_data(codes), _data(scales), groups, _long(len(counts)), _long(C), _data(values), _data(column_scales))
    return values, column_scales


_long = ctypes.c_int64


def _data(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
