"""The functions of the tile language behind elementwise operations: what each computes on tiles, types included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nitinol.language import math as tl
from nitinol.language import semantic
from nitinol.language.core import tensor
from nitinol.language.types import DType, float32, int1


def in_floats(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Integers become fp32 first, as in NumPy; the tile language alone would refuse them."""

    def convert(x: tensor) -> tensor:
        return function(semantic.cast(x, float32) if x.dtype.is_int else x)  # type: ignore[union-attr]

    return convert


def halves(function: Callable[..., Any]) -> Callable[..., Any]:
    """Composed functions of half types compute in fp32 and round once."""

    def wide(x: tensor, **attributes: Any) -> tensor:
        narrow = x.dtype
        if isinstance(narrow, DType) and narrow.is_float and narrow.bits == 16:
            return semantic.cast(function(semantic.cast(x, float32), **attributes), narrow)
        return function(x, **attributes)

    return wide


def sigmoid(x: tensor) -> tensor:
    return 1.0 / (tl.exp(-x) + 1.0)


def gelu(x: tensor) -> tensor:
    return x * 0.5 * (tl.erf(x * math.sqrt(0.5)) + 1.0)


def gelu_tanh(x: tensor) -> tensor:
    return x * 0.5 * (tl.tanh((x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)) + 1.0)


def sign(x: tensor) -> tensor:
    ones = semantic.constant(1, x.dtype)
    result = semantic.where(semantic.compare("gt", x, 0), ones, semantic.constant(0, x.dtype))
    if not x.dtype.is_float and not x.dtype.is_signed:  # type: ignore[union-attr]
        return result
    result = semantic.where(semantic.compare("lt", x, 0), semantic.constant(-1, x.dtype), result)
    return semantic.where(semantic.compare("ne", x, x), x, result) if x.dtype.is_float else result  # type: ignore


def invert(x: tensor) -> tensor:
    return semantic.invert(x)


def same(x: tensor) -> tensor:
    return x


def floor_divide(x: tensor, y: tensor) -> tensor:
    """Rounds down, as Python; the tile language's own // truncates. Integers by 0 give 0."""
    x, y = semantic.unify(x, y, "/" if tensor_is_float(x, y) else "//")
    if x.dtype.is_float:  # type: ignore[union-attr]
        return tl.floor(x / y)
    quotient, rest = quotient_and_rest(x, y)
    if not x.dtype.is_signed:  # type: ignore[union-attr]
        return quotient
    off = semantic.compare("ne", rest, 0) & ((rest < 0) ^ (y < 0))
    return semantic.where(off, quotient - 1, quotient)


def mod(x: tensor, y: tensor) -> tensor:
    """The sign of the divisor, as Python. Integers by 0 give 0."""
    x, y = semantic.unify(x, y, "%")
    if x.dtype.is_float:  # type: ignore[union-attr]
        rest = semantic.mod(x, y)
    else:
        rest = quotient_and_rest(x, y)[1]
        if not x.dtype.is_signed:  # type: ignore[union-attr]
            return rest
    off = semantic.compare("ne", rest, 0) & ((rest < 0) ^ (y < 0))
    return semantic.where(off, rest + y, rest)


def quotient_and_rest(x: tensor, y: tensor) -> tuple[tensor, tensor]:
    """Quotient and remainder of integers as in C, but 0 and 0 where the divisor is 0; processors trap on that, and on
    the smallest integer by -1."""
    zero = semantic.compare("eq", y, 0)
    unsafe = zero
    if x.dtype.is_signed:  # type: ignore[union-attr]
        minus = semantic.compare("eq", y, -1)
        unsafe = zero | minus
    divisor = semantic.where(unsafe, 1, y)
    quotient = semantic.floordiv(x, divisor)
    rest = x - quotient * divisor
    if x.dtype.is_signed:  # type: ignore[union-attr]
        quotient = semantic.where(minus, -x, quotient)
    return semantic.where(zero, 0, quotient), semantic.where(zero, 0, rest)


def tensor_is_float(*values: tensor) -> bool:
    return any(v.dtype.is_float for v in values)  # type: ignore[union-attr]


def power(x: tensor, y: tensor) -> tensor:
    """Of floats: exp2(y log2 |x|), with the sign that a whole y gives; NaN for negative x and other y."""
    x, y = semantic.unify(x, y, "/")
    if not x.dtype.is_float:  # type: ignore[union-attr]
        x, y = semantic.cast(x, float32), semantic.cast(y, float32)
    narrow = x.dtype
    if narrow.bits == 16:  # type: ignore[union-attr]
        x, y = semantic.cast(x, float32), semantic.cast(y, float32)
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole_exponent = semantic.compare("eq", tl.floor(y), y)
    half = y * 0.5
    odd = whole_exponent & semantic.compare("ne", tl.floor(half), half)
    signed = semantic.where(odd, -size, size)
    signed = semantic.where(whole_exponent, signed, float("nan"))
    result = semantic.where(x < 0, signed, size)
    result = semantic.where(semantic.compare("eq", y, 0), 1.0, result)
    return semantic.cast(result, narrow)


def add(x: tensor, y: tensor) -> tensor:
    """Booleans add to a boolean, as in NumPy and torch: true and true is true, not the 0 of one bit."""
    return semantic.bitwise("or", "|", x, y) if x.dtype == y.dtype == int1 else semantic.add(x, y)


def whole_power(x: tensor, exponent: int) -> tensor:
    """x * x * ... by squaring."""
    result, factor, left = None, x, exponent
    while left:
        if left & 1:
            result = factor if result is None else result * factor
        left >>= 1
        factor = factor * factor if left else factor
    assert result is not None
    return result
