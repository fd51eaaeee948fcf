"""Elementwise functions, also reachable as `tl.math.*`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nitinol.language.core import emit, known, member, tensor
from nitinol.language.semantic import bitcast, cast, mod, to_tensor, truediv, unify
from nitinol.language.types import DType, bfloat16, float16, float32, int32, int64, uint32, uint64


class PropagateNan:
    """Whether min, max and clamp return NaN when one operand is NaN (ALL) or the other operand (NONE)."""

    NONE = 0
    ALL = 0xFFFF


def _unary(kind: str, text: str) -> Callable[[Any], tensor]:
    def function(x: Any) -> tensor:
        x = to_tensor(x, f"the operand of {kind}")
        if not isinstance(x.dtype, DType) or not x.dtype.is_float:
            raise TypeError(f"{kind} takes floats, found {x.dtype}; cast with .to(tl.float32)")
        dtype = x.dtype
        if dtype in (float16, bfloat16):  # computed in fp32 and rounded once (Triton refuses half types here)
            x = cast(x, float32)
        return cast(emit(kind, (x,), x.type), dtype)

    function.__name__ = function.__qualname__ = kind
    function.__doc__ = f"{text}, elementwise; floats. Half types are computed in fp32 and rounded back."
    return member(function)


exp = _unary("exp", "e to the x")
exp2 = _unary("exp2", "2 to the x")
log = _unary("log", "The natural logarithm")
log2 = _unary("log2", "The binary logarithm")
sqrt = _unary("sqrt", "The square root")
rsqrt = _unary("rsqrt", "1 / sqrt(x)")
sin = _unary("sin", "The sine (radians)")
cos = _unary("cos", "The cosine (radians)")
tanh = _unary("tanh", "The hyperbolic tangent")
erf = _unary("erf", "The error function")
floor = _unary("floor", "The largest integer not above x, as a float")
ceil = _unary("ceil", "The smallest integer not below x, as a float")
sqrt_rn = sqrt


@member
def abs(x: Any) -> tensor:
    """The absolute value; unsigned integers as they are."""
    x = to_tensor(x, "the operand of abs")
    if isinstance(x.dtype, DType) and (x.dtype.is_float or x.dtype.is_signed):
        return emit("abs", (x,), x.type)
    if not isinstance(x.dtype, DType):
        raise TypeError(f"abs does not take {x.dtype}")
    return x


def fma(x: Any, y: Any, z: Any) -> tensor:
    """x * y + z with one rounding; floats."""
    x, y = unify(x, y, "fma")
    z, x = unify(z, x, "fma")
    z, y = unify(z, y, "fma")
    if not x.dtype.is_float:  # type: ignore[union-attr]
        raise TypeError(f"fma takes floats, found {x.dtype}")
    return emit("fma", (x, y, z), x.type)


def _extremum(kind: str, x: Any, y: Any, propagate_nan: Any) -> tensor:
    x, y = unify(x, y, f"{kind}imum")
    nan = known(propagate_nan, "propagate_nan") in (PropagateNan.ALL, True)
    if x.dtype.is_float and nan:  # type: ignore[union-attr]
        return emit(kind, (x, y), x.type, propagate_nan=True)
    return emit(kind, (x, y), x.type)


def minimum(x: Any, y: Any, propagate_nan: Any = PropagateNan.NONE) -> tensor:
    """The smaller operand; of a number and NaN the number unless propagate_nan is ALL."""
    return _extremum("min", x, y, propagate_nan)


def maximum(x: Any, y: Any, propagate_nan: Any = PropagateNan.NONE) -> tensor:
    """The larger operand; of a number and NaN the number unless propagate_nan is ALL."""
    return _extremum("max", x, y, propagate_nan)


def clamp(x: Any, min: Any, max: Any, propagate_nan: Any = PropagateNan.NONE) -> tensor:
    """x limited to min..max; floats. The result is undefined if min > max."""
    result = minimum(maximum(x, min, propagate_nan), max, propagate_nan)
    if not result.dtype.is_float:  # type: ignore[union-attr]
        raise TypeError(f"clamp takes floats, found {result.dtype}; use tl.minimum(tl.maximum(x, low), high)")
    return result


def fdiv(x: Any, y: Any, ieee_rounding: Any = False) -> tensor:
    """x / y of floats, always correctly rounded, in the operands' type."""
    x, y = to_tensor(x), to_tensor(y)
    for operand in (x, y):
        if not isinstance(operand.dtype, DType) or not operand.dtype.is_float:
            raise TypeError(f"fdiv takes floats, found {operand.dtype}")
    x, y = unify(x, y, "fdiv")
    return emit("div", (x, y), x.type)


div_rn = truediv


def umulhi(x: Any, y: Any) -> tensor:
    """The high half of the product of two 32-bit or 64-bit integers, which are read as unsigned."""
    x, y = unify(x, y, "umulhi")
    dtype = x.dtype
    if dtype not in (int32, int64, uint32, uint64):
        raise TypeError(f"umulhi takes integers of 32 or 64 bits, found {dtype}")
    unsigned = uint32 if dtype in (int32, uint32) else uint64
    x, y = bitcast(x, unsigned), bitcast(y, unsigned)
    return bitcast(emit("mulhi", (x, y), x.type), dtype)


fmod = mod
