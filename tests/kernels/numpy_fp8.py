"""Block-scaled E4M3 and E5M6 written a second time, in NumPy, from their definition: the judge of `kernels/fp8`.

Nothing here is shared with the code that it judges, and no cast of PyTorch's: rounding works on the bits of FP32, tiles
are cut one after another, words are unpacked as a string of bits.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """A sign, `exponent` bits of exponent with the usual bias, and `mantissa` bits."""

    exponent: int
    mantissa: int
    largest: float
    nan: int  # without the sign

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)


E4M3 = Format(4, 3, 448.0, 0x7F)
E5M2 = Format(5, 2, 57344.0, 0x7E)
E5M6 = Format(5, 6, 65024.0, 0x7E0)


def encode(y: np.ndarray, form: Format = E4M3) -> np.ndarray:
    """FP32 -> the nearest code, ties to the even code, for values within half a step of the largest; NaN -> NaN."""
    bits = y.astype(np.float32).view(np.uint32).astype(np.int64)
    field, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    exponent = np.maximum(field, 1) - 127  # |y| = significand x 2^(exponent - 23)
    significand = np.where(field > 0, fraction | 1 << 23, fraction)
    smallest = 1 - form.bias  # the exponent of the smallest normal number, and of subnormals
    # Drop what is below the format's last digit, 2^(max(exponent, smallest) - mantissa).
    dropped = np.minimum(23 - form.mantissa + np.maximum(smallest - exponent, 0), 40)
    kept, rest, half = significand >> dropped, significand & (1 << dropped) - 1, 1 << dropped - 1
    kept += (rest > half) | ((rest == half) & (kept % 2 == 1))
    # A carry out of the mantissa adds one to the exponent, by itself.
    code = kept + (np.maximum(exponent - smallest, 0) << form.mantissa)
    return np.where(np.isnan(y), form.nan, code) + np.where(bits >> 31 == 1, form.sign, 0)


def decode(codes: np.ndarray, form: Format = E4M3) -> np.ndarray:
    """FP64, exact."""
    codes = codes.astype(np.int64)
    magnitude = codes & form.sign - 1
    field, fraction = magnitude >> form.mantissa, magnitude & (1 << form.mantissa) - 1
    significand = np.where(field > 0, fraction + (1 << form.mantissa), fraction)
    values = significand * 2.0 ** (np.maximum(field, 1) - form.bias - form.mantissa)
    return np.where(magnitude == form.nan, np.nan, np.where(codes & form.sign, -values, values))


def scale_of(values: np.ndarray, power_of_two: bool, form: Format) -> np.float32:
    """The scale of one tile."""
    scale = np.maximum(np.abs(values).max(), np.float32(1e-4)) / np.float32(form.largest)
    if power_of_two and np.isfinite(scale):
        half_to_one, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (half_to_one == 0.5))
    return np.float32(scale)


def quantize(
    x: np.ndarray, rows: int, columns: int, power_of_two: bool = False, form: Format = E4M3
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and FP32 scales of a matrix, one tile after another."""
    x = x.astype(np.float32)
    R, C = x.shape
    codes = np.zeros((R, C), np.uint16)
    scales = np.zeros((-(-R // rows), -(-C // columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        tile = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scales[i, j] = scale_of(x[tile], power_of_two, form)
        codes[tile] = encode(x[tile] / scales[i, j], form)
    return codes, scales


def dequantize(codes: np.ndarray, scales: np.ndarray, rows: int, columns: int, form: Format = E4M3) -> np.ndarray:
    """FP64, exact."""
    expanded = scales.astype(np.float64).repeat(rows, 0).repeat(columns, 1)[: codes.shape[0], : codes.shape[1]]
    return decode(codes, form) * expanded


def requantize(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [R, C] in 1x128 tiles, dequantised to FP32 -> codes [R, C] in 128x1 tiles and scales [ceil(R / 128), C].

    A tile has a power-of-two scale if all the scales that its values had are powers of two.
    """
    x = dequantize(codes, scales, 1, 128).astype(np.float32)
    is_power = np.frexp(scales)[0] == 0.5
    again = np.zeros_like(codes), np.zeros((-(-x.shape[0] // 128), x.shape[1]), np.float32)
    for i, c in np.ndindex(again[1].shape):
        rows = slice(i * 128, (i + 1) * 128)
        tile, scale = quantize(x[rows, c : c + 1], 128, 1, is_power[rows, c // 128].all())
        again[0][rows, c : c + 1], again[1][i, c] = tile, scale[0, 0]
    return again


def to_columns(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What 1x128 tiles mean after requantising 128x1, in FP64."""
    return dequantize(*requantize(codes, scales), 128, 1)


def unpack_12(words: np.ndarray) -> np.ndarray:
    """Codes of 12 bits [R, 8 n] from 32-bit words [R, 3 n], read as one string of bits from the highest on."""
    R, n = words.shape
    bits = np.unpackbits(np.frombuffer(words.astype(">i4").tobytes(), np.uint8))
    return bits.reshape(R, n * 32 // 12, 12).astype(np.int64) @ (1 << np.arange(11, -1, -1))
