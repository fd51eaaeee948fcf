"""Reductions, and the functions that are made of them: means, variances, softmax, norms, cumulative sums."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from nitinol.array import elementwise as e
from nitinol.array.array import Array
from nitinol.array.conversion import as_operand
from nitinol.array.creation import full
from nitinol.array.emit import REDUCTIONS
from nitinol.array.graph import Reduce, record, whole
from nitinol.array.launch import Output, launch
from nitinol.array.tiles import cumsum_kernel
from nitinol.language.types import DType, float32, int1, int32, int64, uint64

Axis = int | Sequence[int] | None

# One program reduces one row. A long reduction to few results is cut, so that all workers have something to do.
PIECES, LONG, FEW = 64, 1 << 16, 64


def _axes(x: Array, axis: Axis, what: str) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(x.ndim))
    axes = (axis,) if not isinstance(axis, Sequence) else tuple(axis)
    found = []
    for a in axes:
        place = operator.index(a)
        if not -x.ndim <= place < x.ndim or place % x.ndim in found:
            raise ValueError(f"{what}: axis {axis} is not possible for an array of shape {x.shape}")
        found.append(place % x.ndim)
    return tuple(sorted(found))


def reduce(kind: str, x: Any, axis: Axis, keepdims: bool, dtype: DType | None = None) -> Array:
    """Records one of the named reductions; `dtype` of the result, by default the array's."""
    operand = as_operand(x)
    if operand is None:
        operand = full((), x)
    x = operand
    axes = _axes(x, axis, kind)
    kept = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    count = math.prod(x.shape[a] for a in axes)
    dtype = x.dtype if dtype is None else dtype
    if count == 0 and math.prod(kept):
        if kind in ("max", "min", "argmax", "argmin"):
            raise ValueError(f"{kind}: an array of shape {x.shape} has no elements along axis {axis}")
        result = full(kept, REDUCTIONS[kind].identity(dtype), dtype)
    elif kind in ("sum", "max", "min") and count >= LONG and math.prod(kept) < FEW and count % PIECES == 0:
        order = [a for a in range(x.ndim) if a not in axes] + list(axes)
        pieces = x.permute(order).reshape(*kept, PIECES, count // PIECES)
        wide = dtype if kind != "sum" else REDUCTIONS[kind].accumulator(dtype)
        partial = _record(kind, pieces, (len(kept) + 1,), wide)
        result = _record(kind, partial, (len(kept),), dtype)
    else:
        result = _record(kind, x, axes, dtype)
    if keepdims:
        result = result.reshape(tuple(1 if a in axes else n for a, n in enumerate(x.shape)))
    return result


def _record(kind: str, x: Array, axes: tuple[int, ...], dtype: DType) -> Array:
    shape = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    if not axes:
        return full(shape, 0, dtype) if kind.startswith("arg") else e.astype(x, dtype)
    (value,) = record(Reduce((x.view,), kind, axes, dtype), [(shape, dtype)])
    return Array(whole(value))


def _sum_dtype(x: Array) -> DType:
    """Integers sum in 64 bits, as in NumPy; floats in their own type (halves and bf16 accumulate in fp32)."""
    if x.dtype.is_float:
        return x.dtype
    return uint64 if x.dtype.kind == "uint" else int64


def _operand(x: Any) -> Array:
    found = as_operand(x)
    return full((), x) if found is None else found


def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The sum over axes (None: all). Integers and booleans sum as int64 or uint64."""
    x = _operand(x)
    return reduce("sum", x if x.dtype.is_float else e.astype(x, _sum_dtype(x)), axis, keepdims)


def prod(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The product over axes (None: all). Integers and booleans multiply as int64 or uint64."""
    x = _operand(x)
    return reduce("prod", x if x.dtype.is_float else e.astype(x, _sum_dtype(x)), axis, keepdims)


def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The largest element over axes (None: all); NaN if there is one."""
    return reduce("max", x, axis, keepdims)


def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The smallest element over axes (None: all); NaN if there is one."""
    return reduce("min", x, axis, keepdims)


def any(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """Whether one element over axes (None: all) is not 0."""
    return reduce("any", e.astype(_operand(x), int1), axis, keepdims)


def all(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """Whether every element over axes (None: all) is not 0."""
    return reduce("all", e.astype(_operand(x), int1), axis, keepdims)


def argmax(x: Any, axis: int | None = None, keepdims: bool = False) -> Array:
    """The index (int32) of the first largest element along an axis, or in the flattened array; NaN is largest."""
    return reduce("argmax", _indexable(x, "argmax"), axis, keepdims, int32)


def argmin(x: Any, axis: int | None = None, keepdims: bool = False) -> Array:
    """The index (int32) of the first smallest element along an axis, or in the flattened array; NaN is smallest."""
    return reduce("argmin", _indexable(x, "argmin"), axis, keepdims, int32)


def _indexable(x: Any, what: str) -> Array:
    x = _operand(x)
    if x.size >= 2**31:
        raise ValueError(f"{what}: an array of shape {x.shape} has more elements than an int32 can number")
    return x


def _count(x: Array, axis: Axis, what: str) -> int:
    return math.prod(x.shape[a] for a in _axes(x, axis, what))


def _floats(x: Any) -> Array:
    x = _operand(x)
    return x if x.dtype.is_float else e.astype(x, float32)


def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The mean over axes (None: all); integers give fp32."""
    x = _floats(x)
    wide = REDUCTIONS["sum"].accumulator(x.dtype)
    total = reduce("sum", x, axis, keepdims, wide)
    return e.astype(e.divide(total, float(_count(x, axis, "mean"))), x.dtype)


def var(x: Any, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Array:
    """The variance over axes (None: all): the squared distances from the mean over (count - correction)."""
    x = _floats(x)
    wide = e.astype(x, REDUCTIONS["sum"].accumulator(x.dtype))
    distance = e.subtract(wide, mean(wide, axis, True))
    count = _count(x, axis, "var") - correction
    return e.astype(e.divide(sum(e.square(distance), axis, keepdims), float(count)), x.dtype)


def std(x: Any, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Array:
    """The square root of the variance."""
    return e.sqrt(var(x, axis, keepdims, correction))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """log(sum(exp(x))), without overflow."""
    x = _floats(x)
    top = max(x, axis, True)
    total = e.add(e.log(sum(e.exp(e.subtract(x, top)), axis, True)), top)
    return total if keepdims else total.reshape(tuple(n for a, n in enumerate(x.shape) if a not in _axes(x, axis, "")))


def softmax(x: Any, axis: int = -1) -> Array:
    """exp(x - max) / sum along an axis."""
    x = _floats(x)
    power = e.exp(e.subtract(x, max(x, axis, True)))
    return e.astype(e.divide(power, sum(power, axis, True)), x.dtype)


def log_softmax(x: Any, axis: int = -1) -> Array:
    """log(softmax(x)) along an axis, without underflow."""
    x = _floats(x)
    return e.subtract(x, logsumexp(x, axis, True))


def rms_norm(x: Any, weight: Any = None, epsilon: float = 1e-6) -> Array:
    """x / sqrt(mean(x ** 2) + epsilon) * weight along the last axis (Zhang and Sennrich, 2019), in fp32 or wider."""
    x = _floats(x)
    wide = e.astype(x, REDUCTIONS["sum"].accumulator(x.dtype))
    result = e.multiply(wide, e.rsqrt(e.add(mean(e.square(wide), -1, True), epsilon)))
    return e.astype(result if weight is None else e.multiply(result, weight), x.dtype)


def layer_norm(x: Any, weight: Any = None, bias: Any = None, epsilon: float = 1e-5) -> Array:
    """(x - mean) / sqrt(var + epsilon) * weight + bias along the last axis (Ba, Kiros and Hinton, 2016)."""
    x = _floats(x)
    wide = e.astype(x, REDUCTIONS["sum"].accumulator(x.dtype))
    distance = e.subtract(wide, mean(wide, -1, True))
    result = e.multiply(distance, e.rsqrt(e.add(mean(e.square(distance), -1, True), epsilon)))
    result = result if weight is None else e.multiply(result, weight)
    return e.astype(result if bias is None else e.add(result, bias), x.dtype)


def cumsum(x: Any, axis: int = 0) -> Array:
    """Sums of all prefixes along an axis. Integers as int64 or uint64; half types accumulate in fp32."""
    x = _operand(x)
    (place,) = _axes(x, axis, "cumsum")
    wide = REDUCTIONS["sum"].accumulator(x.dtype) if x.dtype.is_float else _sum_dtype(x)
    if not x.size:
        return full(x.shape, 0, x.dtype if x.dtype.is_float else wide)
    rows = e.contiguous(e.astype(x, wide).swapaxes(place, -1))
    n = rows.shape[-1]
    block = 1 << (builtin_min(n, 1024) - 1).bit_length()
    found = launch(cumsum_kernel, (rows.size // n,), x=rows, out=Output(rows.shape, wide), n=n, BLOCK=block)
    return e.astype(found.swapaxes(place, -1), x.dtype if x.dtype.is_float else wide)


def builtin_min(a: int, b: int) -> int:
    return a if a < b else b
