"""What each elementwise operation of the tile IR computes, in NumPy: the arithmetic of the interpreter and of folding.

A value of an element type is held in this NumPy dtype: int1 as bool, bf16 as float32 that is rounded to bfloat16 after
each operation, a pointer as int64, every other as itself. An operation on one element type takes and gives arrays of
one shape (or arrays that broadcast, for regions of reductions).

Where the IR leaves a result open, this file decides, so that runs repeat: integer division by zero gives 0 and its
remainder the dividend; the smallest integer divided by -1 wraps; shifting by the width or more shifts everything out;
float to int saturates and NaN becomes 0 (LLVM's `fptosi.sat`). Targets need not agree on these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nitinol.compiler.ir import Op
from nitinol.language.types import DType, PointerType, bfloat16, float32, float64, int1

Array = Any  # an ndarray or a NumPy scalar

_KINDS = {"bool": "?", "int": "i", "uint": "u", "float": "f"}


def numpy_dtype(element: DType | PointerType) -> np.dtype:
    """The dtype that holds values of the element type during interpretation."""
    if isinstance(element, PointerType):
        return np.dtype(np.int64)
    if element in (bfloat16, int1):
        return np.dtype(np.float32 if element == bfloat16 else np.bool_)
    return np.dtype(f"{_KINDS[element.kind]}{element.nbytes}")


def memory_dtype(element: DType) -> np.dtype:
    """The dtype of the same width that holds the element in memory: bf16 as uint16, int1 as a byte."""
    if element == bfloat16:
        return np.dtype(np.uint16)
    return np.dtype(np.uint8) if element == int1 else numpy_dtype(element)


def from_memory(raw: Array, element: DType) -> Array:
    """Values from what `memory_dtype` holds."""
    if element == bfloat16:
        return np.left_shift(raw, 16, dtype=np.uint32).view(np.float32)
    return np.not_equal(raw, 0) if element == int1 else raw


def to_memory(values: Array, element: DType) -> Array:
    """Values as `memory_dtype` holds them; the inverse of `from_memory`."""
    if element == bfloat16:
        return np.asarray(np.asarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return np.asarray(values, memory_dtype(element))


def poison(element: DType) -> Array:
    """What a masked-off lane holds: NaN, the smallest signed or the largest unsigned integer, True."""
    if element.is_float:
        return numpy_dtype(element).type(np.nan)
    if element == int1:
        return np.True_
    limits = np.iinfo(numpy_dtype(element))
    return numpy_dtype(element).type(limits.min if element.is_signed else limits.max)


# ----------------------------------------------------------------------------------------------------- rounding


def _round_bfloat16(x: Array) -> Array:
    """float32 to the nearest bfloat16, ties to even, as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    quiet = (bits | np.uint32(0x400000)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint32).view(np.float32)


def _to_odd(near: Array, error: Array) -> Array:
    """`near`, rounded to nearest with `error` lost, becomes the neighbour with an odd last bit unless it was exact.

    Rounding that once more, to a format at least two bits shorter, gives what one rounding would have given.
    """
    near = np.asarray(near)
    even = near.view(np.dtype(f"u{near.itemsize}")) & 1 == 0
    neighbour = np.nextafter(near, np.copysign(near.dtype.type(np.inf), error).astype(near.dtype))
    return np.where(even & (error != 0) & np.isfinite(near) & np.isfinite(error), neighbour, near)


