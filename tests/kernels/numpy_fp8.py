"""Block-scaled E4M3 written a second time, in NumPy, from its definition: the judge of `kernels/fp8`."""

import numpy as np


def _table() -> np.ndarray:
    """The value of each of the 128 codes without sign; the last is NaN."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[127] = np.nan
    return values


VALUES = _table()


def encode(y: np.ndarray) -> np.ndarray:
    """FP32 -> the nearest E4M3 code, ties to the even code, saturating (callers stay within half a step of 448)."""
    magnitude = np.abs(y.astype(np.float64))
    above = np.clip(np.searchsorted(VALUES[:127], magnitude), 0, 126)
    below = np.maximum(above - 1, 0)
    to_below, to_above = magnitude - VALUES[below], VALUES[above] - magnitude
    take_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return (np.where(take_above, above, below) + 128 * np.signbit(y)).astype(np.uint8)


def decode(codes: np.ndarray) -> np.ndarray:
    return np.where(codes >= 128, -1.0, 1.0) * VALUES[codes & 127]


def quantize(x: np.ndarray, rows: int, columns: int, power_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Codes and FP32 scales of a matrix, one tile after another."""
    x = x.astype(np.float32)
    R, C = x.shape
    codes = np.zeros((R, C), np.uint8)
    scales = np.zeros((-(-R // rows), -(-C // columns)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            tile = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale = np.float32(max(np.abs(x[tile]).max(), np.float32(1e-4))) / np.float32(448)
            if power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            scales[i, j] = scale
            codes[tile] = encode(x[tile] / scale)
    return codes, scales


def dequantize(codes: np.ndarray, scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """FP64, exact."""
    expanded = scales.astype(np.float64).repeat(rows, 0).repeat(columns, 1)[: codes.shape[0], : codes.shape[1]]
    return decode(codes) * expanded


def to_columns(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What 1x128 tiles mean after dequantising to FP32 and requantising 128x1, in FP64."""
    rounded = dequantize(codes, scales, 1, 128).astype(np.float32)
    return dequantize(*quantize(rounded, 128, 1), 128, 1)
