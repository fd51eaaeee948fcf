"""Reductions, and the functions that are made of them: means, variances, logsumexp; running sums."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc,has-type"


from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array, method
from nitinol.graph.launch import Output, launch
from nitinol.graph.operation import Operation, Reduction
from nitinol.graph.views import reshape_layout
from nitinol.language import semantic
from nitinol.language.core import tensor
from nitinol.language.jit import jit
from nitinol.language.math import maximum, minimum
from nitinol.language.types import DType, float32, float64, int1, int32, int64, uint64
from nitinol.ops import elementwise as e
from nitinol.ops.creation import as_array, full

Axis = int | Sequence[int] | None

# One program reduces a row, or, where the last axis is kept, TILE columns. A long reduction in few programs is cut into
# PIECES, so that all workers have something to do: 4096 x 2048 over the rows took an H200 6.5 ms in two programs.
PIECES, LONG, FEW, TILE = 64, 1024, 64, 1024


def accumulator(dtype: DType) -> DType:
    """The type in which a reduction computes: halves in fp32, small integers in int32."""
    if dtype.is_float:
        return float64 if dtype == float64 else float32
    return dtype if dtype.bits >= 32 else int32


def _lowest(dtype: DType) -> Any:
    return -math.inf if dtype.is_float else semantic.integer_limits(dtype)[0]


def _highest(dtype: DType) -> Any:
    return math.inf if dtype.is_float else semantic.integer_limits(dtype)[1]


def _greater(a: tensor, b: tensor) -> tensor:
    return maximum(a, b, propagate_nan=True)


def _smaller(a: tensor, b: tensor) -> tensor:
    return minimum(a, b, propagate_nan=True)


def spread(x: Array, shape: tuple[int, ...], axes: Sequence[int]) -> Array:
    """A reduction's result (without the axes) over the shape of its operand."""
    return x.reshape(tuple([1 if a in axes else n for a, n in enumerate(shape)])).broadcast_to(shape)


def _extremum_vjp(g: Array, out: Array, x: Array, axes: tuple[int, ...], dtype: DType) -> tuple[Array]:
    """In equal shares to all elements that are the extremum (which halves could not count). Of a long row, which is
    reduced in pieces, to the pieces that have it."""
    chosen = e.equal(x, spread(out, x.shape, axes))
    count = sum(chosen.astype(accumulator(g.dtype)), axes)
    return (e.where(chosen, spread(g / count, x.shape, axes), 0.0),)


def _prod_vjp(g: Array, out: Array, x: Array, axes: tuple[int, ...], dtype: DType) -> tuple[Array]:
    """The product of the others, also where one of them is 0 (there second derivatives are not exact)."""
    zero = e.equal(x, 0)
    plain = e.where(zero, 1.0, x)
    zeros = spread(sum(zero.astype(g.dtype), axes), x.shape, axes)
    others = spread(g * prod(plain, axes), x.shape, axes)
    return (e.where(zero, e.where(zeros > 1.5, 0.0, others), e.where(zeros > 0.5, 0.0, others / plain)),)


def _sum_vjp(g: Array, out: Array, x: Array, axes: tuple[int, ...], dtype: DType) -> tuple[Array]:
    return (spread(g, x.shape, axes),)


def _rule(x: Array, axes: tuple[int, ...], dtype: DType) -> tuple[tuple[int, ...], DType]:
    return tuple([n for a, n in enumerate(x.shape) if a not in axes]), dtype


def _operation(name: str, vjp: Any, *how: Any) -> Operation:
    def reference(x: np.ndarray, axes: tuple[int, ...], dtype: DType) -> np.ndarray:
        return getattr(np, name)(x, axis=axes[0] if name.startswith("arg") and len(axes) == 1 else axes or None)

    return Operation(name, rule=_rule, reduction=Reduction(*how), reference=reference, vjp=vjp)


