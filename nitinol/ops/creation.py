"""Arrays made of nothing: constants, ranges, masks, random numbers. All are elementwise operations on indices, so they
fuse into what uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nitinol.graph.array import Array
from nitinol.graph.conversion import as_operand
from nitinol.graph.dtypes import as_dtype
from nitinol.graph.nodes import INDEX, Scalar, View, index_layout
from nitinol.graph.operation import Operation
from nitinol.graph.views import row_major
from nitinol.language import random as philox
from nitinol.language import semantic
from nitinol.language.core import tensor
from nitinol.language.types import DType, float32, int64, uint32
from nitinol.ops.elementwise import where

Shape = int | Sequence[int]


def as_shape(shape: Shape) -> tuple[int, ...]:
    """A tuple of a shape or one extent; ValueError for negative extents."""
    extents = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    if builtin_any(n < 0 for n in extents):
        raise ValueError(f"a shape of {extents}: extents must be 0 or more")
    return extents


def builtin_any(values: Any) -> bool:
    return True in values


def as_array(value: Any) -> Array:
    """An Array of anything that holds elements, a number too."""
    found = as_operand(value)
    return found if isinstance(found, Array) else full((), found)


FULL = Operation("full", tile=lambda x: x, cost=0)


def full(shape: Shape, value: Any, dtype: Any = None) -> Array:
    """An array filled with one number (fp32 for a float, int32 for an integer unless `dtype` says otherwise)."""
    target = semantic.number_type(value) if dtype is None else as_dtype(dtype)
    extents = as_shape(shape)
    if target.is_int and target.kind != "bool":
        low, high = semantic.integer_limits(target)
        if not low <= value <= high:
            raise ValueError(f"full: the number {value} is out of range for {target} ({low} to {high})")
    return FULL.on(extents, target, [Scalar(value, target)])


def zeros(shape: Shape, dtype: Any = "fp32") -> Array:
    """An array of zeros."""
    return full(shape, 0, dtype)


def ones(shape: Shape, dtype: Any = "fp32") -> Array:
    """An array of ones."""
    return full(shape, 1, dtype)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> Array:
    """start, start + step, ... before stop; int32 of integers, fp32 if there is a float among the arguments."""
    start, stop = (0, start) if stop is None else (start, stop)
    if step == 0:
        raise ValueError("arange: the step is 0, expected any other number")
    count = builtin_max(0, math.ceil((stop - start) / step))
    whole = all(isinstance(n, int) for n in (start, stop, step))
    if dtype is not None:
        target = as_dtype(dtype)
    else:
        last = start + (count - 1) * step if count else start
        target = semantic.number_type(builtin_max(start, last, key=abs)) if whole else float32
    if whole:
        return ARANGE.on((count,), target, [_indices((count,), (step,), start)], dtype=target)
    scalars = [Scalar(float(n), float32) for n in (start, step)]
    return LINE.on((count,), target, [_indices((count,), (1,)), *scalars], dtype=target)


def _line(i: tensor, first: tensor, by: tensor, dtype: DType) -> tensor:
    return semantic.cast(semantic.cast(i, first.dtype) * by + first, dtype)  # type: ignore[arg-type]


def _indices(shape: tuple[int, ...], strides: Sequence[int], offset: int = 0) -> View:
    """offset + i * strides[0] + ... as an operand."""
    return View(INDEX, index_layout(shape, strides, offset))


ARANGE = Operation("arange", tile=lambda i, dtype: semantic.cast(i, dtype))
LINE = Operation("arange", tile=_line, cost=2)
EYE = Operation("eye", tile=lambda i, j, dtype: semantic.cast(semantic.compare("eq", i, j), dtype))
DIAGONAL = Operation("diagonal", tile=lambda d, k: semantic.compare("le", d, k))


def builtin_max(*values: Any, key: Any = None) -> Any:
    return sorted(values, key=key)[-1]


def eye(rows: int, columns: int | None = None, dtype: Any = "fp32") -> Array:
    """Ones on the main diagonal, zeros elsewhere."""
    target = as_dtype(dtype)
    columns = rows if columns is None else columns
    inputs = [_indices((rows, columns), (1, 0)), _indices((rows, columns), (0, 1))]
    return EYE.on((rows, columns), target, inputs, dtype=target)


def _below(shape: tuple[int, ...], diagonal: int) -> Array:
    """Where column - row <= diagonal in the last two axes."""
    if len(shape) < 2:
        raise ValueError(f"tril and triu take two axes or more, found shape {shape}")
    distance = _indices(shape, (*(0,) * (len(shape) - 2), -1, 1))
    return DIAGONAL.on(shape, as_dtype(bool), [distance, Scalar(diagonal, distance.dtype)])


def tril(x: Array, diagonal: int = 0) -> Array:
    """The elements on and below a diagonal of the last two axes, zeros above."""
    return where(_below(x.shape, diagonal), x, 0)


def triu(x: Array, diagonal: int = 0) -> Array:
    """The elements on and above a diagonal of the last two axes, zeros below."""
    return where(_below(x.shape, diagonal - 1), 0, x)


# ------------------------------------------------------------------------------------------------- random numbers


def uniform(
    shape: Shape, low: float = 0.0, high: float = 1.0, seed: int | Array = 0, offset: int = 0, dtype: Any = "fp32"
) -> Array:
    """Random numbers in [low, high), a function of seed and offset (Philox 4x32-10, as the tile language's `rand`).

    Element i uses the counter offset + i. A seed as an Array of one int64 may change from call to call of a compiled
    function; a number is fixed there.
    """
    return _random(UNIFORM, shape, seed, offset, (low, high), as_dtype(dtype))


def normal(
    shape: Shape, mean: float = 0.0, deviation: float = 1.0, seed: int | Array = 0, offset: int = 0,
    dtype: Any = "fp32",
) -> Array:  # fmt: skip
    """Normally distributed random numbers; seed and offset as in `uniform`."""
    return _random(NORMAL, shape, seed, offset, (mean, deviation), as_dtype(dtype))


def random_bits(shape: Shape, seed: int | Array = 0, offset: int = 0) -> Array:
    """Random uint32 words; seed and offset as in `uniform`."""
    return _random(RANDOM_BITS, shape, seed, offset, (), uint32)


UNIFORM = Operation(
    "uniform", tile=lambda i, s, a, b, dtype: semantic.cast(philox.rand(s, i) * (b - a) + a, dtype), cost=80
)
NORMAL = Operation(
    "normal", tile=lambda i, s, m, d, dtype: semantic.cast(philox.randn(s, i) * d + m, dtype), cost=100
)
RANDOM_BITS = Operation("random_bits", tile=lambda i, s, dtype: philox.randint(s, i), cost=70)


def _random(
    operation: Operation, shape: Shape, seed: int | Array, offset: int, numbers: tuple[float, ...], dtype: DType
) -> Array:
    extents = as_shape(shape)
    index = _indices(extents, row_major(extents), offset)
    if isinstance(seed, int):
        key: View | Scalar = Scalar(seed, int64)
    else:
        found = as_operand(seed)
        if found.size != 1 or not found.dtype.is_int:
            raise TypeError(
                f"{operation.name}: the seed has shape {found.shape} and type {found.dtype}, expected one integer"
            )
        key = found.reshape(()).broadcast_to(extents).view
    scalars = [Scalar(float(n), float32) for n in numbers]
    return operation.on(extents, dtype, [index, key, *scalars], dtype=dtype)