def round_to(x: Array, element: DType | PointerType) -> Array:
    """Floats of any width rounded once, to nearest even, to the element type."""
    if element != bfloat16:
        return np.asarray(x).astype(numpy_dtype(element), copy=False)
    x = np.asarray(x)
    if x.dtype == np.float64:
        with np.errstate(all="ignore"):
            near = x.astype(np.float32)
            x = _to_odd(near, x - near)
    return _round_bfloat16(x)


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """Knuth's exact sum: the rounded one and what it lost."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _fma(x: Array, y: Array, z: Array) -> Array:
    """x * y + z in float64, such that one more rounding to 32 or 16 bits, or none for fp64, is the only one.

    For fp64 Boldo and Melquiond's way; within one unit in the last place where the product over- or underflows.
    """
    wide = x.dtype == np.float64
    x, y, z = (np.asarray(v, np.float64) for v in (x, y, z))
    product = x * y  # exact but for fp64
    if not wide:
        return _to_odd(*_two_sum(product, z))
    (a, b), (c, d) = (((v * 134217729.0) - ((v * 134217729.0) - v), v) for v in (x, y))  # Dekker: halves of 26 bits
    b, d = b - a, d - c
    lost = ((a * c - product) + a * d + b * c) + b * d
    low, low_error = _two_sum(z, lost)
    total, error = _two_sum(product, low)
    rest = _to_odd(*_two_sum(error, low_error))
    return np.where(np.isfinite(rest), total + rest, product + z)


def constant(number: Any, element: DType | PointerType) -> Array:
    """The value of a `constant` operation; integers wrap."""
    if isinstance(element, DType) and element.is_float:
        return round_to(np.asarray(number, np.float64), element)
    return np.asarray(number).astype(numpy_dtype(element))


# ----------------------------------------------------------------------------------------------------- integers


def _divide(x: Array, y: Array) -> Array:
    return np.where(np.equal(y, 0), 0, np.floor_divide(x - np.fmod(x, y), y)).astype(x.dtype)


def _remainder(x: Array, y: Array) -> Array:
    return np.where(np.equal(y, 0), x, np.fmod(x, y))


def _multiply_high(x: Array, y: Array) -> Array:
    bits = x.dtype.itemsize * 8
    if bits < 64:
        wide = np.int64 if x.dtype.kind == "i" else np.uint64
        return (np.multiply(x, y, dtype=wide) >> wide(bits)).astype(x.dtype)
    a, b = (np.asarray(v).view(np.uint64) for v in (x, y))
    low, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (a >> s) * (b & low) + ((a & low) * (b & low) >> s)
    other = (a & low) * (b >> s) + (middle & low)
    high = (a >> s) * (b >> s) + (middle >> s) + (other >> s)
    if x.dtype.kind == "i":  # a negative x stands for x + 2**64
        high = high - np.where(x < 0, b, np.uint64(0)) - np.where(y < 0, a, np.uint64(0))
    return np.asarray(high).view(x.dtype)


def _float_to_int(x: Array, dtype: np.dtype) -> Array:
    limits = np.iinfo(dtype)
    whole = np.trunc(np.asarray(x, np.float64))
    below, above = whole < float(limits.min), whole >= float(limits.max + 1)
    inside = np.where(below | above | np.isnan(whole), 0.0, whole)
    result = inside.astype(np.uint64).astype(dtype) if dtype == np.uint64 else inside.astype(np.int64).astype(dtype)
    return np.where(below, dtype.type(limits.min), np.where(above, dtype.type(limits.max), result))


# --------------------------------------------------------------------------------------------------- the operations

_erf = np.frompyfunc(math.erf, 1, 1)

_Table = dict[str, Callable[..., Array]]
_COMPARE: _Table = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_COMPARE["ge"] = np.greater_equal
_ARITHMETIC: _Table = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs}
_BITS: _Table = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_BITS |= {"shl": np.left_shift, "shr": np.right_shift}
_INTEGER: _Table = _ARITHMETIC | _BITS | {"div": _divide, "rem": _remainder, "mulhi": _multiply_high}
_INTEGER |= {"min": np.minimum, "max": np.maximum}
_BOOLEAN: _Table = _INTEGER | {"add": np.logical_xor, "sub": np.logical_xor, "neg": lambda x: x, "mulhi": np.zeros_like}
_BOOLEAN |= {"div": np.logical_and, "rem": lambda x, y: x & ~y, "shl": lambda x, y: x & ~y, "shr": lambda x, y: x & ~y}
_FLOAT: _Table = _ARITHMETIC | {"div": np.divide, "rem": np.fmod, "min": np.fmin, "max": np.fmax, "floor": np.floor}
_FLOAT |= {"ceil": np.ceil, "fma": _fma}
# Computed in float64 and rounded: for 32 and 16 bits the nearest value, but for one case in about 10**8.
_TRANSCENDENTAL: _Table = {
    **{name: getattr(np, name) for name in "exp exp2 log log2 sqrt sin cos tanh".split()},
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "erf": lambda x: np.asarray(_erf(x), np.float64),
}


def elementwise(op: Op) -> Callable[..., Array]:
    """The function from the operands' arrays to the result's, for an operation of `ir.ELEMENTWISE`."""
    kind, element = op.kind, op.operands[0].element
    if kind == "select":
        return np.where
    if kind in ("cast", "bitcast"):
        target = op.result.element
        return _cast(element, target) if kind == "cast" else _bitcast(element, target)
    if kind in _COMPARE:
        return _COMPARE[kind]
    if kind == "addptr":
        assert isinstance(element, PointerType)
        size = np.int64(element.element.nbytes)
        return lambda pointer, offset: np.add(pointer, np.multiply(offset.astype(np.int64), size))
    assert isinstance(element, DType)
    if element == int1:
        return _BOOLEAN[kind]
    if element.is_int:
        return _INTEGER[kind]
    if kind in _TRANSCENDENTAL:
        function = _TRANSCENDENTAL[kind]
        return lambda x: round_to(function(np.asarray(x, np.float64)), element)
    if kind in ("min", "max"):
        if op.attributes.get("propagate_nan", False):
            return np.minimum if kind == "min" else np.maximum
        return _FLOAT[kind]
    function = _FLOAT[kind]
    if kind == "fma" or element == bfloat16:  # fp16 needs no more: NumPy computes it in float32 and rounds
        return lambda *values: round_to(function(*values), element)
    return function


def _cast(source: DType | PointerType, target: DType | PointerType) -> Callable[[Array], Array]:
    dtype = numpy_dtype(target)
    if target == int1:
        return lambda x: np.not_equal(x, 0)
    if isinstance(source, PointerType) or isinstance(target, PointerType) or target.is_int:
        if isinstance(source, DType) and source.is_float:
            return lambda x: _float_to_int(x, dtype)
        return lambda x: x.astype(dtype)
    if source.is_float or target in (float32, float64):  # one rounding in NumPy itself, or in round_to
        return lambda x: round_to(x if source.is_float else x.astype(dtype), target)
    return lambda x: round_to(x.astype(np.float64), target)  # integers to 16 bits


def _bitcast(source: DType | PointerType, target: DType | PointerType) -> Callable[[Array], Array]:
    if isinstance(source, PointerType) or isinstance(target, PointerType):
        return lambda x: x.astype(np.int64).astype(numpy_dtype(target))
    dtype = memory_dtype(target)
    return lambda x: from_memory(np.ascontiguousarray(to_memory(x, source)).view(dtype).reshape(np.shape(x)), target)