SUM = _operation("sum", _sum_vjp, operator.add, lambda t: 0, accumulator)
PROD = _operation("prod", _prod_vjp, operator.mul, lambda t: 1, accumulator)
MAX = _operation("max", _extremum_vjp, _greater, _lowest, accumulator)
MIN = _operation("min", _extremum_vjp, _smaller, _highest, accumulator)
ANY = _operation("any", e.constant_pieces, operator.or_, lambda t: 0, lambda t: int32)
ALL = _operation("all", e.constant_pieces, operator.and_, lambda t: 1, lambda t: int32)
ARGMAX = _operation("argmax", e.constant_pieces, _greater, _lowest, accumulator, "gt")
ARGMIN = _operation("argmin", e.constant_pieces, _smaller, _highest, accumulator, "lt")


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


def reduce(operation: Operation, x: Any, axis: Axis, keepdims: bool, dtype: DType | None = None) -> Array:
    """Records a reduction; `dtype` of the result, by default the array's."""
    x = as_array(x)
    if x.is_quantized:
        raise TypeError(f"{operation.name} of an array that is stored as {x.dtype}; use nitinol.dequantize(x) first")
    if operation in (ANY, ALL):
        x = x.astype(int1)
    elif operation in (SUM, PROD) and not x.dtype.is_float:
        x = x.astype(_sum_dtype(x))
    axes = _axes(x, axis, operation.name)
    kept = tuple([n for a, n in enumerate(x.shape) if a not in axes])
    count = math.prod(x.shape[a] for a in axes)
    dtype = x.dtype if dtype is None else dtype
    if count == 0 and math.prod(kept):
        if operation in (MAX, MIN, ARGMAX, ARGMIN):
            raise ValueError(f"{operation.name}: an array of shape {x.shape} has no elements along axis {axis}")
        assert operation.reduction is not None
        result = full(kept, operation.reduction.identity(dtype), dtype)
    elif (pieces := _pieces(operation, x, axes, kept, count)) is not None:
        partial = operation(pieces, axes=(1,), dtype=accumulator(dtype) if operation is SUM else dtype)
        result = operation(partial, axes=(0,), dtype=dtype)
    elif not axes:
        result = full(kept, 0, dtype) if operation in (ARGMAX, ARGMIN) else x.astype(dtype)
    else:
        result = operation(x, axes=axes, dtype=dtype)
    if keepdims:
        result = result.reshape(tuple([1 if a in axes else n for a, n in enumerate(x.shape)]))
    return result


