"""Optimiser states as bytes: dynamic block-wise quantisation (Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit
optimizers via block-wise quantization", 2022).

Values are divided by the largest magnitude of their block of 256 and rounded to the nearest of 256 numbers from 0 to 1
that are dense in relation to their size: of seven decades, 1e-7 .. 1e-6 up to 0.1 .. 1, decade d is cut into n equal
parts, whose middles are the numbers. Signed: n = 2 ** d, with either sign. Unsigned: n = 2 ** (d + 1). With 0 and 1
these are all 256. The byte is not an index into a sorted table but is computed, so that kernels need no table:

    signed    bit 7: sign; bits 0-6: n + j for part j of decade d, 0 for zero; 0x80 (a negative zero) is 1
    unsigned  n + j - 1; 0 for zero; 255 is 1
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import numpy as np

import nitinol.language as tl
from nitinol.language.jit import jit

BLOCK = 256  # values that share a scale
DECADES = tl.constexpr(7)
SMALLEST = tl.constexpr(1e-30)  # largest magnitude of a block that is not rounded to zeros


def size_of(decade: int) -> float:
    """Where a decade ends: 1e-6 for the first, 1 for the last."""
    return 10.0 ** (decade + 1 - DECADES.value)


def inverse_size_of(decade: int) -> float:
    """Its reciprocal, a power of ten that float32 holds exactly."""
    return 10.0 ** (DECADES.value - 1 - decade)


def number(decade: int, place: int, parts: int) -> float:
    """The middle of part `place` of a decade in `parts` parts."""
    return size_of(decade) * (0.1 + 0.9 * (place + 0.5) / parts)


def threshold(decade: int, shift: int) -> float:
    """Halfway between the last number below a decade (0 below the first) and its first; behind the last one, to 1."""
    below = number(decade - 1, (1 << (decade - 1 + shift)) - 1, 1 << (decade - 1 + shift)) if decade else 0.0
    above = number(decade, 0, 1 << (decade + shift)) if decade < DECADES.value else 1.0
    return (below + above) / 2


@jit
def from_dynamic(code, SIGNED: tl.constexpr):
    """Bytes to float32 between -1 and 1."""
    SHIFT: tl.constexpr = 0 if SIGNED else 1
    bits = code.to(tl.int32)
    place = (bits & 127) if SIGNED else bits + 1  # n + j
    mantissa = place.to(tl.float32)
    exponent = (mantissa.to(tl.int32, bitcast=True) >> 23) - 127  # n = 2 ** exponent
    part = ((127 - exponent) << 23).to(tl.float32, bitcast=True)  # 1 / n
    size = tl.full(code.shape, size_of(0), tl.float32)
    for decade in tl.static_range(1, DECADES):
        size = tl.where(exponent >= decade + SHIFT, size_of(decade), size)
    value = size * (0.1 + 0.9 * ((mantissa + 0.5) * part - 1.0))
    if SIGNED:
        value = tl.where(place == 0, (bits >> 7).to(tl.float32), tl.where(bits >= 128, -value, value))
    else:
        value = tl.where(bits == 0, 0.0, tl.where(bits == 255, 1.0, value))
    return value


@jit
def to_dynamic(value, SIGNED: tl.constexpr):
    """float32 between -1 and 1 to the byte of the nearest number, uint8. Unsigned values above 0 do not become 0, but
    the smallest number: a second moment of 0 under a first that is not would make a step of any length."""
    SHIFT: tl.constexpr = 0 if SIGNED else 1
    size = tl.abs(value)
    parts = tl.full(value.shape, float(1 << SHIFT), tl.float32)
    factor = tl.full(value.shape, inverse_size_of(0), tl.float32)
    for decade in tl.static_range(1, DECADES):
        above = size >= threshold(decade, SHIFT)
        parts = tl.where(above, float(1 << (decade + SHIFT)), parts)
        factor = tl.where(above, inverse_size_of(decade), factor)
    part = tl.floor((size * factor - 0.1) * (1.0 / 0.9) * parts)
    place = (parts + tl.minimum(tl.maximum(part, 0.0), parts - 1.0)).to(tl.int32)
    top = value >= threshold(DECADES, SHIFT)
    if SIGNED:
        place = tl.where(size < threshold(0, SHIFT), 0, tl.where(top, 128, place))
        negative = (value < 0) & (place > 0)
        return tl.where(negative, place + 128, place).to(tl.uint8)
    return tl.where(size > 0, tl.where(top, 255, place - 1), 0).to(tl.uint8)


@jit
def load_dynamic(codes, scales, group, inside, SIGNED: tl.constexpr):
    """Blocks `group` [groups] as float32 [groups, 256], 0 where not inside."""
    at = group.to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :]
    code = tl.load(codes + at, mask=inside[:, None], other=0)
    return from_dynamic(code, SIGNED) * tl.load(scales + group, mask=inside, other=0.0)[:, None]


@jit
def store_dynamic(codes, scales, group, inside, value, SIGNED: tl.constexpr):
    """The inverse: each block with its largest magnitude as scale."""
    at = group.to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :]
    largest = tl.max(tl.abs(value), axis=1)
    inverse = tl.where(largest >= SMALLEST, 1.0 / tl.maximum(largest, SMALLEST), 0.0)
    tl.store(codes + at, to_dynamic(value * inverse[:, None], SIGNED), mask=inside[:, None])
    tl.store(scales + group, largest, mask=inside)


def dynamic_numbers(signed: bool) -> np.ndarray:
    """The number of each byte, float64 [256]."""
    shift = 0 if signed else 1
    numbers = np.zeros(256)
    for decade in range(DECADES.value):
        parts = 1 << (decade + shift)
        for place in range(parts):
            numbers[parts + place - shift] = number(decade, place, parts)
    if signed:
        numbers[129:] = -numbers[1:128]
    numbers[128 if signed else 255] = 1.0
    return numbers


def quantize_reference(values: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [blocks, 256] and scales [blocks] of float64 values [blocks, 256], by search for the nearest number."""
    scales = np.abs(values).max(axis=1)
    usable = scales >= SMALLEST.value
    fractions = np.divide(values, scales[:, None], out=np.zeros_like(values), where=usable[:, None])
    numbers = dynamic_numbers(signed)
    order = np.argsort(numbers, kind="stable")
    middles = (numbers[order][1:] + numbers[order][:-1]) / 2
    codes = order[np.searchsorted(middles, fractions, side="right")]
    if not signed:
        codes = np.where((codes == 0) & (fractions > 0), 1, codes)
    return codes.astype(np.uint8), scales


def dequantize_reference(codes: np.ndarray, scales: np.ndarray, signed: bool) -> np.ndarray:
    """The values of bytes [blocks, 256] with scales [blocks], float64."""
    return dynamic_numbers(signed)[codes] * scales[:, None]