def _pieces(
    operation: Operation, x: Array, axes: tuple[int, ...], kept: tuple[int, ...], count: int
) -> Array | None:
    """x as [PIECES, elements of a piece, *kept], a view, where the reduction is to be cut."""
    if operation not in (SUM, MAX, MIN) or count < LONG or count % PIECES or count * math.prod(kept) < 64 * LONG:
        return None
    by_columns = bool(kept) and x.ndim - 1 not in axes
    programs = math.prod(kept[:-1]) * -(-kept[-1] // TILE) if by_columns else math.prod(kept)
    if programs >= FEW:
        return None
    turned = x.permute([*axes, *(a for a in range(x.ndim) if a not in axes)])
    layout = reshape_layout(turned.layout, (PIECES, count // PIECES, *kept))
    return None if layout is None else Array(x.value, layout)


def _sum_dtype(x: Array) -> DType:
    """Integers sum in 64 bits, as in NumPy; floats in their own type (halves and bf16 accumulate in fp32)."""
    if x.dtype.is_float:
        return x.dtype
    return uint64 if x.dtype.kind == "uint" else int64


@method
def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The sum over axes (None: all). Integers and booleans sum as int64 or uint64."""
    return reduce(SUM, x, axis, keepdims)


@method
def prod(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The product over axes (None: all). Integers and booleans multiply as int64 or uint64."""
    return reduce(PROD, x, axis, keepdims)


@method
def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The largest element over axes (None: all); NaN if there is one."""
    return reduce(MAX, x, axis, keepdims)


@method
def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The smallest element over axes (None: all); NaN if there is one."""
    return reduce(MIN, x, axis, keepdims)


@method
def any(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """Whether one element over axes (None: all) is not 0."""
    return reduce(ANY, x, axis, keepdims)


@method
def all(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """Whether every element over axes (None: all) is not 0."""
    return reduce(ALL, x, axis, keepdims)


@method
def argmax(x: Any, axis: int | None = None, keepdims: bool = False) -> Array:
    """The index (int32) of the first largest element along an axis, or in the flattened array; NaN is largest."""
    return reduce(ARGMAX, _indexable(x, "argmax"), axis, keepdims, int32)


@method
def argmin(x: Any, axis: int | None = None, keepdims: bool = False) -> Array:
    """The index (int32) of the first smallest element along an axis, or in the flattened array; NaN is smallest."""
    return reduce(ARGMIN, _indexable(x, "argmin"), axis, keepdims, int32)


def _indexable(x: Any, what: str) -> Array:
    x = as_array(x)
    if x.size >= 2**31:
        raise ValueError(f"{what}: an array of shape {x.shape} has more elements than an int32 can number")
    return x


def _count(x: Array, axis: Axis, what: str) -> int:
    return math.prod(x.shape[a] for a in _axes(x, axis, what))


def floats(x: Any) -> Array:
    x = as_array(x)
    return x if x.dtype.is_float else x.astype(float32)


@method
def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """The mean over axes (None: all); integers give fp32."""
    x = floats(x)
    wide = accumulator(x.dtype)
    total = reduce(SUM, x, axis, keepdims, wide)
    return e.divide(total, float(_count(x, axis, "mean"))).astype(x.dtype)


@method
def var(x: Any, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Array:
    """The variance over axes (None: all): the squared distances from the mean over (count - correction)."""
    x = floats(x)
    wide = x.astype(accumulator(x.dtype))
    distance = wide - mean(wide, axis, True)
    count = _count(x, axis, "var") - correction
    return e.divide(sum(e.square(distance), axis, keepdims), float(count)).astype(x.dtype)


@method
def std(x: Any, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Array:
    """The square root of the variance. Where that is 0 the gradient is 0, as PyTorch's."""
    variance = var(x, axis, keepdims, correction)
    zero = e.equal(variance, 0)
    return e.where(zero, 0.0, e.sqrt(e.where(zero, 1.0, variance)))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Array:
    """log(sum(exp(x))), without overflow."""
    x = floats(x)
    top = max(x, axis, True)
    top = e.where(e.abs(top) < math.inf, top, 0.0)  # of nothing but -inf, or with +inf, exp says it itself
    total = e.log(sum(e.exp(x - top), axis, True)) + top
    return total if keepdims else total.reshape(tuple(n for a, n in enumerate(x.shape) if a not in _axes(x, axis, "")))


# -------------------------------------------------------------------------------------------------- running sums


@jit
def cumsum_kernel(x, out, n, BLOCK: tl.constexpr):
    """One program per row, a block at a time, carrying the sum so far."""
    row = tl.program_id(0).to(tl.int64) * n
    carried = tl.load(x + row) * 0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        block = tl.load(x + row + at, mask=at < n, other=0)
        tl.store(out + row + at, tl.cumsum(block, 0) + carried, mask=at < n)
        carried += tl.sum(block, 0)


def _cumsum_lower(target: str, x: Array, axis: int) -> Array:
    if not x.size:
        return full(x.shape, 0, x.dtype)
    rows = x.swapaxes(axis, -1)
    n = rows.shape[-1]
    block = tl.next_power_of_2(n if n < 1024 else 1024)
    out = launch(cumsum_kernel, (rows.size // n,), x=rows, out=Output(rows.shape, x.dtype), n=n, BLOCK=block)
    return out.swapaxes(axis, -1)


CUMSUM = Operation(
    "cumsum", rule=lambda x, axis: (x.shape, x.dtype), lower=_cumsum_lower,
    reference=lambda x, axis: np.cumsum(x, axis),
    vjp=lambda g, out, x, axis: (CUMSUM(g.flip(axis), axis=axis).flip(axis),),
)  # fmt: skip


def cumsum(x: Any, axis: int = 0) -> Array:
    """Sums of all prefixes along an axis. Integers as int64 or uint64; half types accumulate in fp32."""
    x = as_array(x)
    (place,) = _axes(x, axis, "cumsum")
    wide = accumulator(x.dtype) if x.dtype.is_float else _sum_dtype(x)
    return CUMSUM(x.astype(wide), axis=place).astype(x.dtype if x.dtype.is_float else wide)
